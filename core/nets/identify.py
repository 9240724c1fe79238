"""From what a person calls an architecture and what a file of weights holds to the network to build."""

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from darht.core.errors import ModelError
from darht.core.nets.checkpoint import Checkpoint, Which, count_classes, unwrapped
from darht.core.nets.robustbench import CLASSES, PREFIX, Entry, entries

# Options that a state dict shows, by the architectures that have them, and the entry that shows them.
_SHOWN = {
    "wrn-": ("sub_block1", "sub_block1.layer.0.conv1.weight"),
    "preact_resnet18": ("bn_before_fc", "bn.weight"),
}


@dataclass(frozen=True)
class Network:
    """What to build.

    Attributes:
        arch: as `build` takes it.
        kwargs: its options, those that the file shows included.
        checkpoint: the file, without what belongs to no layer; None for a callable that brings its weights.
        num_classes: C, where RobustBench's entry tells it.
        normalisation: mean and std to use where the file holds none; empty where none is known.
        entry: of RobustBench's leaderboard, where one was named.
        notes: what was found, for the user.
    """

    arch: str
    kwargs: dict[str, Any]
    checkpoint: Checkpoint | None
    num_classes: int | None
    normalisation: Mapping[str, tuple[float, ...]]
    entry: Entry | None
    notes: tuple[str, ...]

    @property
    def usual(self) -> Which:
        """The weights that are meant where a file has raw and averaged ones: a leaderboard measures the averaged."""
        return "raw" if self.entry is None else "ema"


def identify(arch: str, kwargs: Mapping[str, Any], checkpoint: Checkpoint | None, num_classes: int | None) -> Network:
    """The network of a file of weights: a name of RobustBench becomes an architecture, options are read off the file.

    Args:
        arch: as `build` takes it, or `robustbench:NAME`.
        kwargs: options that were said; they stand before those that the file shows.
        checkpoint: the file; None where `arch` is a `python:` callable that makes a network with its weights.
        num_classes: C, if it was said; else RobustBench's entry is chosen by the file's.

    Raises:
        ModelError: RobustBench has no such entry that is built here, or none with the file's classes; no file.
    """
    if checkpoint is None:
        _check_needs_no_file(arch)
        return Network(arch, dict(kwargs), None, None, {}, None, ())
    if arch.startswith(PREFIX):
        return _published(arch, kwargs, checkpoint, num_classes)
    shown, notes = _shown(arch, kwargs, checkpoint)
    return Network(arch, {**shown, **kwargs}, checkpoint, None, {}, None, notes)


def _published(arch: str, kwargs: Mapping[str, Any], checkpoint: Checkpoint, num_classes: int | None) -> Network:
    entry = _choose(arch, checkpoint, num_classes)
    checkpoint, options = _cut(checkpoint, entry), {**entry.kwargs, **kwargs}
    shown, notes = _shown(entry.arch, options, checkpoint)
    known = {"mean": entry.mean, "std": entry.std}
    normalisation = {key: value for key, value in known.items() if value is not None}
    notes = (*_said(entry, checkpoint), *notes)
    return Network(
        entry.arch, {**shown, **options}, checkpoint, CLASSES[entry.data], normalisation, entry, notes
    )  # fmt: skip


def _check_needs_no_file(arch: str) -> None:
    if arch.startswith(PREFIX):
        entry = _named(arch)[0]
        raise ModelError(
            f"{arch} has no weights of its own: give the file, which RobustBench keeps as "
            f"models/{entry.data}/Linf/{entry.file}"
        )
    if not arch.startswith("python:"):
        raise ModelError(f"{arch} has no weights of its own: give their file; only python:module:callable needs none")


def _named(arch: str) -> list[Entry]:
    name = arch.removeprefix(PREFIX)
    found = [known[name] for known in map(entries, CLASSES) if name in known]
    if found:
        return found
    names = list(dict.fromkeys(known for data in CLASSES for known in entries(data)))
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"the nearest are {', '.join(close)}" if close else f"{len(names)} names are, such as {names[0]}"
    raise ModelError(f"'{name}' is no L-inf entry of RobustBench on CIFAR that is built here; {hint}")


def _choose(arch: str, checkpoint: Checkpoint, num_classes: int | None) -> Entry:
    found = _named(arch)
    for entry in found:
        counted = num_classes or count_classes(checkpoint, entry.head)
        if counted == CLASSES[entry.data]:
            return entry
    there = {count for entry in found if (count := count_classes(checkpoint, entry.head)) is not None}
    has = f"has {there.pop()} classes" if len(there) == 1 else "does not tell its classes"
    known = " and ".join(f"{CLASSES[entry.data]} ({entry.data})" for entry in found)
    said = "" if num_classes is None else f", --classes says {num_classes}"
    raise ModelError(f"{checkpoint.path} {has}{said}; {arch} has {known}")


def _cut(checkpoint: Checkpoint, entry: Entry) -> Checkpoint:
    """The part of the file that the entry means, without entries that belong to no layer."""
    sets = checkpoint.sets
    if entry.part and any(_is_part(label, entry.part) for label in sets):
        sets = {label: tensors for label, tensors in sets.items() if _is_part(label, entry.part)}
    if entry.extra:
        sets = {label: _without(tensors, entry.extra) for label, tensors in sets.items()}
    return dataclasses.replace(checkpoint, sets=sets)


def _is_part(label: str, part: str) -> bool:
    return label == part or label.startswith(f"{part}.")


def _without(tensors: Mapping[str, Tensor], extra: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if extra not in key}


def _said(entry: Entry, checkpoint: Checkpoint) -> list[str]:
    notes = [
        f"RobustBench publishes {entry.clean:g} % clean and {entry.robust:g} % at eps {entry.eps:.3g}/255 on "
        f"{entry.data}: darht-teacher check should come near the first and stay above the second"
    ]
    if checkpoint.path.name != entry.file:
        notes.append(f"RobustBench calls this file {entry.file}; this one is {checkpoint.path.name}")
    return notes


def _shown(arch: str, said: Mapping[str, Any], checkpoint: Checkpoint) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Options that nobody said and the file shows, and what to say of them."""
    for start, (option, mark) in _SHOWN.items():
        if arch.startswith(start) and option not in said:
            states = [unwrapped(tensors) or tensors for tensors in checkpoint.sets.values()]
            if any(key == mark or key.endswith(f".{mark}") for state in states for key in state):
                return {option: True}, (f"the file holds {mark}: the network is built with {option}",)
    return {}, ()
