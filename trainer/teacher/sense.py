"""Whether one teacher makes sense: asked where it is imported, and before it is measured."""

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

import torch

from darht.attacks import Threat
from darht.cache.builder.probe import (
    TeacherProbe,
    probe_steadiness,
    probe_teacher,
    steadiness_problems,
    steadiness_warning,
)
from darht.cache.builder.sense import check_allowed, refuse, tell_probe
from darht.cache.builder.teachers import (
    CARD,
    SIZES,
    WEIGHTS,
    is_teacher_folder,
    load_teacher,
    read_card,
    write_card,
)
from darht.cache.sources.load import FileSource, Source
from darht.core.class_names import check_class_names
from darht.core.errors import ConfigError, DarhtError, ModelError
from darht.core.nets import check_pixels
from darht.core.nets.classifier import Classifier
from darht.trainer.evaluation.attacks.suite import pgd_20

OnLine = Callable[[str], None]


def check_sense(
    folder: Path,
    model: Classifier,
    source: Source | FileSource,
    *,
    eps: float = 8.0,
    device: torch.device,
    allow: Collection[str] = (),
    on_line: OnLine,
) -> TeacherProbe:
    """Ask a teacher some images, say what came out, and refuse one that makes no sense.

    A card without class names gets those of the data, whose order its answers then have shown.

    Args:
        folder: of the teacher; the folder's name is the teacher's.
        model: the teacher, on `device`.
        source: the images.
        eps: radius of the attack, in pixel levels.
        device: where to ask.
        allow: teachers to take as they are.
        on_line: told the figures.

    Raises:
        ConfigError: class counts or names differ from the data's, or `allow` names another teacher.
        ModelError: see `darht.cache.builder.sense.check_teachers`.
    """
    card, name = read_card(folder), folder.resolve().name
    check_allowed(allow, [name])
    if card.num_classes != len(source.classes):
        raise ConfigError(f"{folder} has {card.num_classes} classes, {source.name} has {len(source.classes)}")
    check_class_names(card.classes, source.classes, str(folder), source.name)
    image = torch.from_numpy(source.images[:1]).to(device)
    check_pixels(model, image, card.arch, num_classes=card.num_classes)
    probe = probe_teacher(model, source, attack=pgd_20(Threat(eps=eps)), device=device)
    tell_probe(name, probe, on_line)
    refuse({name: probe}, source.classes, allow)
    if not card.classes and is_teacher_folder(folder) and not probe.problems(source.classes):
        write_card(folder, replace(card, classes=source.classes))
    return probe


def check_import(
    folder: Path, source: Source | FileSource | None, *, allow: Collection[str] = (), on_line: OnLine
) -> None:
    """Ask a teacher that was just imported; the folder of one that is refused is emptied.

    Without images it is asked about noise: only whether its answers depend on batch, order, time or chance.

    Raises:
        ConfigError, ModelError: see `check_sense`.
    """
    cpu = torch.device("cpu")
    try:
        model, _ = load_teacher(folder, cpu)
        if source is not None:
            check_sense(folder, model, source, device=cpu, allow=allow, on_line=on_line)
        elif (name := folder.resolve().name) not in allow:
            batch, again = probe_steadiness(model, _size(model))
            problems = steadiness_problems(batch, again)
            if problems:
                raise ModelError(f"teacher '{name}': {problems[0]}. To take it as it is: --allow {name}")
            if warning := steadiness_warning(batch):
                on_line(warning)
    except DarhtError:
        (folder / CARD).unlink(missing_ok=True)
        (folder / WEIGHTS).unlink(missing_ok=True)
        raise


def _size(model: Classifier) -> int:
    """Side in pixels of images that the network takes: its own, or the first usual one."""
    for size in SIZES if model.preprocess.resize is None else (model.preprocess.resize,):
        try:
            check_pixels(model, torch.zeros((1, 3, size, size), dtype=torch.uint8), "the network")
        except ModelError:
            continue
        return size
    raise ModelError("the network takes no images of a usual size: give --resize")
