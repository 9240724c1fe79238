"""One forward pass that tells whether a network takes images of a size, before hours are spent on it."""

import torch
from torch import Tensor, nn

from darht.core.errors import ModelError


def check_pixels(
    model: nn.Module, images: Tensor, name: str, *, fix: str = "change its kwargs", num_classes: int | None = None
) -> None:
    """Ask a network about one image, so that a size that it refuses is a message, not a crash.

    Args:
        model: takes pixels `[B, 3, H, W]` in [0, 1]; its mode is left as it was.
        images: uint8 `[N, 3, H, W]` on the model's device.
        name: what to call it in a message.
        fix: what the user can do about a refusal.
        num_classes: C where it must answer with logits `[B, C]`; not checked when None.

    Raises:
        ModelError: the network does not take images of this size, or answers in another shape.
    """
    was_training, (H, W) = model.training, images.shape[2:]
    try:
        with torch.no_grad():
            answer = model.eval()(images[:1].float() / 255)
    except Exception as error:  # timm asserts, torch and user code refuse sizes in their own ways
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ModelError(f"{name} does not take images of {W}x{H} pixels ({reason}); {fix}") from error
    finally:
        model.train(was_training)
    if num_classes is not None and tuple(answer.shape) != (1, num_classes):
        raise ModelError(
            f"{name} must give logits of shape {(1, num_classes)}, as its card says; "
            f"got {tuple(answer.shape)} for an image of {W}x{H} pixels"
        )
