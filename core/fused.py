"""Functions of tensors that a GPU computes in one launch: compiled on request, and elsewhere as they stand.

Around the passes of a network a training step is a few hundred operators on small tensors, and a GPU waits for the host
to launch each. `torch.compile` makes one kernel of such a function, and one of its backward pass; integers keep their
bits, and the rounding of floats may differ. A CPU has no launches to save, and would pay for the compiler in every run.
"""

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from darht.core.errors import ModelError

_LIMIT = 32  # graphs of one function: few shapes and precisions, with and without gradients
_ON: ContextVar[str] = ContextVar("fusing", default="")
P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def fusing(kind: str) -> Iterator[None]:
    """Compile what is marked `fused` for tensors on this kind of device (`cuda`), in the block and in this thread.

    What lies elsewhere is computed as it stands; with an empty name everything is.
    """
    token = _ON.set(kind)
    try:
        with warnings.catch_warnings():  # of the compiler, which looks at the gradient of all that it is given
            warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor that is not a leaf", UserWarning)
            yield
    finally:
        _ON.reset(token)


def is_fusing(device: torch.device) -> bool:
    """Whether functions of tensors on this device are compiled here."""
    return _ON.get() == device.type


def fused(function: Callable[Concatenate[Tensor, P], R]) -> Callable[Concatenate[Tensor, P], R]:
    """Mark a function of tensors and constants, which is compiled as one graph within `fusing`.

    Where its first tensor lies decides.

    Raises:
        ModelError: it does not compile as one graph, or not with few.
    """

    @functools.wraps(function)
    def call(first: Tensor, *args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling() or not is_fusing(first.device):
            return function(first, *args, **kwargs)
        compiled: Callable[Concatenate[Tensor, P], R] = compile_function(function)
        return compiled(first, *args, **kwargs)

    return cast(Callable[Concatenate[Tensor, P], R], call)


@functools.cache
def compile_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function through `torch.compile`, as `whole_graph` does it."""
    return whole_graph(function, f"{function.__module__}.{function.__qualname__}", _LIMIT)


def whole_graph(
    function: Callable[..., Any], name: str, limit: int, options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """A function or network through `torch.compile`, as one graph or not at all.

    It is one graph for each mode, precision and use of gradients, with the number of rows left open once it changes.
    What would be more is an error and never computed uncompiled in silence. Its backward pass may be taken twice.

    Args:
        function: what is compiled.
        name: of it, for errors.
        limit: of the graphs that are made of it.
        options: of Inductor, beside its own.

    Raises:
        ModelError: when it is called, and does not compile as one graph, or not with few.
    """
    import torch._dynamo
    import torch._functorch.config

    compiled, dynamo = torch.compile(function, fullgraph=True, options=options), torch._dynamo

    def call(*args: Any, **kwargs: Any) -> Any:
        limits = dynamo.config.patch(recompile_limit=limit, fail_on_recompile_limit_hit=True)
        try:
            with limits, torch._functorch.config.patch(donated_buffer=False):
                return compiled(*args, **kwargs)
        except dynamo.exc.FailOnRecompileLimitHit as error:
            raise ModelError(
                f"torch.compile needs more than {limit} graphs of {name}, whose code or shapes change from call to "
                "call: leave compile out"
            ) from error
        except (dynamo.exc.Unsupported, dynamo.exc.UserError) as error:
            why = str(error).strip().split("\n", 1)[0]
            raise ModelError(f"torch.compile does not take {name} as one graph ({why}): leave compile out") from error

    return call
