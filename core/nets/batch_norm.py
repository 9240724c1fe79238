"""A convolution and the BatchNorm in eval mode that follows it are one convolution: where a network has such pairs.

The pairs are found in a trace of the forward pass (`torch.fx`), not by names: what stands beside one another in a
module may be used in another order.
"""

import copy
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, fx, nn

from darht.core.nets.layout import PointConv2d, has_hooks

_CONVOLUTIONS = (nn.Conv2d, PointConv2d)  # and no other subclass, which may do otherwise with its weight


class Pair(NamedTuple):
    """Two calls of a traced forward pass, of which only the second uses what the first one says."""

    conv: fx.Node
    norm: fx.Node

    def modules(self, traced: fx.GraphModule) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
        """What is called."""
        conv, norm = (traced.get_submodule(str(node.target)) for node in self)
        return cast(nn.Conv2d, conv), cast(nn.BatchNorm2d, norm)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, PointConv2d) or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module) -> fx.GraphModule:
    """The forward pass as a graph over the model's own modules; it raises what the forward pass makes of proxies."""
    return fx.GraphModule(model, _Tracer().trace(model))


def pairs(traced: fx.GraphModule) -> list[Pair]:
    """Every convolution that a BatchNorm with running statistics follows directly, and nothing else does.

    A convolution that is called twice, and modules that somebody listens to, are left out.
    """
    calls = Counter(str(node.target) for node in traced.graph.nodes if node.op == "call_module")
    found = []
    for norm in traced.graph.nodes:
        conv = norm.args[0] if norm.args else None
        if not (isinstance(conv, fx.Node) and conv.op == norm.op == "call_module" and len(conv.users) == 1):
            continue
        parts = traced.get_submodule(str(conv.target)), traced.get_submodule(str(norm.target))
        if calls[str(conv.target)] == 1 and _folds(*parts):
            found.append(Pair(conv, norm))
    return found


def _folds(conv: nn.Module, norm: nn.Module) -> bool:
    if type(conv) not in _CONVOLUTIONS or type(norm) is not nn.BatchNorm2d or has_hooks(conv) or has_hooks(norm):
        return False
    return norm.affine and norm.track_running_stats


def replace(traced: fx.GraphModule, folded: Sequence[tuple[Pair, nn.Module]]) -> None:
    """Put one module in the place of each pair, in place."""
    for pair, module in folded:
        traced.set_submodule(str(pair.conv.target), module)
        pair.norm.replace_all_uses_with(pair.conv)
        traced.graph.erase_node(pair.norm)
    traced.delete_all_unused_submodules()
    traced.recompile()


class FoldedConvs:
    """Convolutions for pairs whose parts are still trained: they take over what these are worth when told to.

    With weights w and bias b of a convolution, and mean, variance, gain and shift of its norm, the folded weights are
    `w * gain / sqrt(variance + eps)` and the folded bias is `(b - mean) * gain / sqrt(variance + eps) + shift`.

    Attributes:
        folded: one for each pair, which asks for no gradient.
    """

    def __init__(self, parts: Sequence[tuple[nn.Conv2d, nn.BatchNorm2d]], *, channels_last: bool) -> None:
        convs, norms = [conv for conv, _ in parts], [norm for _, norm in parts]
        self._convs, self._norms = convs, norms
        self._sizes = [norm.num_features for norm in norms]
        self._eps = torch.cat([torch.full_like(norm.weight.detach(), norm.eps) for norm in norms])
        self._bias = torch.empty_like(self._eps)
        layout = torch.channels_last if channels_last else torch.preserve_format
        self.folded = [
            _constant(conv, torch.empty_like(conv.weight.detach(), memory_format=layout), bias)
            for conv, bias in zip(convs, self._bias.split(self._sizes), strict=True)
        ]

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over weights and statistics: a launch for each convolution and eight more, where these have no bias."""
        scales = (self._all("running_var") + self._eps).rsqrt() * self._all("weight")
        torch.addcmul(self._all("bias"), self._all("running_mean"), scales, value=-1, out=self._bias)
        for conv, folded, scale in zip(self._convs, self.folded, scales.split(self._sizes), strict=True):
            torch.mul(conv.weight, scale[:, None, None, None], out=folded.weight)
            if conv.bias is not None and folded.bias is not None:
                folded.bias.addcmul_(conv.bias, scale)

    def _all(self, name: str) -> Tensor:
        return torch.cat([getattr(norm, name) for norm in self._norms])


def _constant(conv: nn.Conv2d, weight: Tensor, bias: Tensor) -> nn.Conv2d:
    made = copy.deepcopy(conv)
    made.weight, made.bias = nn.Parameter(weight, requires_grad=False), nn.Parameter(bias, requires_grad=False)
    return made
