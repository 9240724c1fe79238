"""A network through `torch.compile`, as one graph or not at all."""

from typing import Any

import torch
from torch import Tensor, nn

from darht.core.device import device_of
from darht.core.fused import whole_graph

# A graph is recorded anew for each shape, and what changes its shape from step to step would be nothing but recorded.
_CUDA_GRAPHS = {"triton.cudagraphs": True, "triton.cudagraph_skip_dynamic_graphs": True}
_LIMIT = 32  # graphs of one network: train and eval mode, with gradients of weights, pixels or none, and few shapes


class Compiled(nn.Module):
    """A compiled network within one that is not, so that train and eval mode reach it.

    It is one graph for each mode, precision and use of gradients, with the number of rows left open once it changes.
    What would be more is an error and never computed uncompiled in silence. Its backward pass may be taken twice.

    On a GPU each pass of constant shape is a CUDA graph, one launch, whose answers last until `begin_step`.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        graphs = _CUDA_GRAPHS if device_of(net).type == "cuda" else None
        self.net, self._call = net, whole_graph(net, "this network", _LIMIT, graphs)

    def forward(self, x: Tensor) -> Any:
        """What the network says.

        Raises:
            ModelError: it does not compile as one graph, or not with few.
        """
        return self._call(x)


def begin_step(device: torch.device) -> None:
    """A training step of compiled networks begins: what they answered before, CUDA graphs may write over."""
    if device.type == "cuda":
        torch.compiler.cudagraph_mark_step_begin()
