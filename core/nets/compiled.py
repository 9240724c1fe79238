"""A network through `torch.compile`, as one graph or not at all."""

from typing import Any

from torch import Tensor, nn

from darht.core.fused import whole_graph

_LIMIT = 32  # graphs of one network: train and eval mode, with gradients of weights, pixels or none, and few shapes


class Compiled(nn.Module):
    """A compiled network within one that is not, so that train and eval mode reach it.

    It is one graph for each mode, precision and use of gradients, with the number of rows left open once it changes.
    What would be more is an error and never computed uncompiled in silence. Its backward pass may be taken twice.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self._call = net, whole_graph(net, "this network", _LIMIT)

    def forward(self, x: Tensor) -> Any:
        """What the network says.

        Raises:
            ModelError: it does not compile as one graph, or not with few.
        """
        return self._call(x)
