"""A teacher measured, and the figures noted in its card."""

import dataclasses

import numpy as np
import pytest
import torch

from darht.attacks import PGD
from darht.cache.builder.teachers import load_teacher, read_card
from darht.cache.sources.load import load_source
from darht.core.errors import ConfigError, ModelError
from darht.core.rng import RowRng
from darht.trainer.teacher.check import check_teacher, forward_speed

CPU = torch.device("cpu")


def test_accuracies_are_measured_and_noted_in_the_card(folder, digits):
    model, before = load_teacher(folder, CPU)
    result = check_teacher(folder, model, digits, eps=8, device=CPU)
    x, y = torch.from_numpy(digits.images).float() / 255, torch.from_numpy(digits.labels)
    x_adv = PGD(eps=8, step=2, steps=20)(model, x, y, generator=RowRng.create(0, "evaluate", rows=torch.arange(60)))
    with torch.no_grad():
        right = model(x).argmax(1) == y
        stands = right & (model(x_adv).argmax(1) == y)
    clean, worst = result.clean, result.robust
    assert (clean.correct, worst.correct, clean.count) == (int(right.sum()), int(stands.sum()), 60)
    assert result.robust.correct <= result.clean.correct
    assert result.parameters == sum(p.numel() for p in model.parameters())
    assert result.images_per_second > 0
    card = read_card(folder)
    assert card.accuracy == {
        "digits test": {
            "rows": 60,
            "clean": round(clean.accuracy, 2),
            "pgd-20": round(worst.accuracy, 2),
            "eps": 8,
            "sha256": digits.sha256,
        }
    }
    assert dataclasses.replace(card, accuracy={}) == before
    load_teacher(folder, CPU)  # the weights still are those of the card


def test_another_split_is_noted_beside_the_first(folder, digits):
    model, _ = load_teacher(folder, CPU)
    check_teacher(folder, model, digits, eps=8, device=CPU)
    check_teacher(folder, model, load_source("digits", None, "train", limit=40), eps=4, device=CPU)
    accuracy = read_card(folder).accuracy
    assert list(accuracy) == ["digits test", "digits train"]
    assert accuracy["digits train"]["eps"] == 4


def test_what_does_not_go_together_is_refused_and_the_card_left_alone(folder, digits, tiny_teachers):
    model, before = load_teacher(folder, CPU)
    more = dataclasses.replace(digits, classes=(*digits.classes, "ten"))
    with pytest.raises(ConfigError, match="has 10 classes, digits has 11"):
        check_teacher(folder, model, more, eps=8, device=CPU)
    with pytest.raises(ConfigError, match="write eps: 8"):
        check_teacher(folder, model, digits, eps=0.03, device=CPU)
    vit, _ = load_teacher(tiny_teachers["vit"], CPU)
    larger = dataclasses.replace(digits, images=np.zeros((60, 3, 12, 12), dtype=np.uint8))
    with pytest.raises(ModelError, match="does not take images of 12x12 pixels"):
        check_teacher(tiny_teachers["vit"], vit, larger, eps=8, device=CPU)
    assert read_card(folder) == before


def test_forward_speed_is_that_of_the_best_repeat(folder, digits, monkeypatch):
    ticks = iter([0.0, 9.0, 10.0, 12.0, 20.0, 21.0, 30.0, 35.0])
    monkeypatch.setattr("darht.trainer.teacher.check.time.perf_counter", lambda: next(ticks))
    model, _ = load_teacher(folder, CPU)
    assert forward_speed(model, digits, CPU) == 60 / 1.0
