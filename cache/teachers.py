"""Teachers: a frozen network with its preprocessing inside, and the card that says what it is.

A teacher folder holds `teacher.safetensors` (the weights) and `teacher.json` (the card).
"""

import dataclasses
import json
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from darht.core.config import canonical_json, parse
from darht.core.errors import ConfigError, ModelError
from darht.core.files import sha256_file, write_atomic
from darht.core.nets import Preprocess, build
from darht.core.tensors import first_sentence

WEIGHTS, CARD = "teacher.safetensors", "teacher.json"
_CONTAINERS = ("state_dict", "model_state_dict", "model", "net", "ema")
_PREFIXES = ("module.", "_orig_mod.", "model.")


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What happens between pixels in [0, 1] at source size and the network, inside the teacher."""

    resize: int | None = None
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Card:
    """Everything that is known of a teacher.

    Attributes:
        arch: as `darht.core.nets.build` takes it.
        kwargs: of the architecture.
        num_classes: C.
        preprocessing: resize, mean and std.
        training: algorithm and its settings, or where foreign weights came from.
        data: source, split, rows and sha256 of what it was trained on; empty for foreign weights.
        weights_sha256: of `teacher.safetensors`.
        accuracy: measured accuracies in per cent by what was measured, each with its attack and count of images.
    """

    arch: str
    num_classes: int
    weights_sha256: str
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    preprocessing: Preprocessing = Preprocessing()
    training: dict[str, Any] = dataclasses.field(default_factory=dict)
    data: dict[str, Any] = dataclasses.field(default_factory=dict)
    accuracy: dict[str, Any] = dataclasses.field(default_factory=dict)
    format_version: int = 1


class Teacher(nn.Module):
    """Pixels `[B, 3, H, W]` in [0, 1] at source size to raw logits `[B, C]`; preprocessing included."""

    def __init__(self, net: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.preprocess = Preprocess(preprocessing.resize, preprocessing.mean, preprocessing.std)
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """Raw logits `[B, C]`."""
        logits: Tensor = self.net(self.preprocess(x))
        return logits


def save_teacher(folder: Path, net: nn.Module, card: Card) -> Card:
    """Write weights and card, each atomically, the card last; returns the card with the weights' sha256 filled in."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in net.state_dict().items()}
    write_atomic(folder / WEIGHTS, safetensors.torch.save(state))
    card = dataclasses.replace(card, weights_sha256=sha256_file(folder / WEIGHTS))
    write_card(folder, card)
    return card


def write_card(folder: Path, card: Card) -> None:
    """Write `teacher.json`, atomically, indented for people."""
    write_atomic(folder / CARD, (json.dumps(json.loads(canonical_json(card)), indent=2) + "\n").encode())


def read_card(folder: Path) -> Card:
    """Read `teacher.json`.

    Raises:
        ModelError: no card, or one that is not whole.
    """
    path = folder / CARD
    if not path.is_file():
        raise ModelError(
            f"{folder} is not a teacher folder: {path} is missing; darht-teacher train or import makes one"
        )
    try:
        return parse(Card, json.loads(path.read_text()), CARD)
    except (json.JSONDecodeError, UnicodeDecodeError, ConfigError) as error:
        raise ModelError(f"{path} is not a teacher card: {error}") from error


def is_teacher_folder(folder: Path) -> bool:
    """Whether card and weights are there, whatever they hold."""
    return (folder / CARD).is_file() and (folder / WEIGHTS).is_file()


def load_teacher(folder: Path, device: torch.device) -> tuple[Teacher, Card]:
    """The frozen teacher in eval mode, and its card.

    Raises:
        ModelError: files are missing, the weights are not the ones the card names, or they do not fit.
    """
    card = read_card(folder)
    path = folder / WEIGHTS
    if not path.is_file():
        raise ModelError(f"{path} is missing beside its card; train or import the teacher again")
    found = sha256_file(path)
    if found != card.weights_sha256:
        raise ModelError(f"{path} has sha256 {found[:12]}, its card says {card.weights_sha256[:12]}: not these weights")
    net = build(card.arch, card.num_classes, card.kwargs)
    fit_state(net, _load_safetensors(path), str(path))
    teacher = Teacher(net, card.preprocessing).to(device).eval()
    return teacher.requires_grad_(False), card


def read_state(path: Path, own: Collection[str] = ()) -> dict[str, Tensor]:
    """Read the weights of a foreign file (`.pt`, `.pth`, `.th`, `.safetensors`) without executing anything in it.

    Containers such as `{"state_dict": ...}` are opened and prefixes such as `module.` are stripped where every key
    has them.

    Args:
        path: the file.
        own: the names in the network that the weights are for; a prefix that they all have is its own and stays.

    Raises:
        ModelError: a missing file, a web page saved under the name of weights, or something else than tensors.
    """
    if not path.is_file():
        raise ModelError(f"{path} is missing: give a .pt, .pth, .th or .safetensors file of weights")
    with path.open("rb") as file:
        head = file.read(512).lstrip().lower()
    if head.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise ModelError(
            f"{path} is a web page, not weights: the download link gave an HTML page; fetch the file again"
        )
    loaded = _load_safetensors(path) if path.suffix == ".safetensors" else _load_torch(path)
    return _strip_prefixes(_open_containers(loaded, path), own)


def _load_safetensors(path: Path) -> Any:
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise ModelError(f"{path} is not a whole safetensors file: {error}") from error


def _load_torch(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an unusual pickle protocol: the file then loads or fails
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the unpickler fail in a dozen ways
        raise ModelError(
            f"{path} does not load as plain weights (weights_only=True): {first_sentence(error)}; save "
            "model.state_dict() alone"
        ) from error


def _open_containers(loaded: Any, path: Path) -> dict[str, Tensor]:
    for key in _CONTAINERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not loaded or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise ModelError(f"{path} holds {type(loaded).__name__}, not a state_dict of tensors: save model.state_dict()")
    return dict(loaded)


def _strip_prefixes(state: dict[str, Tensor], own: Collection[str]) -> dict[str, Tensor]:
    for prefix in _PREFIXES:
        is_own = bool(own) and all(name.startswith(prefix) for name in own)
        if not is_own and all(name.startswith(prefix) for name in state):
            return _strip_prefixes({name.removeprefix(prefix): tensor for name, tensor in state.items()}, own)
    return state


def fit_state(net: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Load a state dict that must fit exactly.

    Raises:
        ModelError: lists missing, unexpected and differently shaped entries.
    """
    own = net.state_dict()
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    shapes = [
        f"{name} is {tuple(state[name].shape)}, the network has {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if missing or unexpected or shapes:
        parts = [("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)]
        text = "; ".join(f"{len(names)} {what}: {_listed(names)}" for what, names in parts if names)
        raise ModelError(f"{where} does not fit the architecture: {text}")
    net.load_state_dict(dict(state), strict=True)


def _listed(names: list[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (f", and {len(names) - limit} more" if len(names) > limit else "")


def import_teacher(
    weights: Path, folder: Path, *, arch: str, num_classes: int, kwargs: dict[str, Any], preprocessing: Preprocessing
) -> Card:
    """Make a teacher folder from foreign weights.

    Raises:
        ModelError: the file cannot be read, or does not fit the architecture.
    """
    net = build(arch, num_classes, kwargs)
    Teacher(net, preprocessing)  # refuses a mean or std that could not be loaded again
    fit_state(net, read_state(weights, net.state_dict()), str(weights))
    origin = {"algorithm": "imported", "file": weights.name, "file_sha256": sha256_file(weights)}
    card = Card(
        arch=arch,
        kwargs=kwargs,
        num_classes=num_classes,
        preprocessing=preprocessing,
        training=origin,
        weights_sha256="",
    )
    return save_teacher(folder, net, card)
