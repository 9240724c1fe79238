"""The model that is evaluated, the images it is asked about, and the other models that help to attack it."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from darht.cache.builder.teachers import load_teacher
from darht.cache.format.spec import RULES
from darht.cache.sources.load import FileSource, Source, content_sha256, load_source
from darht.cache.sources.open import load_centred
from darht.core.class_names import check_class_names
from darht.core.errors import ConfigError, DarhtError
from darht.core.nets import check_pixels
from darht.trainer.evaluation.config import EvalConfig
from darht.trainer.evaluation.target import OURS, ModelOptions, Target, check_classes, find, load

QUICK_IMAGES = 1000


def load_model_and_data(text: str | nn.Module, config: EvalConfig, device: torch.device) -> tuple[Target, Source]:
    """The model and the images it is asked about; foreign models are built for the data's classes."""
    if find(text, config.model) in OURS:
        target = load(text, config.model, device, which=config.which)
        source = _test_split(target.data, target.origin, config, _view_size(target))
    else:
        source = _test_split(None, {}, config)
        target = load(text, config.model, device, which=config.which, classes=len(source.classes))
    image = torch.from_numpy(source.images[:1]).to(device)
    check_pixels(target.model, image, target.name)
    check_classes(target, target.model, image.float() / 255, source.classes)
    return target, source


def _view_size(target: Target) -> int:
    """Side of the centred squares that a run's student was trained on, where its views are resized crops; else 0."""
    return 0 if target.cache is None else target.cache.spec.views.size


def _test_split(known: str | None, origin: Mapping[str, Any], config: EvalConfig, view_size: int = 0) -> Source:
    name = config.data or known
    if name is None:
        raise ConfigError("the model does not say what data it belongs to: give --data NAME, and --root DIR")
    lay = origin.get("data_root") if config.data in (None, known) else None
    where = config.root or (Path(lay) if lay else None)
    size = config.image_size or (origin.get("image_size") if config.data in (None, known) else None)
    how: dict[str, Any] = {"limit": config.limit, "download": config.download, "skip_broken": config.skip_broken}
    source = _load(name, where, "test", view_size, image_size=size, **how)
    return _first(source, QUICK_IMAGES) if config.tier == "quick" and config.limit is None else source


def _load(name: str, root: Path | None, split: str, view_size: int, **how: Any) -> Source:
    if view_size:
        return load_centred(view_size, name, root, split, rules=RULES, **how)
    return load_source(name, root, split, **how)


def _first(source: Source, count: int) -> Source:
    """The first images, or as many of every class where the first lack one."""
    if len(source.images) <= count:
        return source
    rows = np.arange(count)
    if len(np.unique(source.labels[rows])) < len(source.classes):
        rows = _spread(source.labels, count)
    images, labels = source.images[rows], source.labels[rows]
    return dataclasses.replace(source, images=images, labels=labels,
                               sha256=content_sha256(images, labels, source.classes))  # fmt: skip


def _spread(labels: np.ndarray, count: int) -> np.ndarray:
    """Rows whose classes take turns, each with its rows in order; classes in the order of their first row."""
    _, first, label = np.unique(labels, return_index=True, return_inverse=True)
    by_class = np.argsort(label, kind="stable")
    sizes = np.bincount(label)
    turn = np.empty_like(by_class)
    turn[by_class] = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.sort(np.lexsort((first[label], turn))[:count])


def load_training_split(test: Source | FileSource, target: Target, config: EvalConfig) -> Source | str:
    """The training images of the same data, or why they are not there."""
    same = config.data in (None, target.data)
    lay = target.origin.get("data_root") if same else None
    where = config.root or (Path(lay) if lay else None)
    size = config.image_size or (target.origin.get("image_size") if same else None)
    try:
        how: dict[str, Any] = {"image_size": size, "skip_broken": config.skip_broken}
        train = _load(test.name, where, "train", _view_size(target), **how)
    except DarhtError as error:
        return str(error)
    return train if train.images.shape[2:] == test.images.shape[2:] else "they have another size than the test images"


def load_teachers(target: Target, config: EvalConfig, device: torch.device) -> dict[str, nn.Module]:
    """The teachers by name, frozen: those that the cache was built from and those that were given.

    Raises:
        ConfigError: one is not there, or has other classes.
    """
    if config.teachers is None:
        return {}
    folders = {**target.origin.get("teachers", {}), **config.teachers}
    try:
        loaded = {name: load_teacher(Path(folder), device) for name, folder in folders.items()}
    except DarhtError as error:
        raise ConfigError(f"{error}; give --teacher NAME=FOLDER, or --no-transfer") from error
    C = target.num_classes
    others = [f"'{name}' has {card.num_classes}" for name, (_, card) in loaded.items() if card.num_classes != C]
    if others:
        raise ConfigError(f"the student has {C} classes, teacher {', '.join(others)}: they cannot transfer")
    for name, (_, card) in loaded.items():
        check_class_names(card.classes, target.classes, f"teacher '{name}'", target.name)
    return {name: teacher for name, (teacher, _) in loaded.items()}


def load_surrogates(config: EvalConfig, classes: int, device: torch.device) -> dict[str, nn.Module]:
    """The independently trained models by name.

    Raises:
        ConfigError: one has other classes.
        ModelError, CacheError: one cannot be loaded; a file of weights does not say what builds it.
    """
    loaded: dict[str, nn.Module] = {}
    for text in config.surrogates:
        model = load(text, ModelOptions(), device, classes=classes)
        if model.num_classes != classes:
            raise ConfigError(f"--surrogate {text} has {model.num_classes} classes, the data has {classes}")
        loaded[model.name if model.name not in loaded else f"{model.name} {len(loaded)}"] = model.model
    return loaded
