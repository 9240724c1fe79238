"""Measure teachers: one by one, with the figures noted in its card, and against each other."""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from darht.attacks import ATTACKS, Threat, parse_eps
from darht.attacks.engine.engine import FULL
from darht.attacks.transfer import TransferMatrix, transfer_matrix
from darht.cache.builder.teachers import is_teacher_folder, load_teacher, read_card, write_card
from darht.cache.sources.load import FileSource, Source
from darht.core.class_names import check_class_names
from darht.core.errors import ConfigError
from darht.core.nets import check_pixels
from darht.core.nets.classifier import Classifier
from darht.trainer.evaluation.attacks.suite import pgd_20, white_box
from darht.trainer.evaluation.measure import EvalSetup, begin
from darht.trainer.evaluation.score import EVERYONE, Score


@dataclass(frozen=True)
class TeacherCheck:
    """What was measured.

    Attributes:
        clean: on the images as they are.
        robust: right on the clean image and under PGD-20.
        parameters: how many weights.
        images_per_second: of a forward pass in batches of 250.
    """

    clean: Score
    robust: Score
    parameters: int
    images_per_second: float


def check_teacher(
    folder: Path, model: Classifier, source: Source | FileSource, *, eps: float, device: torch.device
) -> TeacherCheck:
    """Clean and PGD-20 accuracy on a split, written into the card of `folder` where it has one, and forward speed.

    Raises:
        ConfigError: eps is not in pixel levels, or teacher and data differ in their class counts or names.
        ModelError: the teacher does not take images of this size.
    """
    card, attack = read_card(folder), pgd_20(Threat(eps=eps))
    if card.num_classes != len(source.classes):
        raise ConfigError(f"{folder} has {card.num_classes} classes, {source.name} has {len(source.classes)}")
    check_class_names(card.classes, source.classes, str(folder), source.name)
    check_pixels(model, torch.from_numpy(source.images[:1]).to(device), card.arch)
    m = begin(EvalSetup(model=model, source=source, threat=attack.threat, device=device))
    m.ask(white_box(m, "pgd-20", attack, engine=FULL), m.correct, on=EVERYONE)
    clean, worst = m.scores[0], m.finish()
    key = f"{source.name} {source.split}"
    measured = {
        "rows": clean.count,
        "clean": round(clean.accuracy, 2),
        "pgd-20": round(worst.accuracy, 2),
        "eps": eps,
        "sha256": source.sha256,
    }
    if is_teacher_folder(folder):  # a run is only measured: its files say what trained it
        write_card(folder, dataclasses.replace(card, accuracy={**card.accuracy, key: measured}))
    parameters = sum(p.numel() for p in model.parameters())
    return TeacherCheck(clean, worst, parameters, forward_speed(model, source, device))


@torch.no_grad()
def forward_speed(model: Classifier, source: Source | FileSource, device: torch.device, repeats: int = 3) -> float:
    """Images per second of a forward pass, the best of some repeats after a warm-up."""
    x = torch.from_numpy(source.images[:250]).to(device).float() / 255
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        model(x).sum().item()
        times.append(time.perf_counter() - start)
    return len(x) / min(times[1:])


def transfer_between(
    folders: Sequence[Path],
    source: Source,
    *,
    kinds: Sequence[str],
    eps: str,
    count: int,
    seed: int,
    device: torch.device,
) -> TransferMatrix:
    """The transferability matrix of teacher folders, named by the folders' names.

    Args:
        folders: of the teachers.
        source: where the images are chosen from.
        kinds: attacks by their kind, with their own defaults; a target must withstand all of them.
        eps: the radius as a person writes it: 8 or 8/255.
        count: images for each pair.
        seed: of the attacks.
        device: where to compute.

    Raises:
        ConfigError: two folders of one name, an unknown attack, or class counts or names that differ.
        ModelError: a folder holds no teacher that fits.
    """
    names, radius = [folder.name for folder in folders], parse_eps(eps)
    problems = [f"two teachers are called '{name}'" for name in sorted({n for n in names if names.count(n) > 1})]
    problems += [f"unknown attack '{kind}'; known are {', '.join(ATTACKS)}" for kind in kinds if kind not in ATTACKS]
    loaded = {folder.name: load_teacher(folder, device) for folder in folders}
    C = len(source.classes)
    problems += [
        f"'{n}' has {card.num_classes} classes, the data has {C}"
        for n, (_, card) in loaded.items()
        if card.num_classes != C
    ]
    if problems:
        raise ConfigError("; ".join(problems))
    for folder in folders:
        check_class_names(loaded[folder.name][1].classes, source.classes, str(folder), source.name)
    x, y = torch.from_numpy(source.images), torch.from_numpy(source.labels).to(device)
    models = {name: model for name, (model, _) in loaded.items()}
    attacks = [ATTACKS[kind](eps=radius) for kind in kinds]
    return transfer_matrix(models, x, y, attacks=attacks, count=count, seed=seed)
