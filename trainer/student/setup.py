"""What a run needs before its first step, and what it says about itself: checks, identity, student, held-out rows."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from darht.cache.builder.known_teachers import load_known_teacher, teacher_folders
from darht.cache.builder.teachers import load_teacher, read_card
from darht.cache.read.feed_plan import FeedPlan, plan_feed
from darht.cache.read.loader import GIB
from darht.cache.read.mixture import steps_of, training_groups
from darht.cache.read.reader import Cache
from darht.cache.read.stream import Feed, Perturbations
from darht.core.bounded import short_json
from darht.core.config import fingerprint, parse, to_plain
from darht.core.errors import ConfigError, ModelError
from darht.core.nets import check_pixels, head_name
from darht.core.nets.classifier import Classifier
from darht.core.nets.layout import to_channels_last
from darht.core.preprocessing import Preprocessing
from darht.core.rng import borrowed_generator
from darht.core.storage import LocalStorage, Storage
from darht.core.trust import trusting
from darht.core.version import VERSION
from darht.trainer.config import AverageConfig, StudentConfig, TrainConfig
from darht.trainer.state.checkpoint import RUN, StudentCard, read_run
from darht.trainer.student.averaging import default_average
from darht.trainer.student.model import Student, check_folds
from darht.trainer.student.warm import memory_bytes


def feed_plan(config: TrainConfig, cache: Cache, device: torch.device, memory_gib: float) -> FeedPlan:
    """Where the rows of the cache will be while this recipe trains.

    Raises:
        ConfigError: the budget is too small even to stream them, or to remember a perturbation of each row.
    """
    _check_memory(config, cache, memory_gib)
    starts = config.inner.kind == "warm" and config.inner.warm.start == "cached"
    return plan_feed(
        cache,
        device=device,
        adversarial=config.inner.kind == "cached" or config.targets == "nearest" or starts,
        jacobians=config.targets == "first-order",
        batch=config.optim.batch_size,
        budget_gib=memory_gib,
        logits="all" if config.inner.kind == "cached" else "drawn",
    )


def _check_memory(config: TrainConfig, cache: Cache, memory_gib: float) -> None:
    if config.inner.kind != "warm" or config.inner.warm.start == "label":
        return
    shape = cache.spec.view_shape
    needed = memory_bytes(cache.rows, shape, cache.spec.views.padding) / GIB
    if needed > memory_gib:
        raise ConfigError(
            f"inner: warm remembers a perturbation of each of {cache.rows:,} rows of {shape[1]}x{shape[2]} pixels, "
            f"{needed:.3g} GiB; the budget is {memory_gib:g} GiB: use inner.warm.start: label or inner.kind: n-fgsm, "
            "which remember none, or raise --memory (memory_gib)"
        )


def drawn_views(config: TrainConfig, cache: Cache) -> tuple[int, ...]:
    """The numbers of views among which the steps of this recipe draw: all, and with `cached` those of each attack."""
    attacks = cache.spec.attacks.values() if config.inner.kind == "cached" else ()
    return tuple(dict.fromkeys([cache.spec.views.count, *(attack.views for attack in attacks)]))


def needed_perturbations(config: TrainConfig) -> Perturbations:
    """Which stored perturbations a step looks at: of one attack in one view of each row, or as rows start from them."""
    if config.inner.kind == "cached":
        return "all" if config.objective().compares_points() else "drawn"
    return "all" if config.targets == "nearest" else "first"


def with_average(config: TrainConfig, cache: Cache, out: Path) -> TrainConfig:
    """The recipe with what `average: null` means: in a run that is gone on with what it began with, else the default.

    Raises:
        CacheError, ConfigError: the folder's `run.json` cannot be read.
    """
    if config.average is not None:
        return config
    if (out / RUN).is_file():
        recorded = read_run(out)["identity"]["recipe"].get("average") or {"kind": "none"}
        return replace(config, average=parse(AverageConfig, recorded, f"{out / RUN}: average"))
    return replace(config, average=settled_average(config, cache))


def settled_average(config: TrainConfig, cache: Cache) -> AverageConfig:
    """What is averaged in a run of this length."""
    if config.average is not None:
        return config.average
    steps = steps_of(training_groups(cache, config.optim.batch_size)) * config.optim.epochs
    return default_average(config.objective(), steps)


def run_identity(config: TrainConfig, cache: Cache, plan: FeedPlan) -> dict[str, Any]:
    """What makes two runs the same: recipe, cache, code version, rows left out and, when streamed, how many meet."""
    left_out = {"excluded_rows": fingerprint(cache.excluded)} if cache.excluded else {}
    streamed = {"window_rows": plan.window_rows} if plan.kind == "streamed" else {}
    recipe = to_plain(config) | {"loss": to_plain(config.objective())}
    if not config.compute.deterministic:  # as in runs from before there was a choice
        del recipe["compute"]["deterministic"]
    return {"recipe": recipe, "cache_root_hash": cache.root_hash, "darht": VERSION, **left_out, **streamed}


def cache_from(folder: Storage, out: Path) -> str:
    """Where the cache lies: relative to the run, so that both can be moved together, or its URL."""
    if isinstance(folder, LocalStorage):
        return os.path.relpath(folder.folder.resolve(), out.resolve())
    return str(folder)


def make_student(config: TrainConfig, feed: Feed, classes: tuple[str, ...]) -> Student:
    """The untrained student on the feed's device; its weights follow from the seed, or are those of `student.init`.

    Raises:
        ConfigError, ModelError: the architecture is unknown, or does not take images of this size.
    """
    initial = None if config.student.init is None else load_initial(config.student, len(classes))
    preprocessing = normalisation(feed.pixel_counts()) if initial is None else initial[1]
    if config.student.resize is not None:
        preprocessing = replace(preprocessing, resize=config.student.resize)
    with borrowed_generator(config.seed, "student"):
        student = Student(
            config.student.arch,
            config.student.kwargs,
            teachers=len(feed.cache.spec.teachers) if config.student.feature_map else 0,
            num_classes=len(classes),
            preprocessing=preprocessing,
            dropout=config.student.dropout(),
        ).to(feed.plan.device)
        if initial is not None:
            start_from(student, initial[0])
        pixels = feed.fetch(feed.training[:2])[0].to(feed.plan.device)
        check_pixels(student, pixels, config.student.arch)
        check_folds(student, pixels.float() / 255)
        if config.compute.channels_last:
            to_channels_last(student, pixels.float() / 255)
    return student


def load_initial(config: StudentConfig, classes: int) -> tuple[nn.Module, Preprocessing]:
    """The network that `student.init` names, on the CPU, and what happens to pixels before it.

    Raises:
        ModelError: it cannot be loaded, or is not of the student's architecture.
    """
    folder = Path(str(config.init))
    card = read_card(folder)
    found, wanted = (card.arch, card.kwargs, card.num_classes), (config.arch, config.kwargs, classes)
    if found != wanted:
        said = [f"{arch} {short_json(kwargs)} of {count} classes" for arch, kwargs, count in (found, wanted)]
        raise ModelError(
            f"student.init: {folder} is {said[0]}, the student is {said[1]}; set student.arch and kwargs to its"
        )
    with trusting():  # the card names what the recipe names
        return load_teacher(folder, torch.device("cpu"))[0].net, card.preprocessing


def start_from(student: Student, network: nn.Module) -> None:
    """Copy a network's weights into a student of its architecture; a student with a map keeps its own map and head.

    Raises:
        ModelError: they are not all there: what answers in another form than logits is wrapped.
    """
    state, own = network.state_dict(), student.backbone.state_dict()
    if lacking := [key for key in own if key not in state]:
        raise ModelError(f"student.init lacks {', '.join(lacking[:3])} of {student.arch}: start from a plain network")
    student.backbone.load_state_dict({key: state[key] for key in own})
    if not student.teachers:
        name = head_name(network, student.num_classes)
        with torch.no_grad():
            student.head.weight.copy_(state[f"{name}.weight"].reshape(student.head.weight.shape))
            student.head.bias.copy_(state[f"{name}.bias"])


def normalisation(counts: Tensor) -> Preprocessing:
    """Mean and standard deviation per channel, to four digits, in units of [0, 1].

    Args:
        counts: how often each level occurs, `[3, 256]`; see `stream.level_counts`.
    """
    counts = counts.double()
    shares, levels = counts / counts.sum(1, keepdim=True), torch.arange(256, dtype=torch.float64) / 255
    mean = shares @ levels
    std = (shares * (levels - mean[:, None]).square()).sum(1).sqrt().clamp(min=1e-2)
    return Preprocessing(mean=tuple(round(v, 4) for v in mean.tolist()), std=tuple(round(v, 4) for v in std.tolist()))


def live_teachers(
    config: TrainConfig, cache: Cache, given: Mapping[str, Path], device: torch.device
) -> tuple[Classifier, ...]:
    """The cache's teachers in its order, loaded when the recipe asks them; `given` overrides where their folders lie.

    Raises:
        ConfigError: a folder is not known or not wanted.
        ModelError: a folder holds no teacher, or another one than the cache was made with.
    """
    folders = teacher_folders(cache.spec, cache.origin(), given)
    if config.teachers == "cached":
        if given:
            raise ConfigError("--teacher says where live teachers lie; set teachers: live, or leave it out")
        return ()
    teachers = []
    for name in cache.spec.teachers:
        if name not in folders:
            raise ConfigError(f"teachers: live needs the folder of teacher '{name}'; give --teacher {name}=FOLDER")
        teacher = load_known_teacher(name, folders[name], cache.spec, device)
        if config.compute.channels_last:
            pixels = torch.linspace(0, 1, 2 * int(np.prod(cache.spec.view_shape)), device=device)
            to_channels_last(teacher, pixels.view(2, *cache.spec.view_shape))
        teachers.append(teacher)
    return tuple(teachers)


def _without_paths(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe for those who get the student: of a folder that it names, the name."""
    init = recipe["student"].get("init")
    return recipe if init is None else recipe | {"student": recipe["student"] | {"init": Path(init).name}}


def student_card(
    config: TrainConfig, cache: Cache, student: Student, row: dict[str, Any], identity: dict[str, Any]
) -> StudentCard:
    """What is written beside a student's weights after the epoch of `row` of the run of this identity."""
    return StudentCard(
        arch=student.arch,
        kwargs=student.kwargs,
        teachers=tuple(cache.spec.teachers) if config.student.feature_map else (),
        num_classes=student.num_classes,
        preprocessing=student.preprocessing,
        classes=cache.spec.data.classes,
        cache_root_hash=cache.root_hash,
        recipe=_without_paths(to_plain(config)),
        epoch=row["epoch"],
        selection={key: value for key, value in row.items() if key.startswith("holdout")},
        image_size=cache.spec.view_shape[-2:],
        mc_dropout=student.dropout.p,
        mc_samples=student.dropout.samples,
        run=fingerprint(identity),
    )
