"""Measure a teacher and note the figures in its card."""

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from darht.cache.source import Source
from darht.cache.teachers import Teacher, read_card, write_card
from darht.core.errors import ConfigError
from darht.trainer.evaluate import Score, evaluate, quick_attacks
from darht.trainer.train import check_pixels


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


def check_teacher(folder: Path, model: Teacher, source: Source, *, eps: float, device: torch.device) -> TeacherCheck:
    """Clean and PGD-20 accuracy on a split, written into the card of `folder`; the forward speed is only returned.

    Raises:
        ConfigError: eps is not in pixel levels, or teacher and data differ in their class counts.
        ModelError: the teacher does not take images of this size.
    """
    card, attacks = read_card(folder), {"pgd-20": quick_attacks(eps, {})["pgd-20"]}
    if card.num_classes != len(source.classes):
        raise ConfigError(f"{folder} has {card.num_classes} classes, {source.name} has {len(source.classes)}")
    check_pixels(model, torch.from_numpy(source.images[:1]).to(device), card.arch)
    clean, _, worst = evaluate(model, source, attacks, device=device)
    key = f"{source.name} {source.split}"
    measured = {
        "rows": clean.count,
        "clean": round(clean.accuracy, 2),
        "pgd-20": round(worst.accuracy, 2),
        "eps": eps,
        "sha256": source.sha256,
    }
    write_card(folder, dataclasses.replace(card, accuracy={**card.accuracy, key: measured}))
    parameters = sum(p.numel() for p in model.parameters())
    return TeacherCheck(clean, worst, parameters, forward_speed(model, source, device))


@torch.no_grad()
def forward_speed(model: Teacher, source: Source, device: torch.device, repeats: int = 3) -> float:
    """Images per second of a forward pass, the best of some repeats after a warm-up."""
    x = torch.from_numpy(source.images[:250]).to(device).float() / 255
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        model(x).sum().item()
        times.append(time.perf_counter() - start)
    return len(x) / min(times[1:])
