"""Teacher folders, and foreign weights: what fits is loaded, what does not is named, nothing is executed."""

import argparse
import pickle
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from darht.cache.builder.teachers import Card, import_teacher, load_teacher, read_card, save_teacher, write_card
from darht.cache.sources.load import load_source
from darht.core.errors import ModelError
from darht.core.files import sha256_file
from darht.core.nets import build
from darht.core.nets.checkpoint import read_checkpoint
from darht.core.preprocessing import Preprocessing
from darht.core.stats import wilson

CPU = torch.device("cpu")
KWARGS = {"width": 2, "blocks": [1, 1, 1, 1]}
ZOO = Path(__file__).resolve().parents[4] / "shared" / "data" / "weights"


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return build("resnet18", 10, KWARGS).eval()


def imported(weights: Path, folder: Path, **options) -> Card:
    arguments = {"arch": "resnet18", "num_classes": 10, "kwargs": KWARGS, "preprocessing": Preprocessing(), **options}
    return import_teacher(weights, folder, **arguments)


def failure(weights: Path, folder: Path, **options) -> str:
    with pytest.raises(ModelError) as caught:
        imported(weights, folder, **options)
    assert not folder.exists() and "\n" not in str(caught.value)
    return str(caught.value)


def same(folder: Path, net: nn.Module) -> bool:
    teacher, _ = load_teacher(folder, CPU)
    x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return torch.equal(teacher(x), net(x))


def test_a_teacher_folder_round_trip(net, tmp_path):
    card = Card(
        arch="resnet18",
        kwargs=KWARGS,
        num_classes=10,
        preprocessing=Preprocessing(resize=16, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)),
        training={"algorithm": "fat", "tau": 1},
        data={"source": "digits", "rows": 7},
        accuracy={"clean": {"percent": 91.5, "images": 200}},
        weights_sha256="",
    )
    saved = save_teacher(tmp_path / "t", net, card)
    assert saved.weights_sha256 == sha256_file(tmp_path / "t" / "teacher.safetensors")
    assert sorted(path.name for path in (tmp_path / "t").iterdir()) == ["teacher.json", "teacher.safetensors"]
    assert read_card(tmp_path / "t") == saved
    teacher, loaded = load_teacher(tmp_path / "t", CPU)
    assert loaded == saved
    x = torch.rand(2, 3, 8, 8)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)))
    resized = nn.functional.interpolate(x, size=(16, 16), mode="bilinear")
    torch.testing.assert_close(teacher(x), net((resized - mean) / std))


def test_a_teacher_is_frozen_but_lets_gradients_through(net, tmp_path):
    save_teacher(tmp_path / "t", net, Card(arch="resnet18", kwargs=KWARGS, num_classes=10, weights_sha256=""))
    teacher, _ = load_teacher(tmp_path / "t", CPU)
    assert not teacher.training and not any(parameter.requires_grad for parameter in teacher.parameters())
    x = torch.rand(1, 3, 8, 8, requires_grad=True)
    teacher(x).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_a_card_can_be_amended(net, tmp_path):
    card = save_teacher(tmp_path / "t", net, Card(arch="resnet18", kwargs=KWARGS, num_classes=10, weights_sha256=""))
    write_card(tmp_path / "t", Card(**{**card.__dict__, "accuracy": {"clean": 12.5}}))
    assert load_teacher(tmp_path / "t", CPU)[1].accuracy == {"clean": 12.5}


def test_other_weights_than_the_card_names(net, tmp_path):
    card = save_teacher(tmp_path / "t", net, Card(arch="resnet18", kwargs=KWARGS, num_classes=10, weights_sha256=""))
    path = tmp_path / "t" / "teacher.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    with pytest.raises(ModelError) as caught:
        load_teacher(tmp_path / "t", CPU)
    found = sha256_file(path)[:12]
    expected = card.weights_sha256[:12]
    assert str(caught.value) == f"{path} has sha256 {found}, its card says {expected}: not these weights"


def test_parts_of_a_folder_that_are_missing(net, tmp_path):
    with pytest.raises(
        ModelError, match=r"is not a teacher folder: .*teacher\.json is missing; darht-teacher train or"
    ):
        load_teacher(tmp_path, CPU)
    save_teacher(tmp_path, net, Card(arch="resnet18", kwargs=KWARGS, num_classes=10, weights_sha256=""))
    (tmp_path / "teacher.safetensors").unlink()
    with pytest.raises(ModelError, match=r"teacher\.safetensors is missing beside its card; train or import"):
        load_teacher(tmp_path, CPU)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"arch": "x"}', b"\xff", b'{"arhc": 1}'])
def test_a_damaged_card(tmp_path, content):
    (tmp_path / "teacher.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"teacher\.json is not a teacher card: ") as caught:
        read_card(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.th", "w.safetensors"])
def test_every_kind_of_file(net, tmp_path, name):
    path = tmp_path / name
    if name.endswith("safetensors"):
        safetensors.torch.save_file(net.state_dict(), path)
    else:
        torch.save(net.state_dict(), path)
    card = imported(path, tmp_path / "t")
    assert same(tmp_path / "t", net)
    assert card.training == {"algorithm": "imported", "file": name, "file_sha256": sha256_file(path)}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state, "optimizer": {"lr": 0.1}, "acc": 91.0},
        lambda state: {"net": state},
        lambda state: {"model_state_dict": state},
        lambda state: {"epoch": 1, "ema": state},
        lambda state: {"state_dict": {"model": state}},
    ],
)
def test_containers_are_opened(net, tmp_path, wrap):
    torch.save(wrap(net.state_dict()), tmp_path / "w.pt")
    imported(tmp_path / "w.pt", tmp_path / "t")
    assert same(tmp_path / "t", net)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "module.model.", "_orig_mod.module.", "model.module."]
)
def test_prefixes_are_stripped(net, tmp_path, prefix):
    torch.save({f"{prefix}{name}": tensor for name, tensor in net.state_dict().items()}, tmp_path / "w.pt")
    imported(tmp_path / "w.pt", tmp_path / "t")
    assert same(tmp_path / "t", net)


def test_a_prefix_that_is_the_networks_own_stays(tmp_path, monkeypatch):
    (tmp_path / "wrapped_net.py").write_text(
        "from torch import nn\n\n\nclass Net(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n"
        "        self.model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))\n\n"
        "    def forward(self, x):\n        return self.model(x)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    arch = "python:wrapped_net:Net"
    net = build(arch, 10)
    save_teacher(tmp_path / "saved", net, Card(arch=arch, num_classes=10, weights_sha256=""))
    assert same(tmp_path / "saved", net)
    for prefix in ("", "module."):
        torch.save({f"{prefix}{name}": tensor for name, tensor in net.state_dict().items()}, tmp_path / "w.pt")
        imported(tmp_path / "w.pt", tmp_path / "t", arch=arch, kwargs={})
        assert same(tmp_path / "t", net)


def test_weights_that_do_not_fit(net, tmp_path):
    state = dict(net.state_dict())
    state["fc.weight"] = state.pop("linear.weight")
    state["linear.bias"] = torch.zeros(7)
    torch.save(state, tmp_path / "w.pt")
    assert failure(tmp_path / "w.pt", tmp_path / "t") == (
        f"{tmp_path}/w.pt does not fit the architecture: 1 missing: linear.weight; 1 unexpected: fc.weight; "
        "1 of another shape: linear.bias is (7,), the network has (10,)"
    )


def test_long_lists_are_cut(net, tmp_path):
    torch.save({f"x{i}": torch.zeros(1) for i in range(20)}, tmp_path / "w.pt")
    text = failure(tmp_path / "w.pt", tmp_path / "t")
    assert "; 20 unexpected: x0, x1, x2, x3, x4, x5, x6, x7, and 12 more" in text


@pytest.mark.parametrize(
    "page",
    [b"<!DOCTYPE html><html>", b"\n  <html lang='en'>", b"<HEAD>", b"<?xml version='1.0'?><Error>AccessDenied</Error>"],
)
@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_a_web_page_under_the_name_of_weights(tmp_path, page, name):
    (tmp_path / name).write_bytes(page + b" " * 100)
    assert failure(tmp_path / name, tmp_path / "t") == (
        f"{tmp_path}/{name} is a web page, not weights: the download link gave an HTML page; fetch the file again"
    )


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, save):
    save({"state_dict": Bomb(tmp_path / "ran")}, tmp_path / "w.pt")
    assert "does not load as plain weights (weights_only=True): " in failure(tmp_path / "w.pt", tmp_path / "t")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("value", "kind"),
    [([torch.zeros(1)], "list"), ({}, "dict"), (torch.zeros(2), "Tensor")],
)
def test_a_file_of_something_else(tmp_path, value, kind):
    torch.save(value, tmp_path / "w.pt")
    assert failure(tmp_path / "w.pt", tmp_path / "t") == (
        f"{tmp_path}/w.pt holds {kind}, not a state_dict of tensors: save model.state_dict()"
    )


def test_a_file_without_tensors_is_told_by_its_entries(tmp_path):
    torch.save({"epoch": 3, "args": {}}, tmp_path / "w.pt")
    assert failure(tmp_path / "w.pt", tmp_path / "t") == (
        f"{tmp_path}/w.pt holds dict, not a state_dict of tensors: save model.state_dict(); "
        "its top-level entries are epoch, args"
    )


def test_a_whole_pickled_model_is_refused(tmp_path):
    torch.save({"model": nn.Linear(2, 2), "args": argparse.Namespace(lr=1)}, tmp_path / "w.pt")
    assert "does not load as plain weights" in failure(tmp_path / "w.pt", tmp_path / "t")


def test_a_file_that_is_not_there(tmp_path):
    text = f"{tmp_path}/w.pt is missing: give a .pt, .pth, .th or .safetensors file of weights"
    assert failure(tmp_path / "w.pt", tmp_path / "t") == text


@pytest.fixture(scope="module")
def whole_files(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    state = {"a": torch.zeros(3, 4), "b": torch.ones(2)}
    torch.save(state, folder / "zip.pt")
    torch.save(state, folder / "old.pt", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(state, folder / "x.safetensors")
    (folder / "plain.pt").write_bytes(pickle.dumps({"a": [1, 2]}))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_is_one_error_or_the_weights(whole_files, tmp_path, data):
    name = data.draw(st.sampled_from(sorted(whole_files)))
    content = bytearray(whole_files[name])
    for _ in range(data.draw(st.integers(0, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / name
    path.write_bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
    try:
        sets = read_checkpoint(path).sets
    except ModelError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert all(isinstance(tensor, torch.Tensor) for state in sets.values() for tensor in state.values())


@pytest.mark.real_data
def test_foreign_weights_have_their_published_accuracy(cifar_root, tmp_path, monkeypatch):
    if not (ZOO / "resnet20.pt").is_file():
        pytest.skip(f"no weights in {ZOO}")
    monkeypatch.syspath_prepend(ZOO)
    card = imported(ZOO / "resnet20.pt", tmp_path / "t", arch="python:zoo:build", kwargs={"name": "resnet20"})
    assert card.num_classes == 10
    teacher, _ = load_teacher(tmp_path / "t", CPU)
    source = load_source("cifar10", cifar_root, "test", limit=1000)
    with torch.no_grad():
        images = torch.from_numpy(source.images).split(250)
        predicted = torch.cat([teacher(batch.float() / 255).argmax(1) for batch in images]).numpy()
    low, high = wilson(int(np.sum(predicted == source.labels)), 1000, z=3.0)
    assert low <= 0.9173 <= high


@pytest.mark.real_data
def test_foreign_weights_for_another_network(tmp_path, monkeypatch):
    if not (ZOO / "resnet56.pt").is_file():
        pytest.skip(f"no weights in {ZOO}")
    monkeypatch.syspath_prepend(ZOO)
    text = failure(ZOO / "resnet56.pt", tmp_path / "t", arch="python:zoo:build", kwargs={"name": "resnet20"})
    assert "does not fit the architecture: 216 unexpected: 1.layer1.3.conv1.weight, " in text
