"""Tensors and plain values in one file, which is whole or absent."""

import hashlib
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from darht.core.errors import CacheError
from darht.core.files import whole_file
from darht.core.sealed import ZipSealer, check_zip, tell_unhashed

_AGAIN = "remove it, and what it kept is computed again"


def save_tensors(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values to one file with its sha256, atomically.

    Raises:
        DarhtError: the folder cannot be written or the disk is full; what was there before stays.
    """
    with whole_file(path) as file:
        sealer = ZipSealer(file)
        torch.save(state, cast(Any, sealer))
        sealer.close()


def load_tensors(path: Path, device: torch.device | str = "cpu", *, lazily: bool = False) -> dict[str, Any]:
    """What `save_tensors` wrote; `lazily` leaves tensors on the disk until they are looked at.

    Raises:
        CacheError: the file cannot be read, or has another sha256 than it carries. Ours are written in one piece, so
            something else has happened to it.
    """
    try:
        with path.open("rb") as file:
            if not check_zip(file, str(path), _AGAIN):
                tell_unhashed(path)
    except OSError as error:
        raise CacheError(f"{path} cannot be read: {error.strerror}") from error
    try:
        return cast(dict[str, Any], torch.load(path, map_location=device, weights_only=True, mmap=lazily))
    except (MemoryError, torch.OutOfMemoryError):  # nothing is wrong with the file
        raise
    except Exception as error:  # a damaged file makes the unpickler fail in a dozen ways
        raise CacheError(f"{path} is damaged ({first_sentence(error)}): {_AGAIN}") from error


def hash_weights(model: nn.Module, *facts: object) -> str:
    """sha256 of parameters, buffers (those outside of the state included, as means of pixels are) and `facts`."""
    digest = hashlib.sha256(repr([type(model).__qualname__, *facts]).encode())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def first_sentence(error: Exception) -> str:
    """What is wrong with a file; torch's further sentences advise to load it in a way that runs what is in it."""
    return str(error).strip().split("\n", 1)[0].split(". ", 1)[0] or type(error).__name__
