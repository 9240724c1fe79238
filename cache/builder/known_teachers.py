"""The teachers of a cache that is there already: where their folders lie, and whether they are still the same."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from darht.cache.builder.resolve import teacher_spec
from darht.cache.builder.teachers import load_teacher
from darht.cache.format.spec import CacheSpec
from darht.core.class_names import check_class_names
from darht.core.config import spec_diff, to_plain
from darht.core.errors import ConfigError, ModelError
from darht.core.nets.classifier import Classifier


def teacher_folders(spec: CacheSpec, origin: Mapping[str, Any], given: Mapping[str, Path]) -> dict[str, Path]:
    """Folders by teacher: those that are `given`, and else where they lay when the cache was built, as far as known.

    Args:
        spec: of the cache.
        origin: what the cache says about where it was built; an export says nothing.
        given: folders that take the place of these.

    Raises:
        ConfigError: a teacher that the cache does not have.
    """
    unknown = [f"'{name}'" for name in given if name not in spec.teachers]
    if unknown:
        raise ConfigError(f"the cache has no teacher {', '.join(unknown)}; it has {', '.join(spec.teachers)}")
    known = {name: Path(folder) for name, folder in origin.get("teachers", {}).items()} | dict(given)
    return {name: known[name] for name in spec.teachers if name in known}


def load_known_teacher(name: str, folder: Path, spec: CacheSpec, device: torch.device) -> Classifier:
    """The teacher `name` of a cache, frozen, in eval mode.

    Raises:
        ModelError: the folder holds no teacher, or another one than the cache was built with.
        ConfigError: it names the classes otherwise than the cache.
    """
    expected = spec.teachers[name]
    teacher, card = load_teacher(folder, device)
    differences = spec_diff(to_plain(expected), to_plain(teacher_spec(card, expected.role)))
    if differences:
        raise ModelError(
            f"{folder} is not teacher '{name}' of the cache: {'; '.join(differences)}; give --teacher {name}=FOLDER"
        )
    check_class_names(card.classes, spec.data.classes, str(folder), "the cache")
    return teacher
