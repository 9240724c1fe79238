"""Foreign checkpoints as people have them: several sets of weights in one file, wrapped names, a normalisation inside.

Nothing is guessed: a set of weights is taken when every name of the network is found in it under one prefix, with the
network's shapes and nothing left over there. Two sets that fit and differ are refused, unless one is an average.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from darht.core.errors import ModelError
from darht.core.nets.weights import listed, load_file, misfit, strip_prefixes

Which = Literal["raw", "ema"]
_AVERAGED = {"ema", "swa", "averaged", "average", "avg", "shadow", "polyak"}
# DeepMind's code and its followers keep the raw weights under this, and the averaged without.
_RAW_BESIDE = "unaveraged_"
_WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|module)\.")
_COUNTERS = ("n_averaged", "num_batches_tracked", "total_ops", "total_params")  # that no answer depends on
_NORMALISATIONS = {"mean": "std", "mu": "sigma", "new_mean": "new_std"}
_SHAPES = {(3,), (3, 1, 1), (1, 3, 1, 1)}
_DEPTH = 3  # of mappings in a file: {"model": {"state_dict": {...}}}
_NO_FLOATS = "its weights are whole numbers; save them as floats"
_LARGEST = {"mean": 2.0, "std": 10.0}  # beyond these, numbers are meant for pixels of 0 to 255
_ROUNDING = 1e-3  # what people type of a mean is rounded


@dataclass(frozen=True)
class Normalisation:
    """Mean and std of pixels in [0, 1], one value per channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds: `sets` are its sets of tensors, by the keys that lead to each ("" is the file itself)."""

    path: Path
    entries: tuple[str, ...]
    sets: dict[str, dict[str, Tensor]]

    def about(self) -> str:
        """Its top-level entries, for a message."""
        return f"its top-level entries are {listed(list(self.entries))}"


@dataclass(frozen=True)
class Found:
    """What `fit_checkpoint` took: the normalisation that the file holds, if any, and notes for the user."""

    normalisation: Normalisation | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Fit:
    label: str
    averaged: bool
    state: dict[str, Tensor]
    others: tuple[str, ...]
    source: Mapping[str, Tensor]
    taken: frozenset[str]


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a file without executing anything in it.

    Raises:
        ModelError: it is missing, a web page, damaged, needs code to load, or holds no tensors under names.
    """
    loaded = load_file(path)
    sets = dict(_sets(loaded, "", 0))
    if any(len(tensors) for tensors in sets.values()):
        return Checkpoint(path, tuple(map(str, loaded)), sets)
    text = f"{path} holds {type(loaded).__name__}, not a state_dict of tensors: save model.state_dict()"
    entries = listed([str(key) for key in loaded]) if isinstance(loaded, Mapping) else ""
    raise ModelError(text + (f"; its top-level entries are {entries}" if entries else ""))


def _sets(value: Any, label: str, depth: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
    if not isinstance(value, Mapping) or depth > _DEPTH:
        return
    tensors = {key: _tensor(item) for key, item in value.items() if isinstance(key, str) and _is_array(item)}
    if tensors:
        yield label, tensors
    for key, item in value.items():
        if isinstance(key, str) and not key.startswith(("optim", "sched")):
            yield from _sets(item, f"{label}.{key}" if label else key, depth + 1)


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, np.ndarray) and value.dtype.kind in "fiu")


def _tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.from_numpy(np.array(value, value.dtype.newbyteorder("=")))


def count_classes(checkpoint: Checkpoint, head: str) -> int | None:
    """Outputs of the classifier layer `head` in a file, or None where the file does not tell one number."""
    name, rows = f"{head}.weight", set()
    for tensors in checkpoint.sets.values():
        state = unwrapped(tensors) or tensors
        keys = [key for key in state if state[key].ndim and (key == name or key.endswith(f".{name}"))]
        if keys:
            rows.add(len(state[min(keys, key=len)]))  # a longer one is a layer inside of a block
    return rows.pop() if len(rows) == 1 else None


def fit_checkpoint(net: nn.Module, checkpoint: Checkpoint, which: Which | None = None, usual: Which = "raw") -> Found:
    """Load the weights that fit a network into it.

    Args:
        net: gets the weights, in its own dtypes.
        checkpoint: of `read_checkpoint`.
        which: the raw or the averaged weights; None takes the `usual` ones, or the others where those are not there.
        usual: what is taken where nobody says it.

    Raises:
        ModelError: nothing fits, several sets fit and differ, or there are none of `which`.
    """
    fits = [fit for label, tensors in checkpoint.sets.items() for fit in _fits(net, label, tensors)]
    if not fits:
        raise ModelError(_refusal(net, checkpoint))
    fits = _told_apart(fits)
    chosen = _choose(fits, checkpoint.path, which, usual)
    net.load_state_dict(chosen.state, strict=True)
    beside = {key: tensor for key, tensor in chosen.source.items() if key not in chosen.taken}
    top = {} if any(fit.source is checkpoint.sets.get("") for fit in fits) else checkpoint.sets.get("", {})
    normalisation, notes = _normalisation([beside, top], checkpoint.path)
    other = next((fit for fit in fits if fit.averaged != chosen.averaged), None)
    if other is not None and which is None:
        taken, held, option = ("raw", "averaged", "ema") if other.averaged else ("averaged", "raw", "raw")
        notes.append(f"the {taken} weights are taken; {other.label} holds {held} ones: --weights {option} takes them")
    if chosen.others:
        notes.append(f"{len(chosen.others)} entries outside of the network are left out: {listed(chosen.others)}")
    return Found(normalisation, tuple(notes))


def _told_apart(fits: list[_Fit]) -> list[_Fit]:
    """Sets that have an `unaveraged_` one beside them are averages."""
    labels = {fit.label for fit in fits}
    return [replace(fit, averaged=fit.averaged or f"{_RAW_BESIDE}{fit.label}" in labels) for fit in fits]


def _choose(fits: list[_Fit], path: Path, which: Which | None, usual: Which) -> _Fit:
    kinds = {"raw": [fit for fit in fits if not fit.averaged], "ema": [fit for fit in fits if fit.averaged]}
    wanted = kinds[which] if which else kinds[usual] or kinds["raw"] or kinds["ema"]
    if not wanted:
        there = listed([fit.label for fit in fits])
        raise ModelError(f"{path} has no {which} weights that fit: it has {there}; leave --weights out")
    first = min(wanted, key=lambda fit: (len(fit.label), fit.label))
    for fit in wanted:
        if any(not torch.equal(fit.state[name], first.state[name]) for name in first.state):
            raise ModelError(
                f"{path} holds two sets of weights that fit and differ, {first.label} and {fit.label}: save the one "
                "that is meant alone"
            )
    return first


def _fits(net: nn.Module, label: str, tensors: Mapping[str, Tensor]) -> list[_Fit]:
    """Every prefix under which a set of tensors holds the whole network; wrappers inside of names go if need be."""
    own = net.state_dict(keep_vars=True)
    for state in (tensors, unwrapped(tensors)):
        prefixes = [prefix for prefix in _prefixes(own, state) if _picked(own, state, prefix)]
        fits = [fit for prefix in prefixes if (fit := _fit(own, label, state, prefix, prefixes))]
        if fits:
            return fits
    return []


def unwrapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the wrappers inside of names, such as `module.`; empty where two names would become one."""
    names = {key: _WRAPPERS.sub("", key) for key in tensors}
    if len(set(names.values())) < len(names):
        return {}
    return {names[key]: tensor for key, tensor in tensors.items()}


def _prefixes(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    names = [name for name in own if not name.endswith("num_batches_tracked")]
    anchors = [name for name in names if sum(own[name] is tensor for tensor in own.values()) == 1] or names
    if not anchors:
        return []
    anchor = max(anchors, key=len)
    return [key[: -len(anchor)] for key in state if key == anchor or key.endswith(f".{anchor}")]


def _picked(own: Mapping[str, Tensor], state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The network's state out of a set of tensors; empty unless it is there whole, in the network's shapes."""
    picked: dict[str, Tensor] = {}
    for name, tensor in own.items():
        shared = [prefix + alias for alias, other in own.items() if other is tensor]
        found = next((state[key] for key in (prefix + name, *shared) if key in state), None)
        if found is None and name.endswith("num_batches_tracked"):
            found = tensor.detach()
        if found is None or found.shape != tensor.shape or tensor.is_floating_point() > found.is_floating_point():
            return {}
        picked[name] = found.to(tensor.dtype)
    return picked


def _fit(
    own: Mapping[str, Tensor], label: str, state: Mapping[str, Tensor], prefix: str, prefixes: list[str]
) -> _Fit | None:
    longer = tuple(other for other in prefixes if other != prefix and other.startswith(prefix))
    keys = {other + name for other in prefixes for name in own}
    rest = [key for key in state if key not in keys and not _is_known(key, state) and not key.startswith(longer)]
    parent, _, last = prefix.removesuffix(".").rpartition(".")
    # In a Sequential, what follows the network would change its answer.
    scope = (f"{parent}." if parent else "") if last.isdigit() else prefix
    if any(key.startswith(scope) for key in rest):
        return None
    full = ".".join(part for part in (label, prefix.removesuffix(".")) if part) or "the file itself"
    averaged = bool(_AVERAGED & set(re.split(r"[._\W]+", full.lower()))) or "n_averaged" in state
    taken = frozenset(prefix + name for name in own)
    return _Fit(full, averaged, _picked(own, state, prefix), tuple(rest), state, taken)


def _is_known(key: str, state: Mapping[str, Tensor]) -> bool:
    """Whether an entry is a counter, or half of a normalisation."""
    base, _, last = key.rpartition(".")
    start = f"{base}." if base else ""
    pairs = [*_NORMALISATIONS.items(), *((std, mean) for mean, std in _NORMALISATIONS.items())]
    paired = any(last == one and f"{start}{other}" in state for one, other in pairs)
    return last in _COUNTERS or (paired and tuple(state[key].shape) in _SHAPES)


def _normalisation(sources: list[dict[str, Tensor]], path: Path) -> tuple[Normalisation | None, list[str]]:
    found: dict[Normalisation, str] = {}
    for state in sources:
        for key, tensor in state.items():
            start, last = key[: key.rfind(".") + 1], key.rpartition(".")[2]
            std = state.get(f"{start}{_NORMALISATIONS.get(last, '')}") if last in _NORMALISATIONS else None
            if std is not None and tuple(tensor.shape) in _SHAPES:
                found.setdefault(Normalisation(_numbers(tensor), _numbers(std)), key)
    if not found:
        return None, []
    if len(found) > 1:
        raise ModelError(f"{path} holds two normalisations that differ, {' and '.join(found.values())}: keep one")
    ((value, key),) = found.items()
    finite = all(map(math.isfinite, value.mean + value.std))
    if len(value.std) != 3 or not finite or min(value.std) <= 0 or max(value.mean) > 1:
        raise ModelError(f"{path}: {key} and its std are no mean and std of pixels in [0, 1]: {_said(value)}")
    return value, [f"the file's own normalisation is used, {_said(value)} ({key})"]


def _numbers(tensor: Tensor) -> tuple[float, ...]:
    return tuple(round(float(value), 7) for value in tensor.flatten())


def _said(value: Normalisation) -> str:
    return f"mean {_text(value.mean)} and std {_text(value.std)}"


def _text(values: tuple[float, ...]) -> str:
    return ",".join(f"{value:.6g}" for value in values)


def check_said(said: Mapping[str, Any], found: Normalisation | None, path: Path | None) -> dict[str, Any]:
    """Mean and std to use: the file's, or else those that were said, which must not contradict it.

    Raises:
        ModelError: what was said differs from the file's, or is on the scale 0 to 255.
    """
    for key in ("mean", "std"):
        values = said.get(key)
        if values is not None and max(values) > _LARGEST[key]:
            small = _text(tuple(value / 255 for value in values))
            raise ModelError(f"--{key} is for pixels in [0, 1]; got {_text(values)}: write --{key} {small}")
        own = getattr(found, key, None)
        if values is not None and own is not None and not np.allclose(values, own, atol=_ROUNDING, rtol=0):
            raise ModelError(
                f"--{key} {_text(values)} differs from {path}, which holds {_text(own)}: leave --mean and --std out"
            )
    return {**said, **({} if found is None else {"mean": found.mean, "std": found.std})}


def _refusal(net: nn.Module, checkpoint: Checkpoint) -> str:
    own = net.state_dict()
    stripped = {label: strip_prefixes(tensors, own) for label, tensors in checkpoint.sets.items()}
    label = max(stripped, key=lambda label: (len(stripped[label].keys() & own.keys()), len(stripped[label])))
    text = f"{checkpoint.path} does not fit the architecture: {misfit(net, stripped[label]) or _NO_FLOATS}"
    return text if label == "" else f"{text}; these are of {label}, {checkpoint.about()}"
