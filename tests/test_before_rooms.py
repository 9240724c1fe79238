"""What was written before files moved is read as before: a cache, a teacher, and a run that goes on."""

import hashlib
import shutil
import tarfile
from pathlib import Path

import pytest
import torch

from darht.cache.admin.verify import verify
from darht.cache.builder.build import build, plan_build
from darht.cache.builder.seal import seal
from darht.cache.builder.teachers import load_teacher
from darht.cache.read.reader import open_cache
from darht.trainer.config import load_recipe
from darht.trainer.state.checkpoint import load_student
from darht.trainer.student.train import train

CPU = torch.device("cpu")
ROOT_HASH = "b37ffef63bca68d9065348ddbd3578bc7ef277ee8372ca221b6d480be326bdcf"
IMAGES = "229d79d7b5437ca0a95550da468b23e876249c37805de49a964575e06f904685"


@pytest.fixture
def before(tmp_path: Path) -> Path:
    """A cache of 48 digits, its teacher, and a `warm` run of it that was stopped after the first of two epochs."""
    with tarfile.open(Path(__file__).with_name("before_rooms.tar.xz")) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def test_the_cache_opens_and_verifies(before: Path):
    cache = open_cache(before / "cache")
    assert cache.root_hash == ROOT_HASH
    assert verify(before / "cache") == []
    images = cache.read("image")
    assert hashlib.sha256(images.tobytes()).hexdigest() == IMAGES


def test_a_build_computes_nothing_anew_and_repairs_to_the_same_root_hash(before: Path):
    plan = plan_build(before / "cache.yaml", device=CPU)
    assert build(plan, before / "cache", device=CPU, on_unit=lambda *_: None).computed == 0
    label = next((before / "cache/data.zarr/label").rglob("c/0"))
    label.unlink()
    assert build(plan, before / "cache", device=CPU, on_unit=lambda *_: None).computed == 1
    assert seal(before / "cache").root_hash == ROOT_HASH


def test_the_teacher_and_the_student_load(before: Path):
    assert load_teacher(before / "teacher", CPU)[1].arch == "resnet18"
    student, card = load_student(before / "run/student", CPU)
    assert card.cache_root_hash == ROOT_HASH and student.teachers == 1


def test_the_run_goes_on_and_ends(before: Path, tmp_path: Path):
    config, cache = load_recipe(before / "recipe.yaml", ()), open_cache(before / "cache")
    shutil.copytree(before / "run", before / "again")
    ended = [
        train(config, cache, before / name, device=CPU, resume=True) and load_student(before / name / "last", CPU)[0]
        for name in ("run", "again")
    ]
    states = [student.state_dict() for student in ended]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert len((before / "run/log.jsonl").read_text().splitlines()) == 2
