"""The networks that teachers and students are made of, by name, with their classifier layer found, removed or filled.

Every network takes normalised pixels `[B, 3, H, W]` and gives raw logits `[B, C]`; `Preprocess` stands before it.
"""

from darht.core.nets.build import build
from darht.core.nets.head import Backbone, backbone, fold_head, head_name
from darht.core.nets.preprocess import Preprocess
from darht.core.nets.probe import check_pixels

__all__ = ["Backbone", "Preprocess", "backbone", "build", "check_pixels", "fold_head", "head_name"]
