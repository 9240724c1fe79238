"""The networks behind a cache: found where they lie, checked by their weights, or left out with the reason."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from darht.attacks import PGD
from darht.cache.read.reader import Cache, open_cache
from darht.core.errors import ConfigError, DataError, ModelError
from darht.core.preprocessing import Preprocessing
from darht.tools import gaas, live
from darht.trainer.state.checkpoint import StudentCard, save_student
from darht.trainer.student.model import Student

CPU = torch.device("cpu")


@pytest.fixture
def run(tiny_cache: Path, tmp_path: Path) -> Path:
    """A run with an untrained student."""
    cache = open_cache(tiny_cache)
    kwargs = {"width": 4, "blocks": [1, 1, 1, 1]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        student = Student("resnet18", kwargs, teachers=2, num_classes=10, preprocessing=Preprocessing())
    card = StudentCard("resnet18", kwargs, ("cnn", "vit"), 10, Preprocessing(), cache.spec.data.classes, "", {}, 1)
    save_student(tmp_path / "run" / "student", student, card)
    return tmp_path / "run"


def test_teachers_answer_as_the_cache_says(tiny_cache: Path) -> None:
    cache = open_cache(tiny_cache)
    loaded = live.load_teachers(cache, {}, CPU)
    assert set(loaded.teachers) == {"cnn", "vit"} and loaded.missing == {}
    logits = live.ask(loaded.teachers["cnn"], cache.read("image")[:20])
    assert logits == pytest.approx(cache.read("logits/cnn/clean")[:20, 0].astype(np.float32), abs=2e-3)


def test_moved_teachers_are_left_out_and_wrong_ones_refused(
    tiny_cache: Path, tiny_teachers: dict[str, Path], tmp_path: Path
) -> None:
    copy = tmp_path / "cache"
    shutil.copytree(tiny_cache, copy)
    (copy / "origin.json").write_text(json.dumps({"data_root": None, "teachers": {"cnn": "../nowhere"}}))
    loaded = live.load_teachers(open_cache(copy), {}, CPU)
    assert loaded.teachers == {} and "not noted" in loaded.missing["vit"] and "nowhere" in loaded.missing["cnn"]
    given = live.load_teachers(open_cache(copy), {"cnn": tiny_teachers["cnn"]}, CPU)
    assert set(given.teachers) == {"cnn"}
    with pytest.raises(ModelError, match="is not teacher 'cnn' of the cache"):
        live.load_teachers(open_cache(copy), {"cnn": tiny_teachers["vit"]}, CPU)
    with pytest.raises(ConfigError, match="the cache has no teacher 'bit'; it has cnn, vit"):
        live.load_teachers(open_cache(copy), {"bit": tmp_path}, CPU)


def test_a_student_is_found_in_its_run_and_its_features_have_a_size(tiny_cache: Path, run: Path) -> None:
    cache = open_cache(tiny_cache)
    assert live.find_student(run) == live.find_student(run / "student") == run / "student"
    student = live.student_of(run, cache, CPU)
    dim, features = live.student_features(student, cache.spec.data.image_shape)
    images = cache.read("image")[:3]
    x = torch.from_numpy(images).float() / 255
    assert features(images).shape == (3, dim)
    assert features(images) == pytest.approx(student.backbone(student.preprocess(x)).numpy(), abs=1e-5)
    assert len(live.student_hash(run)) == 64
    with pytest.raises(ModelError, match="holds no student"):
        live.find_student(run.parent)


def test_a_student_of_other_classes_is_refused(run: Path, planted: Cache) -> None:
    with pytest.raises(ModelError, match="10 classes that are not those of"):
        live.student_of(run, planted, CPU)


def test_the_students_examples_are_counted_where_both_are_right(tiny_cache: Path, run: Path) -> None:
    cache = open_cache(tiny_cache)
    student, teachers = live.student_of(run, cache, CPU), live.load_teachers(cache, {}, CPU).teachers
    found = live.student_transfer(cache, student, teachers, count=40)
    assert found == live.student_transfer(cache, student, teachers, count=40)
    assert set(found) == {"cnn", "vit"} and all(0 <= fooled <= both <= 40 for fooled, both in found.values())


def test_the_test_split_or_why_not(tiny_cache: Path, planted: Cache, tmp_path: Path) -> None:
    source, why = live.open_test(open_cache(tiny_cache), None)
    assert source is not None and source.images.shape == (359, 3, 8, 8) and why == ""
    source, why = live.open_test(planted, None)
    assert source is None and "npz" in why
    with pytest.raises(DataError):
        live.open_test(planted, tmp_path / "nowhere.npz")


def test_images_go_to_where_the_networks_are(tiny_cache: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On torch's `meta` device, which has no numbers, mixing with the CPU fails; what is fetched is made up."""
    fetched = []

    def fetch(tensor: torch.Tensor) -> torch.Tensor:
        fetched.append(tensor.device.type)
        return torch.ones(tensor.shape, dtype=tensor.dtype)

    meta, cache = torch.device("meta"), open_cache(tiny_cache)
    student, teachers = live.student_of(run, cache, CPU).to(meta), live.load_teachers(cache, {}, CPU).teachers
    images, loaded = cache.read("image")[:3], {name: teacher.to(meta) for name, teacher in teachers.items()}
    monkeypatch.setattr(torch.Tensor, "cpu", fetch)
    for module in (live, gaas):  # it asks whether the logits are finite
        monkeypatch.setattr(module, "forward_all", lambda models, x, batch: models[0](x))
    monkeypatch.setattr(PGD, "__call__", lambda attack, net, x, y, *, generator: net(x).sum() * x + generator.rows[0])
    assert live.ask(loaded["cnn"], images).shape == (3, 10)
    assert live.craft(cache, "pgd-cnn", loaded["cnn"], images[0], 3).shape == (1, 3, 8, 8)
    assert live.student_features(student, images.shape[1:])[1](images).shape[0] == 3
    assert live.student_transfer(cache, student, loaded, count=4) == {"cnn": (4, 4), "vit": (4, 4)}
    found = gaas.measure_gaas(cache, loaded, count=1)  # every answer is class 1, and a row of that class is right
    assert found.shared.shape == (2, 2, 1)
    assert set(fetched) == {"meta"}
