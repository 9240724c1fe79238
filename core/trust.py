"""Whose `python:` names may be called: those that the user typed, and not those in what was received.

A card is data, and building the network that it names must run nothing of a stranger's choice. A `python:` name in a
card is called when the user said so (`trusting`), or when it was made here: who trains or imports a network with a
callable has typed it, and the hash of this call, callable and options, is remembered in the user's data folder.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from darht.core.bounded import cut
from darht.core.config import canonical_json, fingerprint
from darht.core.errors import DarhtError, ModelError
from darht.core.files import user_data_folder, write_atomic

PREFIX = "python:"
_trusted: ContextVar[bool] = ContextVar("trusted", default=False)
_made: set[str] = set()  # by this process; the folder may not be writable


@contextmanager
def trusting(allowed: bool = True) -> Iterator[None]:
    """Let cards that are read inside of the block name `python:` callables; False changes nothing."""
    token = _trusted.set(_trusted.get() or allowed)
    try:
        yield
    finally:
        _trusted.reset(token)


def is_trusting() -> bool:
    """Whether this is inside of such a block; other processes must be told."""
    return _trusted.get()


def trusted_folder() -> Path:
    """Where calls are remembered, a file for each; to forget one, remove its file.

    Raises:
        DarhtError: the machine knows no home.
    """
    return user_data_folder() / "trusted"


def remember(arch: str, num_classes: int, kwargs: Mapping[str, Any]) -> None:
    """Note that the user made a network with this call, so that its card is taken later; only `python:` needs it."""
    if not arch.startswith(PREFIX):
        return
    call = _call(arch, num_classes, kwargs)
    key = fingerprint(call)
    if key in _made:
        return
    _made.add(key)
    try:
        write_atomic(trusted_folder() / f"{key}.json", canonical_json(call).encode())
    except DarhtError:  # a machine that keeps nothing of the user, or knows no home
        return


def check_trusted(arch: str, num_classes: int, kwargs: Mapping[str, Any], where: str) -> None:
    """See that the network which a card names may be built.

    Args:
        arch: as the card says it.
        num_classes: likewise.
        kwargs: likewise.
        where: what a message calls the card.

    Raises:
        ModelError: it names a `python:` callable, the user did not say that it is trusted, and it was not made here.
    """
    if not arch.startswith(PREFIX) or _trusted.get():
        return
    key = fingerprint(_call(arch, num_classes, kwargs))
    if key not in _made and not _is_noted(key):
        raise ModelError(
            f"{where} asks to call {cut(arch.removeprefix(PREFIX), 200)}, which is code: a card that was not made here "
            "runs none; look at that function, and if you trust it give --trust-code (in Python trust_code=True)"
        )


def _is_noted(key: str) -> bool:
    try:
        return (trusted_folder() / f"{key}.json").is_file()
    except DarhtError:  # no home
        return False


def _call(arch: str, num_classes: int, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {"arch": arch, "num_classes": num_classes, "kwargs": dict(kwargs)}
