"""The networks that teachers and students are made of, by name, with their classifier layer found, removed or filled.

Every network takes normalised pixels `[B, 3, H, W]` and gives raw logits `[B, C]`; `Preprocess` stands before it.
"""

from darht.core.nets.build import build
from darht.core.nets.head import Backbone, backbone, fold_head, head_name
from darht.core.nets.preprocess import Preprocess

__all__ = ["Backbone", "Preprocess", "backbone", "build", "fold_head", "head_name"]
