"""A network through `torch.compile`, as one graph or not at all."""

from typing import Any, cast

import torch
import torch._dynamo
import torch._functorch.config
from torch import Tensor, nn

from darht.core.errors import ModelError

_LIMIT = 32  # graphs of one network: train and eval mode, with gradients of weights, pixels or none, and few shapes


class Compiled(nn.Module):
    """A compiled network within one that is not, so that train and eval mode reach it.

    It is one graph for each mode, precision and use of gradients, with the number of rows left open once it changes.
    What would be more is an error and never computed uncompiled in silence. Its backward pass may be taken twice.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = cast(nn.Module, torch.compile(net, fullgraph=True))

    def forward(self, x: Tensor) -> Any:
        """What the network says.

        Raises:
            ModelError: it does not compile as one graph, or not with few.
        """
        limits = torch._dynamo.config.patch(recompile_limit=_LIMIT, fail_on_recompile_limit_hit=True)
        try:
            with limits, torch._functorch.config.patch(donated_buffer=False):
                return self.net(x)
        except torch._dynamo.exc.FailOnRecompileLimitHit as error:
            raise ModelError(
                f"torch.compile needs more than {_LIMIT} graphs of this network, whose code or shapes change from call "
                "to call: leave compile out"
            ) from error
        except torch._dynamo.exc.Unsupported as error:
            why = str(error).strip().split("\n", 1)[0]
            raise ModelError(
                f"torch.compile does not take this network as one graph ({why}): leave compile out"
            ) from error
