"""Teachers: a frozen network with its preprocessing inside, and the card that says what it is.

A teacher folder holds `teacher.safetensors` (the weights) and `teacher.json` (the card).
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from darht.core.config import canonical_json, parse
from darht.core.errors import ConfigError, ModelError
from darht.core.files import sha256_file, write_atomic
from darht.core.nets import build
from darht.core.nets.classifier import Classifier
from darht.core.nets.weights import _load_safetensors, fit_state, read_state
from darht.core.preprocessing import Preprocessing

WEIGHTS, CARD = "teacher.safetensors", "teacher.json"


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


def load_teacher(folder: Path, device: torch.device) -> tuple[Classifier, Card]:
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
    teacher = Classifier(net, card.preprocessing).to(device).eval()
    return teacher.requires_grad_(False), card


def import_teacher(
    weights: Path, folder: Path, *, arch: str, num_classes: int, kwargs: dict[str, Any], preprocessing: Preprocessing
) -> Card:
    """Make a teacher folder from foreign weights.

    Raises:
        ModelError: the file cannot be read, or does not fit the architecture.
    """
    net = build(arch, num_classes, kwargs)
    Classifier(net, preprocessing)  # refuses a mean or std that could not be loaded again
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
