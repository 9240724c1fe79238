"""What a run leaves behind, and what it may be gone on with."""

import csv
import json

import pytest
import torch

from darht.core.config import canonical_json
from darht.core.errors import CacheError, ModelError, SpecMismatchError
from darht.core.preprocessing import Preprocessing
from darht.core.tensors import save_tensors
from darht.trainer.config import OptimConfig
from darht.trainer.schedule import make_optimizer
from darht.trainer.state.checkpoint import (
    CHECKPOINT,
    CONFIG,
    RUN,
    WEIGHTS,
    Progress,
    StudentCard,
    claim_run,
    load_checkpoint,
    load_student,
    read_run,
    save_student,
    write_log,
    write_run,
)
from darht.trainer.student.model import Student

CPU = torch.device("cpu")
KWARGS = {"width": 4, "blocks": [1, 1, 1, 1]}
PREPROCESSING = Preprocessing(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
IDENTITY = {"recipe": {"recipe": "darht", "phases": (0.2, 0.5), "seed": 0}, "cache_root_hash": "aa", "darht": "0.1.0"}


def make_student(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Student("resnet18", KWARGS, teachers=2, num_classes=5, preprocessing=PREPROCESSING)


def make_card(**changes):
    values = {
        "arch": "resnet18",
        "kwargs": KWARGS,
        "teachers": ("cnn", "vit"),
        "num_classes": 5,
        "preprocessing": PREPROCESSING,
        "classes": tuple("abcde"),
        "cache_root_hash": "aa",
        "recipe": {"recipe": "darht"},
        "epoch": 3,
        "selection": {"holdout_pgd": 12.5},
    }
    return StudentCard(**{**values, **changes})


def test_a_saved_student_comes_back(tmp_path):
    student, card = make_student(), make_card()
    save_student(tmp_path, student, card)
    random = torch.get_rng_state()
    loaded, found = load_student(tmp_path, CPU)
    assert torch.equal(torch.get_rng_state(), random)
    assert found == card
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    x = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected, found = student.eval()(x), loaded(x)
    assert torch.equal(expected.logits, found.logits)
    assert torch.equal(expected.feature_map, found.feature_map)
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, WEIGHTS]


def test_a_folder_without_a_student(tmp_path):
    with pytest.raises(ModelError, match=r"holds no student: .*config\.json is missing; darht-train --out RUN makes"):
        load_student(tmp_path, CPU)


@pytest.mark.parametrize("text", ["{", '{"arch": "resnet18"}', '{"archh": 1}'])
def test_a_broken_card(tmp_path, text):
    save_student(tmp_path, make_student(), make_card())
    (tmp_path / CONFIG).write_text(text)
    with pytest.raises(ModelError, match=r"config\.json is not a student's card"):
        load_student(tmp_path, CPU)


def test_weights_that_are_missing_or_do_not_fit(tmp_path):
    save_student(tmp_path, make_student(), make_card(teachers=("cnn",)))
    with pytest.raises(ModelError, match=r"of another shape: map\.weight is \(10, 32\), the network has \(5, 32\)"):
        load_student(tmp_path, CPU)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(ModelError, match=r"model.safetensors is missing"):
        load_student(tmp_path, CPU)


def test_a_new_or_empty_folder_may_be_claimed(tmp_path):
    claim_run(tmp_path, IDENTITY, resume=False)
    claim_run(tmp_path / "new", IDENTITY, resume=True)
    assert not (tmp_path / "new").exists()


def test_a_folder_that_holds_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CacheError, match="is not empty and holds no run"):
        claim_run(tmp_path, IDENTITY, resume=True)
    with pytest.raises(CacheError, match="is a file: choose a new or empty --out folder"):
        claim_run(tmp_path / "notes.txt", IDENTITY, resume=False)


def test_the_same_run_needs_resume(tmp_path):
    write_run(tmp_path, IDENTITY, {"cache": "/somewhere"})
    with pytest.raises(CacheError, match="holds a run of this recipe already: add --resume"):
        claim_run(tmp_path, IDENTITY, resume=False)
    claim_run(tmp_path, IDENTITY, resume=True)


@pytest.mark.parametrize("resume", [True, False])
def test_another_run_is_refused_with_the_differing_fields(tmp_path, resume):
    write_run(tmp_path, IDENTITY, {})
    other = {**IDENTITY, "recipe": {**IDENTITY["recipe"], "seed": 1}, "cache_root_hash": "bb"}
    with pytest.raises(SpecMismatchError) as caught:
        claim_run(tmp_path, other, resume=resume)
    for part in ("recipe.seed: 0 -> 1", 'cache_root_hash: "aa" -> "bb"', "choose another --out folder"):
        assert part in str(caught.value)


def test_run_json_is_read_back(tmp_path):
    write_run(tmp_path, IDENTITY, {"cache": "/somewhere"})
    found = read_run(tmp_path)
    assert found["cache"] == "/somewhere"
    assert found["identity"]["recipe"]["phases"] == [0.2, 0.5]
    (tmp_path / RUN).unlink()
    with pytest.raises(CacheError, match=r"is not a run: .*run\.json is missing; darht-train --shards CACHE --out DIR"):
        read_run(tmp_path)


def test_a_checkpoint_restores_weights_momentum_and_progress(tmp_path):
    student, config = make_student(), OptimConfig()
    optimizer = make_optimizer(student, config)
    student(torch.rand(4, 3, 8, 8)).logits.sum().backward()
    optimizer.step()
    progress = Progress(
        epoch=2, history=[{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": 0.25}], best=40.0, collapses=1
    )
    more = {"memory": {"seen": torch.tensor([True, False])}, "learned": {}}
    plain = json.loads(canonical_json(IDENTITY))
    own = {"student": student.state_dict(), "optimizer": optimizer.state_dict(), "progress": vars(progress)}
    save_tensors(tmp_path / CHECKPOINT, own | more | {"identity": plain})

    other = make_student(seed=1)
    fresh = make_optimizer(other, config)
    with pytest.raises(SpecMismatchError, match=r"belongs to another run: recipe.seed: 0 -> 1; remove it"):
        load_checkpoint(tmp_path / CHECKPOINT, other, fresh, IDENTITY | {"recipe": IDENTITY["recipe"] | {"seed": 1}})
    found, rest = load_checkpoint(tmp_path / CHECKPOINT, other, fresh, IDENTITY)
    assert found == progress
    assert rest.keys() == more.keys() and rest["learned"] == {}
    assert rest["memory"]["seen"].tolist() == [True, False]
    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in student.state_dict().items())
    buffers = zip(optimizer.state_dict()["state"].items(), fresh.state_dict()["state"].items(), strict=True)
    assert all(torch.equal(a["momentum_buffer"], b["momentum_buffer"]) for (_, a), (_, b) in buffers)


def test_no_checkpoint_means_the_first_epoch(tmp_path):
    student = make_student()
    optimizer = make_optimizer(student, OptimConfig())
    assert load_checkpoint(tmp_path / CHECKPOINT, student, optimizer, IDENTITY) == (Progress(), {})
    assert not (tmp_path / CHECKPOINT).exists()


def test_the_log_is_written_as_lines_of_json_and_as_a_table(tmp_path):
    history = [{"epoch": 1, "loss": 0.5, "lr": 0.1}, {"epoch": 2, "loss": 0.25, "lr": 0.01}]
    write_log(tmp_path, history)
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == history
    with (tmp_path / "log.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == [{key: str(value) for key, value in row.items()} for row in history]


def test_the_table_has_a_column_for_whatever_any_epoch_tells(tmp_path):
    write_log(tmp_path, [{"epoch": 1, "loss": 0.5, "train_clean": None}, {"epoch": 2, "loss": 0.25, "note": "back"}])
    assert (tmp_path / "log.csv").read_text().splitlines() == ["epoch,loss,train_clean,note", "1,0.5,,", "2,0.25,,back"]
