"""A network with its preprocessing inside: what every model here is, teacher or student."""

import dataclasses

from torch import Tensor, nn

from darht.core.nets import Preprocess


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What happens between pixels in [0, 1] at source size and the network, inside the teacher."""

    resize: int | None = None
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)


class Classifier(nn.Module):
    """Pixels `[B, 3, H, W]` in [0, 1] at source size to raw logits `[B, C]`; preprocessing included."""

    def __init__(self, net: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.preprocess = Preprocess(preprocessing.resize, preprocessing.mean, preprocessing.std)
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """Raw logits `[B, C]`."""
        logits: Tensor = self.net(self.preprocess(x))
        return logits
