"""Private copies of a model, made fast by folding BatchNorm; the caller's model is not touched."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from darht.attacks.objectives import Model
from darht.core.device import keep_memory
from darht.core.nets.batch_norm import pairs, replace, trace
from darht.core.nets.layout import has_hooks

_TOLERANCE = 1e-3  # of the largest logit: float32 folding stays below 1e-5, a trace that froze a branch is far above


def private_copy(model: Model) -> nn.Module | None:
    """A frozen deep copy, or None for what cannot be copied: a plain callable, hooks, non-leaf tensors.

    Hooks belong to the caller and must fire on the caller's model.
    """
    if not isinstance(model, nn.Module) or any(has_hooks(part) for part in model.modules()):
        return None
    try:
        return copy.deepcopy(model).requires_grad_(False)
    except (RuntimeError, TypeError, AttributeError):
        return None


def folded(model: nn.Module, probe: Tensor) -> nn.Module | None:
    """A copy with every BatchNorm that follows a convolution folded into it, or None.

    None where there is nothing to fold, where the forward pass cannot be traced, or where the trace does not answer
    the `probe` pixels as the model does (a random or input-dependent branch would be frozen by tracing).
    """
    if not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in model.modules()):
        return None
    try:
        fused = _fold(trace(copy.deepcopy(model))).requires_grad_(False).eval()
        with torch.no_grad():
            want, got = model(probe.clone()), fused(probe.clone())
    except Exception:  # tracing runs foreign code with proxies: whatever it raises means "not traceable"
        return None
    return fused if bool((want - got).abs().max() <= _TOLERANCE * want.abs().max()) else None


def _fold(traced: fx.GraphModule) -> fx.GraphModule:
    replace(traced, [(pair, fuse_conv_bn_eval(*pair.modules(traced))) for pair in pairs(traced)])
    return traced


def replicas(model: nn.Module, count: int) -> list[Model]:
    """`count` module trees over the same tensors: what a forward pass stores in its modules is each thread's own."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return [model, *(copy.deepcopy(model, dict(shared)) for _ in range(count - 1))]


@contextmanager
def kernels(device: torch.device) -> Iterator[None]:
    """Deterministic kernels on a GPU; one torch thread for each lane on a CPU; restored at the end.

    One lane has one thread as well: with more, matrix products of few rows are cut along the sum, which changes bits.
    On a CPU the C library is also brought to keep what is freed: see `core.device.keep_memory`.
    """
    threads = torch.get_num_threads()
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    try:
        if device.type == "cuda":
            cudnn.deterministic, cudnn.benchmark = True, False
        else:
            keep_memory()
            torch.set_num_threads(1)
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before
        torch.set_num_threads(threads)
