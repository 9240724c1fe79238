"""XCiT at patch size 4 for CIFAR's 32 pixels (Debenedetti et al., arXiv 2209.07399).

It is timm's XCiT at patch size 16 with the first two of its four stem convolutions at stride 1, so that it has the
parameter names of the checkpoints at both sizes.
"""

from typing import Any

from torch import nn

from darht.core.errors import ModelError
from darht.core.nets.layers import check_positive
from darht.core.vision import torchvision

SIZES = {"s12": (384, 8), "m12": (512, 8), "l12": (768, 16)}  # width, heads
_PATCH = 4


def xcit_p4(num_classes: int, width: int, heads: int, depth: int = 12) -> nn.Module:
    """An XCiT of `depth` blocks that sees patches of 4x4 pixels; `width` is a multiple of 8 and of `heads`.

    Raises:
        ModelError: a size is not a whole number >= 1, or the width no such multiple.
    """
    check_positive("width", width)
    check_positive("heads", heads)
    check_positive("depth", depth)
    if width % 8 or width % heads:
        raise ModelError(f"an XCiT's width must be a multiple of 8 and of its heads; got {width} with {heads} heads")
    torchvision()  # first, because timm imports it as well
    import timm

    sizes: dict[str, Any] = {"embed_dim": width, "num_heads": heads, "depth": depth, "num_classes": num_classes}
    net: nn.Module = timm.create_model("xcit_small_12_p16_224", pretrained=False, **sizes)
    stem: Any = net.patch_embed
    for index in (0, 2):
        stem.proj[index][0].stride = (1, 1)
    stem.patch_size = _PATCH
    return net
