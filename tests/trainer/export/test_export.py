"""What is exported answers as the student does, in every form, and is loaded again by others' means."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from reseal import rewrite
from safetensors.torch import load_file

from darht.cache.read.reader import open_cache
from darht.core.errors import CacheError, ConfigError, ModelError
from darht.core.nets import build
from darht.trainer.config import InnerConfig, OptimConfig, StudentConfig, TrainConfig
from darht.trainer.export import export
from darht.trainer.export.export import ONNX, PLAIN, export_run
from darht.trainer.export.model_card import README
from darht.trainer.state.checkpoint import BEST, CONFIG, LAST, WEIGHTS, load_student, save_student
from darht.trainer.student.train import train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tiny_cache, tmp_path_factory):
    """Two epochs of training, so that batch norms have statistics of their own."""
    out = tmp_path_factory.mktemp("export") / "run"
    config = TrainConfig(
        student=StudentConfig(kwargs={"width": 4, "blocks": [1, 1, 1, 1]}),
        inner=InnerConfig(eps=32, step=8, steps=1),
        optim=OptimConfig(epochs=2, batch_size=32, lr=0.05),
    )
    train(config, open_cache(tiny_cache), out, device=CPU)
    return out


@pytest.fixture
def images(tiny_cache):
    return torch.from_numpy(open_cache(tiny_cache).read("image", slice(20, 30))).float() / 255


def folded(run, which=BEST):
    return load_student(run / which, CPU)[0].fold()


def test_the_hub_form_is_the_student_itself(run, images, tmp_path):
    exported = export_run(run, tmp_path / "out", kind="hub", which=LAST)
    assert exported.files == (WEIGHTS, CONFIG, README)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(exported.files)
    again, card = load_student(tmp_path / "out", CPU)
    assert card.epoch == 2
    assert torch.equal(again(images).logits, load_student(run / LAST, CPU)[0](images).logits)
    assert "load_student" in (tmp_path / "out" / README).read_text()


def test_the_plain_form_loads_into_the_plain_network(run, images, tmp_path):
    exported = export_run(run, tmp_path / "out", kind="plain")
    assert exported.files == (PLAIN, CONFIG, README)
    assert exported.checked.startswith("checked on 16 random and 16 real images: ")
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    net = build(config["arch"], config["num_classes"], config["kwargs"]).eval()
    net.load_state_dict(load_file(tmp_path / "out" / PLAIN), strict=True)
    mean, std = (torch.tensor(config["preprocessing"][name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        torch.testing.assert_close(net((images - mean) / std), folded(run)(images), rtol=1e-5, atol=1e-6)
    assert config["cache_root_hash"] == json.loads((run / "run.json").read_text())["identity"]["cache_root_hash"]
    assert config["preprocessing_inside"] is False
    weights = sum(parameter.numel() for parameter in net.parameters())
    assert f"It has {weights:,} parameters" in (tmp_path / "out" / README).read_text()
    assert config["image_size"] == [8, 8]
    # The names are those of the public CIFAR networks, so a stranger's ResNet-18 takes them.
    names = set(load_file(tmp_path / "out" / PLAIN))
    assert {"conv1.weight", "layer1.0.bn1.running_mean", "linear.weight", "linear.bias"} <= names


def test_onnx_has_the_preprocessing_inside_and_takes_any_batch(run, images, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    exported = export_run(run, tmp_path / "out", kind="onnx")
    assert exported.files == (ONNX, CONFIG, README)
    assert "16 real images" in exported.checked
    path = tmp_path / "out" / ONNX
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [(node.name, node.shape[1:]) for node in session.get_inputs()] == [("pixels", [3, 8, 8])]
    assert isinstance(session.get_inputs()[0].shape[0], str)
    for part in (images[:1], images[:3], images):
        found = torch.from_numpy(session.run(["logits"], {"pixels": part.numpy()})[0])
        with torch.no_grad():
            torch.testing.assert_close(found, folded(run)(part), rtol=1e-5, atol=1e-6)
    assert (
        str(Path(torch.__file__).parents[1]).encode() not in path.read_bytes()
    )  # nor where in whose files it was made
    assert str(Path(export.__file__).resolve().parents[2]).encode() not in path.read_bytes()
    facts = {prop.key: prop.value for prop in onnx.load(path).metadata_props}
    assert facts["cache_root_hash"] == load_student(run / BEST, CPU)[1].cache_root_hash


def test_what_answers_otherwise_is_not_written(run, tmp_path, monkeypatch):
    original = export._plain

    def broken(plain, card):
        data, answer = original(plain, card)
        return data, lambda x: answer(x) + 1.0

    monkeypatch.setattr(export, "_plain", broken)
    with pytest.raises(
        ModelError, match=r"plain\.safetensors answers .* of the largest logit apart, allowed is 0\.0001"
    ):
        export_run(run, tmp_path / "out", kind="plain")
    assert not (tmp_path / "out").exists()


def test_dropout_is_off_in_the_plain_form(run, images, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    student, card = load_student(copy / BEST, CPU)
    save_student(copy / BEST, student, dataclasses.replace(card, mc_dropout=0.4, mc_samples=3))
    export_run(copy, tmp_path / "out", kind="plain")
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["monte_carlo_dropout_off"] == 0.4
    assert "off here; the accuracies below are the student's with dropout on" in (tmp_path / "out" / README).read_text()
    again = load_student(copy / BEST, CPU)[0]
    assert (again.dropout.p, again.dropout.samples) == (0.4, 3)
    with torch.no_grad():
        torch.testing.assert_close(again.plain()(images), folded(run)(images))


def test_without_the_cache_random_images_are_enough(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    rewrite(copy / "run.json", cache="../gone")
    assert "checked on 16 random images: " in export_run(copy, tmp_path / "out", kind="plain").checked


def test_a_full_folder_a_missing_run_and_a_missing_package(run, tmp_path, monkeypatch):
    (tmp_path / "mine").write_text("")
    with pytest.raises(CacheError, match="is not empty: choose a new or empty --out folder"):
        export_run(run, tmp_path, kind="plain")
    with pytest.raises(CacheError, match="is not a run"):
        export_run(tmp_path, tmp_path / "out", kind="plain")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match=r"needs the packages onnx, onnxruntime and onnxscript .*'darht\[onnx\]'"):
        export_run(run, tmp_path / "out", kind="onnx")
    assert not (tmp_path / "out").exists()


def test_a_student_that_does_not_say_its_image_size(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    student, card = load_student(copy / BEST, CPU)
    save_student(copy / BEST, student, dataclasses.replace(card, image_size=()))
    with pytest.raises(ModelError, match="has no image_size"):
        export_run(copy, tmp_path / "out", kind="plain")
