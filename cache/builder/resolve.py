"""From the YAML of a cache to its spec: paths become hashes, and everything is checked against what is there."""

import dataclasses

from darht.cache.builder.config import CacheConfig, ViewConfig, attack_spec
from darht.cache.builder.teachers import Card
from darht.cache.format.images import decoder_identity
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
from darht.cache.sources.load import OF_FILES, FileSource, Source
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
    shown = _view_spec(config.views, views)
    return CacheSpec(
        data=_data_spec(config, source, rules),
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
        format_version=needed_version(shown, config.store),
    )


def _largest(source: Source | FileSource) -> tuple[int, ...]:
    """`[3, H, W]` of the images, or where they differ of the one with the longest shorter side."""
    if isinstance(source, Source) or len(source.images.shape) > 2:
        return source.images.shape[1:]
    sizes = source.images.sizes(slice(None))
    return 3, *sizes[sizes.min(1).argmax()].tolist()


def _image_problems(config: CacheConfig, source: Source | FileSource) -> list[str]:
    if config.store.images != "jpeg":
        return []
    keeps = "store.images: jpeg keeps the bytes of image files"
    if not isinstance(source, FileSource):
        return [f"{keeps}, and {source.name} has none; use png"]
    if config.data.image_size is not None:
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


def _data_spec(config: CacheConfig, source: Source | FileSource, rules: int) -> DataSpec:
    """Rules are named where they say something: of image files, and of rows that are held out."""
    rules = rules if source.name in OF_FILES else min(rules, PIXEL_RULES)
    return DataSpec(
        source=source.name,
        split=source.split,
        rows=len(source.images),
        image_shape=source.images.shape[1:],
        classes=source.classes,
        sha256=source.sha256,
        holdout=config.data.holdout,
        rules=rules if config.data.holdout or source.name in OF_FILES else 1,
        skipped=len(source.skipped),
        decoder=decoder_identity() if config.store.images == "jpeg" else "",
    )


def teacher_spec(card: Card, role: str) -> TeacherSpec:
    """What a spec holds of a teacher's card."""
    names = [f.name for f in dataclasses.fields(TeacherSpec) if f.name != "role"]
    return TeacherSpec(**{name: getattr(card, name) for name in names}, role=role)
