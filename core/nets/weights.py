"""Read foreign weights without running anything in them, and fit them to a network."""

import _codecs
import argparse
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from darht.core.errors import ModelError
from darht.core.tensors import first_sentence

_PREFIXES = ("module.", "_orig_mod.", "model.")


def load_file(path: Path) -> Any:
    """What a file of weights holds, read without executing anything in it.

    Raises:
        ModelError: a missing file, a web page saved under the name of weights, a damaged file, or one that needs code.
    """
    if not path.is_file():
        raise ModelError(f"{path} is missing: give a .pt, .pth, .th or .safetensors file of weights")
    with path.open("rb") as file:
        head = file.read(512).lstrip().lower()
    if head.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise ModelError(
            f"{path} is a web page, not weights: the download link gave an HTML page; fetch the file again"
        )
    return load_safetensors(path) if path.suffix == ".safetensors" else _load_torch(path)


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, by name.

    Raises:
        ModelError: it is missing, or damaged.
    """
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise ModelError(f"{path} is not a whole safetensors file: {error}") from error
    return tensors


def _load_torch(path: Path) -> Any:
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_harmless()):
            warnings.simplefilter("ignore")  # of an unusual pickle protocol: the file then loads or fails
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the unpickler fail in a dozen ways
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = first_sentence(error) if refused is None else f"it needs {refused[1]}, which is code and is not run"
        raise ModelError(
            f"{path} does not load as plain weights (weights_only=True): {reason}; save model.state_dict() alone, with "
            'torch.save(model.state_dict(), "weights.pt") where the model was made'
        ) from error


def _harmless() -> list[Any]:
    """What stands beside weights in many files and only holds values: numpy's arrays and numbers, parsed arguments."""
    made_by = {"_reconstruct": np.zeros(1).__reduce__()[0], "scalar": np.float64(0).__reduce__()[0]}
    functions = [
        (function, f"numpy.{core}.multiarray.{name}")
        for core in ("core", "_core")
        for name, function in made_by.items()
    ]
    types = [kind for kind in vars(np.dtypes).values() if isinstance(kind, type)]
    return [*functions, np.ndarray, np.dtype, *types, argparse.Namespace, _codecs.encode]


def strip_prefixes(state: dict[str, Tensor], own: Collection[str]) -> dict[str, Tensor]:
    """Tensors without the prefixes, such as `module.`, that all names have.

    Args:
        state: by name.
        own: the names in the network that they are for; a prefix that they all have is its own and stays.
    """
    for prefix in _PREFIXES:
        is_own = bool(own) and all(name.startswith(prefix) for name in own)
        if not is_own and all(name.startswith(prefix) for name in state):
            return strip_prefixes({name.removeprefix(prefix): tensor for name, tensor in state.items()}, own)
    return state


def fit_state(net: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Load a state dict that must fit exactly.

    Raises:
        ModelError: lists missing, unexpected and differently shaped entries.
    """
    if text := misfit(net, state):
        raise ModelError(f"{where} does not fit the architecture: {text}")
    net.load_state_dict(dict(state), strict=True)


def misfit(net: nn.Module, state: Mapping[str, Tensor]) -> str:
    """Missing, unexpected and differently shaped entries of a state dict, as words; empty where it fits exactly."""
    own = net.state_dict()
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    shapes = [
        f"{name} is {tuple(state[name].shape)}, the network has {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    parts = [("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)]
    return "; ".join(f"{len(names)} {what}: {listed(names)}" for what, names in parts if names)


def listed(names: Sequence[str], limit: int = 8) -> str:
    """The first names with commas between them, and how many more there are."""
    return ", ".join(names[:limit]) + (f", and {len(names) - limit} more" if len(names) > limit else "")
