"""What is evaluated: a run, a student, a teacher, plain weights, a model of timm or torchvision, a Python callable.

`find` tells what a name is, `load` makes a `Target` of it: pixels in [0, 1] at source size in, raw logits out.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from darht.cache.builder.teachers import CARD, load_teacher
from darht.cache.read.reader import Cache
from darht.cache.read.webdataset import open_shards
from darht.core.class_names import check_class_names
from darht.core.config import to_plain
from darht.core.errors import CacheError, ConfigError, ModelError
from darht.core.hub import fetched, is_hub, parse_hub
from darht.core.nets import build
from darht.core.nets.checkpoint import Which, check_said, fit_checkpoint, read_checkpoint
from darht.core.nets.classifier import Classifier
from darht.core.nets.identify import identify
from darht.core.preprocessing import Preprocessing
from darht.core.tensors import first_sentence, hash_weights
from darht.core.zoo import in_zoo
from darht.trainer.evaluation.zoo import pretrained
from darht.trainer.state.checkpoint import (
    BEST,
    CONFIG,
    LAST,
    RUN,
    StudentCard,
    cache_of,
    check_of_run,
    load_student,
    read_run,
    read_student_card,
)
from darht.trainer.student.losses import RECIPES
from darht.trainer.student.model import Student

Kind = Literal["run", "student", "teacher", "weights", "timm", "torchvision", "python"]
OURS = ("run", "student", "teacher")  # with a card that says what builds them
FORMS = (
    "a run, a student's or teacher's folder, zoo:NAME, a weights file with --arch, timm:NAME, torchvision:NAME or "
    "python:M:F"
)


@dataclass(frozen=True)
class ModelOptions:
    """How a foreign model is built.

    Attributes:
        arch: the architecture that a weights file belongs to.
        kwargs: its options.
        preprocessing: those of resize, mean and std that were said; the model's own, or none, stand for the others.
        weights: raw or averaged (ema) ones, of a weights file that has both.
        shards: the cache of a run, where it is not where the run says or is a URL.
    """

    arch: str | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    weights: Which | None = None
    shards: str | None = None

    def over(self, own: Preprocessing) -> Preprocessing:
        """A model's own preprocessing with what was said."""
        return replace(own, **self.preprocessing)


@dataclass(frozen=True, kw_only=True)
class Target:
    """A model ready to be evaluated.

    Attributes:
        name: as a person would call it.
        kind: what it was made from.
        model: pixels to logits; frozen, in eval mode, on its device.
        num_classes: C.
        classes: their names; empty when unknown.
        about: what `eval.json` says of it.
        student: the unfolded student, where it is one.
        card: the student's card.
        cache: that a run was trained from.
        eps: that it was trained for, pixel levels; None when unknown.
        data: name of the data set that it belongs to; None when unknown.
        origin: where data and teachers lay when the cache was built.
        note: how its numbers may be read.
    """

    name: str
    kind: Kind
    model: nn.Module
    num_classes: int
    classes: tuple[str, ...] = ()
    about: dict[str, Any] = field(default_factory=dict)
    student: Student | None = None
    card: StudentCard | None = None
    cache: Cache | None = None
    eps: float | None = None
    data: str | None = None
    origin: dict[str, Any] = field(default_factory=dict)
    note: str = ""

    def fingerprint(self) -> str:
        """A hash of the weights and of what builds the network around them."""
        return hash_weights(self.model, self.kind, self.about.get("arch"))


def find(text: str | nn.Module, options: ModelOptions) -> Kind:
    """What a name on the command line is; a module is Python, as the callable is that makes one.

    Raises:
        ConfigError, CacheError: it is nothing that can be evaluated, or lacks --arch.
    """
    if isinstance(text, nn.Module):
        return "python"
    prefix, _, rest = text.partition(":")
    if rest and prefix in ("timm", "torchvision", "python"):
        return prefix  # type: ignore[return-value]  # one of the three literals
    if in_zoo(text):
        return "teacher"
    path = fetched(Path(text))
    files: dict[str, Kind] = {RUN: "run", CARD: "teacher", CONFIG: "student"}
    for file, kind in files.items():
        if (path / file).is_file():
            return kind
    if path.is_dir():
        raise CacheError(f"{path} is not a run: it holds none of {', '.join(files)}; give {FORMS}")
    if not path.is_file():
        raise ConfigError(f"there is no '{text}': give {FORMS}")
    if options.arch is None:
        raise ConfigError(f"{path} is a file of weights: say with --arch what network they belong to, e.g. resnet18")
    return "weights"


def students_of(text: str, options: ModelOptions, which: str) -> tuple[str, ...]:
    """Which students of a run are evaluated, `which` being one or `both`.

    Raises:
        ConfigError, CacheError, ModelError: both are wanted of what is no run, or of a run that lacks one.
    """
    if which != "both":
        return (which,)
    kind = find(text, options)
    if kind != "run":
        raise ConfigError(f"{text} is no run but a {kind}: --which both is for the two students of a run")
    for one in (BEST, LAST):
        check_of_run(read_student_card(Path(text) / one), Path(text), one)
    return BEST, LAST


def load(
    text: str | nn.Module, options: ModelOptions, device: torch.device, *, which: str = BEST, classes: int = 0
) -> Target:
    """Load what a name stands for; `classes` is the class count of the data, which foreign models are built with.

    Of a module a copy is evaluated, so that the caller's keeps its mode, its gradients and its device.

    Raises:
        ConfigError, ModelError, CacheError: it is not there, or does not fit.
    """
    if isinstance(text, str) and is_hub(text):
        found = load(str(fetched(Path(text))), options, device, which=which, classes=classes)
        return replace(found, name=str(parse_hub(text)))
    kind = find(text, options)
    if kind in OURS and options != ModelOptions(shards=options.shards):
        raise ConfigError(
            f"{text} is a {kind}, which knows its network: --arch, --kwargs, --mean, --std, --resize and --weights "
            "are for other models"
        )
    if kind != "weights" and options.weights is not None:
        raise ConfigError(f"{text} is no file of weights: --weights chooses in a file with raw and averaged ones")
    if kind != "run" and options.shards is not None:
        raise ConfigError(f"{text} is no run but a {kind}: --shards says where the cache of a run lies")
    if kind != "run" and which != BEST:
        raise ConfigError(f"{text} is no run but a {kind}: --which chooses among the two students of a run")
    if isinstance(text, nn.Module):
        name = type(text).__qualname__
        target = _foreign(name, kind, _copied(text), options.over(Preprocessing()), classes, arch=name)
        return replace(target, model=target.model.to(device).eval().requires_grad_(False))
    if kind == "run":
        return _run(Path(text), which, device, options.shards)
    if kind == "student":
        return _student(Path(text), device)
    if kind == "teacher":
        return _teacher(Path(text), device)
    if kind == "weights":
        target = _weights(Path(text), options, classes)
    elif kind == "python":
        net = build(text, classes, options.kwargs)
        target = _foreign(text, kind, net, options.over(Preprocessing()), classes)
    else:
        net, own, count = pretrained(text, options.kwargs)
        target = _foreign(text, kind, net, options.over(own), count)
    return replace(target, model=target.model.to(device).eval().requires_grad_(False))


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{type(model).__qualname__} cannot be copied ({first_sentence(error)}); evaluate its state_dict, or give "
            "python:module:callable that makes it"
        ) from error


def _run(run: Path, which: str, device: torch.device, shards: str | None) -> Target:
    location = cache_of(run, shards)
    if location is None:
        url = read_run(run)["cache"]
        raise CacheError(
            f"{run} says that its cache is at {url}, and what a folder says is not fetched: --shards {url}"
        )
    target = _student(run / which, device)
    assert target.card is not None
    check_of_run(target.card, run, which)
    cache = open_shards(location)
    if cache.root_hash != target.card.cache_root_hash:
        raise ConfigError(f"{cache.folder} is not the cache that {run} was trained from: its root hash differs")
    about = {**target.about, "which": which}
    name = run.resolve().name + ("" if which == BEST else f" ({which})")
    return replace(target, name=name, kind="run", cache=cache, origin=cache.origin(), about=about,
                   data=cache.spec.data.source)  # fmt: skip


def _student(folder: Path, device: torch.device) -> Target:
    """The student is measured folded: map and head are one linear layer, so that the function is the same."""
    student, card = load_student(folder, device)
    about = {"arch": card.arch, "kwargs": card.kwargs, "cache_root_hash": card.cache_root_hash, "recipe": card.recipe,
             "epoch": card.epoch, "map_rows": list(card.teachers)}  # fmt: skip
    return Target(
        name="/".join(folder.resolve().parts[-2:]), kind="student", model=student.fold().requires_grad_(False),
        student=student, card=card, num_classes=card.num_classes, classes=tuple(card.classes), about=about,
        eps=float(card.recipe["inner"]["eps"]), note=_note(card),
    )  # fmt: skip


def _teacher(folder: Path, device: torch.device) -> Target:
    model, card = load_teacher(folder, device)
    about = {"arch": card.arch, "kwargs": card.kwargs, "weights_sha256": card.weights_sha256, "training": card.training}
    eps = card.training.get("eps")
    return Target(
        name=folder.resolve().name, kind="teacher", model=model, num_classes=card.num_classes, about=about,
        classes=card.classes, eps=None if eps is None else float(eps), data=card.data.get("source"),
    )  # fmt: skip


def _weights(path: Path, options: ModelOptions, classes: int) -> Target:
    assert options.arch is not None
    network = identify(options.arch, options.kwargs, read_checkpoint(path), classes)
    net = build(network.arch, classes, network.kwargs)
    assert network.checkpoint is not None
    found = fit_checkpoint(net, network.checkpoint, options.weights, network.usual)
    known = {} if found.normalisation else network.normalisation
    said = check_said({**known, **options.preprocessing}, found.normalisation, path)
    name, chosen = f"{path.stem} ({options.arch})", replace(Preprocessing(), **said)
    return _foreign(name, "weights", net, chosen, classes, arch=network.arch)


def _foreign(name: str, kind: Kind, net: nn.Module, chosen: Preprocessing, classes: int, *, arch: str = "") -> Target:
    about = {"arch": arch or name, "preprocessing": to_plain(chosen)}
    return Target(name=name, kind=kind, model=Classifier(net, chosen), num_classes=classes, about=about)


def check_classes(target: Target, model: nn.Module, x: torch.Tensor, names: tuple[str, ...]) -> None:
    """Refuse a model whose answers do not belong to the classes of the data; `x` is one image in [0, 1].

    Raises:
        ConfigError: class names or counts differ.
        ModelError: the model returns something else than logits.
    """
    check_class_names(target.classes, names, target.name, "the data")
    with torch.no_grad():
        logits = model(x)
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2 or len(logits) != len(x):
        what = list(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ModelError(f"{target.name} must return logits [B, C]; it returned {what}")
    if logits.shape[1] != len(names):
        raise ConfigError(f"{target.name} has {logits.shape[1]} classes, the data has {len(names)}")


def _note(card: StudentCard) -> str:
    """How the student was trained, as far as it matters for reading its figures."""
    inner, recipe = card.recipe["inner"], card.recipe["recipe"]
    if card.clean_only:
        return f"recipe {recipe} trains on clean images only: robust accuracy is shown beside it"
    if inner["kind"] == "cached":
        return (
            "inner: cached trains on other networks' examples only: what it buys is transfer robustness; "
            "white-box accuracy is shown beside it"
        )
    return f"inner: {inner['kind']}, {_steps(inner)}, {_asked(card)}"


def _steps(inner: Mapping[str, Any]) -> str:
    """How the student's examples were found."""
    if inner["kind"] in ("pgd", "fat"):
        return f"{inner['steps']} steps on the student"
    if inner["kind"] == "n-fgsm":
        return "one step on the student from noise of twice the radius"
    if inner.get("warm", {}).get("start") == "label":
        return "one step on the student from its label's pattern"
    return "one step on the student from its row's last perturbation"


def _asked(card: StudentCard) -> str:
    """Whom the student's examples were put to."""
    recipe = RECIPES[card.recipe["recipe"]]
    if recipe.teachers_needed == "none":
        return "no teachers"
    if card.recipe.get("teachers") == "live":
        return "live teachers"
    targets = (card.recipe.get("targets") or "clean") if recipe.uses_adversarial_logits else "clean"
    return {
        "clean": "teachers quoted on the clean view",
        "nearest": "teachers quoted on the nearest stored example",
        "first-order": "teachers estimated by their Jacobians",
    }[targets]
