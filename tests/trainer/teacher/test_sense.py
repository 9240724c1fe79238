"""One teacher asked where it is imported, and before it is measured."""

import dataclasses

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from runs import CPU, write_student

from darht.cache.builder.teachers import load_teacher, read_card, write_card
from darht.core.errors import ConfigError
from darht.trainer.cli import teacher
from darht.trainer.evaluation.target import ModelOptions, check_classes, load
from darht.trainer.teacher.check import check_teacher, transfer_between
from darht.trainer.teacher.sense import check_import, check_sense


@pytest.fixture
def answered(folder, digits):
    """Images with the teacher's own answers as labels, of which it is right by definition."""
    model, _ = load_teacher(folder, CPU)
    with torch.no_grad():
        labels = model(torch.from_numpy(digits.images).float() / 255).argmax(1).numpy()
    names = tuple(f"class {c}" for c in range(10))
    return dataclasses.replace(digits, labels=labels.astype(np.int64), classes=names)


def refused(*words) -> str:
    result = CliRunner().invoke(teacher, [str(word) for word in words])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1, result.output
    return result.stderr


def test_the_commands_refuse_and_leave_nothing(folder, tmp_path):
    said = refused("check", folder, "--data", "digits", "--limit", 60, "--device", "cpu")
    assert "guessing among 10 classes" in said and "To take it as it is: --allow cnn" in said
    assert read_card(folder).accuracy == {}
    net = ("--arch", "resnet18", "--kwargs", '{"width": 4, "blocks": [1, 1, 1, 1]}', "--out", tmp_path / "new")
    weights = folder / "teacher.safetensors"
    assert "clean accuracy is" in refused("import", weights, *net, "--data", "digits")
    words = ("import", weights, *net, "--data", "digits", "--allow", "new")
    taken = CliRunner().invoke(teacher, [str(word) for word in words])
    assert taken.exit_code == 0 and "new: clean " in taken.stdout  # the folder of the refused one is free
    assert read_card(tmp_path / "new").classes == ()  # it has not shown their order


def test_a_card_keeps_the_names_whose_order_was_shown(folder, digits, answered):
    model, _ = load_teacher(folder, CPU)
    lines: list[str] = []
    check_sense(folder, model, answered, device=CPU, allow=("cnn",), on_line=lines.append)
    if len(set(answered.labels.tolist())) > 1:
        assert read_card(folder).classes == answered.classes
    assert lines[0].startswith("cnn: clean 100.0 % of 60 images")


def test_a_run_s_files_are_left_as_they_are(tmp_path, digits):
    run = tmp_path / "run"
    write_student(run / "student", 2)
    (run / "run.json").write_text("{}")
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    words = ["check", run, "--data", "digits", "--limit", 60, "--device", "cpu", "--allow", "run"]
    taken = CliRunner().invoke(teacher, [str(word) for word in words])
    assert taken.exit_code == 0 and "PGD-20" in taken.stdout, taken.output
    model, card = load_teacher(run, CPU)
    with torch.no_grad():
        labels = model(torch.from_numpy(digits.images).float() / 255).argmax(1).numpy()
    answered = dataclasses.replace(digits, labels=labels.astype(np.int64), classes=card.classes)
    check_sense(run, model, answered, device=CPU, allow=("run",), on_line=str)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == files


def test_names_are_compared_wherever_data_is_met(folder, answered):
    model, card = load_teacher(folder, CPU)
    write_card(folder, dataclasses.replace(card, classes=answered.classes[::-1]))
    message = "class 0 is 'class 9' in the first, 'class 0' in the second"
    with pytest.raises(ConfigError, match=message):
        check_sense(folder, model, answered, device=CPU, allow=("cnn",), on_line=print)
    with pytest.raises(ConfigError, match=message):
        check_teacher(folder, model, answered, eps=8, device=CPU)
    with pytest.raises(ConfigError, match=message):
        transfer_between([folder], answered, kinds=("fgsm",), eps="8", count=10, seed=0, device=CPU)
    target = load(str(folder), ModelOptions(), CPU)
    with pytest.raises(ConfigError, match=message):
        check_classes(target, target.model, torch.zeros(1, 3, 8, 8), answered.classes)


def test_splits_that_name_classes_in_another_order_are_not_trained_on(digits, tmp_path):
    names = np.array([f"c{k}" for k in range(10)])
    pixels = digits.images.transpose(0, 2, 3, 1)
    for split, classes in (("train", names), ("test", names[::-1])):
        np.savez(tmp_path / f"{split}.npz", images=pixels, labels=digits.labels, classes=classes)
    words = ("train", "--data", "npz", "--root", tmp_path, "--arch", "resnet18", "--out", tmp_path / "t")
    assert "the same classes in another order: class 0 is 'c0' in the first, 'c9'" in refused(*words, "--device", "cpu")


def test_an_import_without_images_is_asked_about_noise(folder):
    lines: list[str] = []
    check_import(folder, None, on_line=lines.append)
    assert lines == [] and read_card(folder).num_classes == 10


def test_an_import_that_depends_on_its_batch_or_on_chance_is_undone(tmp_path, monkeypatch):
    (tmp_path / "nets_that_vary.py").write_text(
        "import torch.nn.functional as F\nfrom torch import nn\n\n\nclass Net(nn.Module):\n"
        "    def __init__(self, batch):\n        super().__init__()\n        self.batch = batch\n"
        "        self.head = nn.Linear(3, 4)\n\n"
        "    def forward(self, x):\n        x = x[:, :, 0, 0] if self.batch else F.dropout(x[:, :, 0, 0])\n"
        "        return self.head(x - x.mean(0) if self.batch else x)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    out = tmp_path / "new"
    words = ("import", "--arch", "python:nets_that_vary:Net", "--classes", 4, "--out", out, "--kwargs")
    assert "alone or in another order than in a batch (by up to " in refused(*words, '{"batch": true}')
    assert "F.dropout needs training=self.training" in (said := refused(*words, '{"batch": false}'))
    assert "--allow new" in said and list(out.iterdir()) == []
