"""A network with its preprocessing inside: what every model here is, teacher or student."""

from torch import Tensor, nn

from darht.core.nets import Preprocess
from darht.core.preprocessing import Preprocessing


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
