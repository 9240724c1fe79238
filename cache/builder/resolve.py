"""From the YAML of a cache to its spec: paths become hashes, and everything is checked against what is there."""

import dataclasses
import itertools

from darht.cache.builder.config import CacheConfig, DataConfig, ViewConfig, attack_spec
from darht.cache.builder.teachers import Card
from darht.cache.format.images import decoder_identity
from darht.cache.format.mixture import SourceSpec
from darht.cache.format.spec import (
    PIXEL_RULES,
    RULES,
    CacheSpec,
    DataSpec,
    JacobianSpec,
    TeacherSpec,
    ViewSpec,
    needed_version,
)
from darht.cache.format.views import check_padding, check_size
from darht.cache.sources.encoded import EncodedImages
from darht.cache.sources.load import OF_FILES, FileSource, Source
from darht.cache.sources.mixture import MixedSource
from darht.core.class_names import check_class_names
from darht.core.errors import ConfigError

_JACOBIAN_CLASSES = 10  # 30 kB a row and teacher on CIFAR; beyond the strongest ten logits hardly move softmax


def resolve(
    config: CacheConfig, source: Source | FileSource, cards: dict[str, Card], views: int, rules: int = RULES
) -> CacheSpec:
    """Replace paths by content: the spec that the cache is identified by.

    Args:
        config: as read by `load_config`.
        source: the images.
        cards: of every teacher in the config.
        views: V, how many views the config enumerates.
        rules: under which `source` was read; see `DataSpec`.

    Raises:
        ConfigError: a teacher with another class count or other class names than the data, an attack on more views than
            there are, or views that lie outside of the images.
    """
    C = len(source.classes)
    problems = [
        f"teacher '{name}' has {card.num_classes} classes, the data has {C}"
        for name, card in cards.items()
        if card.num_classes != C
    ]
    attacks = {name: attack_spec(name, raw, tuple(config.teachers)) for name, raw in config.attacks.items()}
    problems += [
        f"attack '{name}' asks for {attack.views} views, the cache has {views}"
        for name, attack in attacks.items()
        if attack.views > views
    ]
    problems += [
        f"data[{number}].views is {source.views}, the cache has {views}"
        for number, source in enumerate(config.sources)
        if (source.views or 1) > views
    ]
    problems += _jacobian_problems(config, C)
    if config.views.kind == "crop-flip":
        check_padding(config.views.padding, source.images.shape[1:])
    if config.views.size is not None:
        check_size(config.views.size, _largest(source))
    problems += _image_problems(config, source)
    if problems:
        raise ConfigError("; ".join(problems))
    for name, card in cards.items():
        check_class_names(card.classes, source.classes, f"teacher '{name}'", "the data")
    data, shown = _data_spec(config, source, rules, views), _view_spec(config.views, views)
    return CacheSpec(
        data=data,
        views=shown,
        teachers={name: teacher_spec(cards[name], teacher.role) for name, teacher in config.teachers.items()},
        attacks=attacks,
        jacobians={
            name: JacobianSpec(jacobian.classes or min(C, _JACOBIAN_CLASSES))
            for name, jacobian in config.jacobians.items()
        },
        store=config.store,
        precision=config.precision,
        seed=config.seed,
        format_version=needed_version(data, shown, config.store),
    )


def _largest(source: Source | FileSource) -> tuple[int, ...]:
    """`[3, H, W]` of the images, or where they differ of the one with the longest shorter side."""
    if not isinstance(source.images, EncodedImages) or len(source.images.shape) > 2:
        return source.images.shape[1:]
    sizes = source.images.sizes(slice(None))
    return 3, *sizes[sizes.min(1).argmax()].tolist()


def _image_problems(config: CacheConfig, source: Source | FileSource) -> list[str]:
    if config.store.images != "jpeg":
        return []
    keeps = "store.images: jpeg keeps the bytes of image files"
    if isinstance(source, MixedSource) or not isinstance(source.images, EncodedImages):
        name = "a list of sources" if isinstance(source, MixedSource) else source.name
        return [f"{keeps}, and {name} has none; use png"]
    if config.sources[0].image_size is not None:
        return [
            f"{keeps}, and data.image_size resizes them; use png, or leave image_size out: resized-crop takes images "
            "of any size"
        ]
    return []


def _jacobian_problems(config: CacheConfig, classes: int) -> list[str]:
    names = ", ".join(config.teachers)
    return [
        f"jacobians names teacher '{name}', which is not there; teachers are {names}"
        for name in config.jacobians
        if name not in config.teachers
    ] + [
        f"jacobians of '{name}' asks for {wanted.classes} classes, there are {classes}"
        for name, wanted in config.jacobians.items()
        if (wanted.classes or 1) > classes
    ]


def _view_spec(config: ViewConfig, count: int) -> ViewSpec:
    """Settings without effect are not part of the identity: those of crops when there are none."""
    if config.kind == "identity":
        return ViewSpec(kind="identity", padding=0, flip=False, count=count)
    if config.size is not None:
        return ViewSpec(config.kind, 0, config.flip, count, config.size, config.scale or (), config.ratio or ())
    return ViewSpec(kind=config.kind, padding=config.padding, flip=config.flip, count=count)


def _data_spec(config: CacheConfig, source: Source | FileSource, asked_rules: int, views: int) -> DataSpec:
    """Rules are named where they say something: of image files, and of rows that are held out."""
    parts = source.parts if isinstance(source, MixedSource) else (source,)
    of_files = any(part.name in OF_FILES for part in parts)
    rules = asked_rules if of_files else min(asked_rules, PIXEL_RULES)
    return DataSpec(
        source=source.name,
        split=source.split,
        rows=len(source.images),
        image_shape=source.images.shape[1:],
        classes=source.classes,
        sha256=source.sha256,
        holdout=config.sources[0].holdout,
        rules=rules if any(one.holdout for one in config.sources) or of_files else 1,
        skipped=len(source.skipped),
        decoder=decoder_identity() if config.store.images == "jpeg" else "",
        sources=tuple(map(_source_spec, config.sources, parts, itertools.repeat(views))) if len(parts) > 1 else (),
    )


def _source_spec(config: DataConfig, source: Source | FileSource, views: int) -> SourceSpec:
    labelled = config.labels == "given"
    return SourceSpec(
        source=source.name,
        split=source.split,
        rows=len(source.images),
        sha256=source.sha256,
        labelled=labelled,
        share=config.share,
        holdout=config.holdout if labelled else 0.0,
        views=config.views or views,
        skipped=len(source.skipped),
    )


def teacher_spec(card: Card, role: str) -> TeacherSpec:
    """What a spec holds of a teacher's card."""
    names = [f.name for f in dataclasses.fields(TeacherSpec) if f.name != "role"]
    return TeacherSpec(**{name: getattr(card, name) for name in names}, role=role)
