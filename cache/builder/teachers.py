"""Teachers: a frozen network with its preprocessing inside, and the card that says what it is.

A teacher folder holds `teacher.safetensors` (the weights) and `teacher.json` (the card); `zoo:NAME` is one of the
folders that come with darht. A run of `darht-train` or a student's folder is a teacher too, see `students.py`.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from darht.cache.builder.students import load_folded, student_facts, student_folder
from darht.core.config import canonical_json, parse
from darht.core.errors import ConfigError, CorruptError, ModelError
from darht.core.files import sha256_file, write_atomic
from darht.core.nets import build
from darht.core.nets.build import accepts_num_classes
from darht.core.nets.checkpoint import Found, Which, check_said, count_classes, fit_checkpoint, read_checkpoint
from darht.core.nets.classifier import Classifier
from darht.core.nets.head import find_head
from darht.core.nets.identify import Network, identify
from darht.core.nets.logits import find_logits, wrap_logits
from darht.core.nets.weights import fit_state, load_safetensors
from darht.core.preprocessing import Preprocessing
from darht.core.sealed import read_sealed, write_sealed
from darht.core.trust import check_trusted, remember
from darht.core.zoo import in_zoo, teacher_path

WEIGHTS, CARD = "teacher.safetensors", "teacher.json"
# Sides in pixels that an imported network is asked about, one after the other.
SIZES = (32, 224, 64, 28, 8, 16, 96, 128, 256, 384)


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
        classes: their names; empty when unknown.
    """

    arch: str
    num_classes: int
    weights_sha256: str
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    preprocessing: Preprocessing = Preprocessing()
    training: dict[str, Any] = dataclasses.field(default_factory=dict)
    data: dict[str, Any] = dataclasses.field(default_factory=dict)
    accuracy: dict[str, Any] = dataclasses.field(default_factory=dict)
    classes: tuple[str, ...] = ()
    format_version: int = 1


def save_teacher(folder: Path, net: nn.Module, card: Card) -> Card:
    """Write weights and card, each atomically, the card last; returns the card with the weights' sha256 filled in.

    Layers that share their weights are written under each of their names. Who saves a teacher has made its network, so
    its card is trusted on this machine from now on.
    """
    remember(card.arch, card.num_classes, card.kwargs)
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in net.state_dict().items()}
    write_atomic(folder / WEIGHTS, safetensors.torch.save(state))
    card = dataclasses.replace(card, weights_sha256=sha256_file(folder / WEIGHTS))
    write_card(folder, card)
    return card


def write_card(folder: Path, card: Card) -> None:
    """Write `teacher.json` with its sha256, atomically, indented for people."""
    write_sealed(folder / CARD, json.loads(canonical_json(card)), {WEIGHTS: card.weights_sha256})


def read_card(folder: Path) -> Card:
    """Read `teacher.json`, or what it would say of a run or a student.

    Raises:
        ModelError: no card, or one that is not whole or was changed.
        ConfigError: `zoo:NAME` that does not come with darht.
    """
    folder = teacher_path(folder)
    path = folder / CARD
    if not path.is_file() and (place := student_folder(folder)) is not None:
        return Card(**student_facts(place))
    if not path.is_file():
        raise ModelError(
            f"{folder} is not a teacher folder: {path} is missing; darht-teacher train or import makes one"
        )
    try:
        return parse(Card, read_sealed(path, "restore it, or train or import the teacher again").value, CARD)
    except (CorruptError, ConfigError) as error:
        raise ModelError(f"{path} is not a teacher card: {error}") from error


def is_teacher_folder(folder: Path) -> bool:
    """Whether card and weights are there, whatever they hold; not for `zoo:NAME`, whose files nobody may write."""
    return (folder / CARD).is_file() and (folder / WEIGHTS).is_file()


def load_teacher(folder: Path, device: torch.device) -> tuple[Classifier, Card]:
    """The frozen teacher in eval mode, and its card; of a run its best student, folded.

    Raises:
        ModelError: files are missing, the weights are not the ones the card names, or they do not fit; or the card
            names code and is not trusted.
    """
    ours, folder = in_zoo(folder), teacher_path(folder)
    card, place = read_card(folder), None if (folder / CARD).is_file() else student_folder(folder)
    if not ours:
        check_trusted(card.arch, card.num_classes, card.kwargs, str(folder / CARD if place is None else place))
    if place is not None:
        net = load_folded(place, card.arch, card.num_classes, card.kwargs)
        return Classifier(net, card.preprocessing).to(device).eval().requires_grad_(False), card
    path = folder / WEIGHTS
    if not path.is_file():
        raise ModelError(f"{path} is missing beside its card; train or import the teacher again")
    found = sha256_file(path)
    if found != card.weights_sha256:
        raise ModelError(f"{path} has sha256 {found[:12]}, its card says {card.weights_sha256[:12]}: not these weights")
    net = build(card.arch, card.num_classes, card.kwargs)
    fit_state(net, load_safetensors(path), str(path))
    net = wrap_logits(net, card.training.get("logits"))
    teacher = Classifier(net, card.preprocessing).to(device).eval()
    return teacher.requires_grad_(False), card


def import_teacher(
    weights: Path | None,
    folder: Path,
    *,
    arch: str,
    num_classes: int | None = None,
    kwargs: dict[str, Any],
    preprocessing: Preprocessing | Mapping[str, Any],
    which: Which | None = None,
    on_note: Callable[[str], None] = lambda note: None,
) -> Card:
    """Make a teacher folder from foreign weights.

    Args:
        weights: their file; None for a `python:` callable that makes a network with its weights.
        folder: of the teacher.
        arch: as `build` takes it, or `robustbench:NAME` for an entry of that leaderboard.
        num_classes: C; None for what the last layer in the file, or the network, says.
        kwargs: of the architecture.
        preprocessing: those of resize, mean and std that were said; the file's own, or none, stand for the others.
        which: raw or averaged (ema) weights of a file that has both.
        on_note: gets a line for each thing that was found and used, or left out.

    Raises:
        ModelError: the file cannot be read, does not fit the architecture or what was said, or the network gives no
            logits.
    """
    said = dict(preprocessing) if isinstance(preprocessing, Mapping) else vars(preprocessing)
    check_said(said, None, weights)
    network = identify(arch, kwargs, None if weights is None else read_checkpoint(weights), num_classes)
    classes = network.num_classes or _count(network, num_classes)
    net = build(network.arch, classes, network.kwargs)
    found = Found(None, ())
    if network.checkpoint is not None:
        found = fit_checkpoint(net, network.checkpoint, which, network.usual)
    if found.normalisation is None:
        said = {**network.normalisation, **said}
    chosen = Preprocessing(**check_said(said, found.normalisation, weights))
    key = _find_logits(net, chosen, classes, network.arch)
    for note in (*network.notes, *found.notes):
        on_note(note)
    origin: dict[str, Any] = {"algorithm": "imported"}
    if weights is not None:
        origin |= {"file": weights.name, "file_sha256": sha256_file(weights)}
    if network.entry is not None:
        origin["robustbench"] = network.entry.published()
    if key is not None:
        origin["logits"] = key
        on_note(f"the network's answer holds its logits under {key!r}; the card says so")
    known: dict[str, Any] = {"arch": network.arch, "kwargs": network.kwargs, "num_classes": classes}
    card = Card(**known, preprocessing=chosen, training=origin, weights_sha256="")
    return save_teacher(folder, net, card)


def _count(network: Network, said: int | None) -> int:
    """C, from the classifier in the file or network where it tells, and from what was said."""
    checkpoint, arch, kwargs = network.checkpoint, network.arch, network.kwargs
    free, probe = accepts_num_classes(arch), 7  # any count: only names and, where C is not free, sizes are read
    if checkpoint is None and free:
        if said is None:
            raise ModelError(f"{arch} takes any class count: say it with --classes")
        return said
    net = build(arch, probe, kwargs)
    head = find_head(net, probe if free else None)
    told = None
    if head is not None:
        name, outputs = head
        told = count_classes(checkpoint, name) if checkpoint is not None else outputs
    if said is not None and told is not None and said != told:
        where = arch if checkpoint is None else checkpoint.path
        raise ModelError(f"{where} has {told} classes (the outputs of its last layer), --classes says {said}")
    return said or told or 10  # a wrong count is refused by the weights' shapes or the forward pass


def _find_logits(net: nn.Module, preprocessing: Preprocessing, classes: int, arch: str) -> int | str | None:
    """One forward pass: where the logits lie. Without `resize`, the first usual size that the network takes."""
    model, training, reason = Classifier(net, preprocessing), net.training, ""
    sizes = SIZES if preprocessing.resize is None else (preprocessing.resize,)
    for size in sizes:
        try:
            with torch.no_grad():
                answer = model.eval()(torch.full((2, 3, size, size), 0.5))
        except Exception as error:  # timm asserts, torch and user code refuse sizes in their own ways
            reason = reason or " ".join(f"{type(error).__name__}: {error}".split())
            continue
        finally:
            model.train(training)
        return find_logits(answer, 2, classes, arch)
    raise ModelError(
        f"{arch} takes no images of {', '.join(map(str, sizes))} pixels ({reason}): give --resize, or change its kwargs"
    )
