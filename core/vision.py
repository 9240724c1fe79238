"""The one place that imports torchvision.

A torchvision wheel built for CUDA beside a CPU-only torch cannot load its compiled operators and fails at import with
"operator torchvision::nms does not exist", although everything written in Python would work. A machine without a GPU
often has exactly this pair. So: try the import; on that error declare the two operators it asks for, and import again.
The declared operators have no implementation: calling them still fails, and darht never does.
"""

import importlib
import sys
from types import ModuleType
from typing import Any, cast

_MISSING_OPERATORS = ("nms", "qnms")
_BROKEN = "torchvision does not load beside this torch; install the build that belongs to it"
# The operator libraries live as long as this list: torch removes their operators when they are collected.
_declared: list[Any] = []


def torchvision() -> ModuleType:
    """Return the torchvision package, importable even beside a torch without its operators.

    Raises:
        ImportError: torchvision is not installed, or is broken in another way.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise ImportError(f"{_BROKEN}: {error}") from error
    _forget_partial_import()
    _declare_operators()
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        raise ImportError(f"{_BROKEN}: {error}") from error


def _forget_partial_import() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]


def _declare_operators() -> None:
    import torch

    if _declared:
        return
    library: Any = cast(Any, torch.library.Library)("torchvision", "DEF")  # torch left its constructor untyped
    for name in _MISSING_OPERATORS:
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)
