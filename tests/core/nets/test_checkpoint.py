"""Forms of checkpoints: what is taken answers as the network that it came from, the rest is refused in one line."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from darht.cache.builder.teachers import import_teacher, load_teacher
from darht.core.errors import ModelError
from darht.core.nets.checkpoint import count_classes, read_checkpoint

CPU = torch.device("cpu")
MEAN, STD = torch.tensor([0.5, 0.25, 0.125]), torch.tensor([0.25, 0.5, 0.125])
MODULE = """
from types import SimpleNamespace

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, num_classes, form="plain"):
        super().__init__()
        self.form = form
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, num_classes)

    def forward(self, x):
        features = torch.relu(self.bn(self.conv(x))).mean((2, 3))
        logits = self.fc(features)
        return {
            "plain": lambda: logits,
            "tuple": lambda: (features, logits),
            "list": lambda: [logits],
            "dict": lambda: {"features": features, "out": logits},
            "named": lambda: {"logits": logits, "aux": -logits},
            "object": lambda: SimpleNamespace(logits=logits),
            "twice": lambda: (logits, -logits),
            "features": lambda: features,
            "text": lambda: "cat",
        }[self.form]()


class Shared(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.first = nn.Conv2d(4, 4, 3)
        self.second = self.first
        self.fc = nn.Linear(4, num_classes)

    def forward(self, x):
        return self.fc(self.second(self.first(self.stem(x))).mean((2, 3)))


class Normalised(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.register_buffer("mean", torch.full((1, 3, 1, 1), 0.25))
        self.register_buffer("std", torch.full((1, 3, 1, 1), 0.5))
        self.fc = nn.Linear(3, num_classes)

    def forward(self, x):
        return self.fc(((x - self.mean) / self.std).mean((2, 3)))


def ready(form="plain"):
    torch.manual_seed(5)
    return Net(6, form)
"""
State = dict[str, Any]


class Form(NamedTuple):
    """`make` turns the states of two networks into what the file holds; `refused` is a pattern, or None."""

    make: Callable[[State, State], Any]
    refused: str | None = None
    options: Mapping[str, Any] = MappingProxyType({})
    normalised: bool = False
    other: bool = False  # whether the second state is the one that is taken
    note: str = ""


def under(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def norm(mean: str, std: str, shape: tuple[int, ...] = (3,)) -> State:
    return {mean: MEAN.reshape(shape), std: STD.reshape(shape)}


def arrays(state: State) -> State:
    return {name: tensor.numpy() for name, tensor in state.items()}


def cast(state: State, dtype: torch.dtype) -> State:
    return {name: tensor.to(dtype) for name, tensor in state.items()}


def untracked(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}


FORMS: dict[str, Form] = {
    "plain": Form(lambda s, o: s),
    "normalize.mean": Form(
        lambda s, o: {**norm("normalize.mean", "normalize.std"), **under("model.", s)}, normalised=True
    ),
    "normalizer.mean": Form(
        lambda s, o: {**norm("normalizer.mean", "normalizer.std", (1, 3, 1, 1)), **under("model.", s)}, normalised=True
    ),
    "new_mean": Form(
        lambda s, o: {**norm("normalizer.new_mean", "normalizer.new_std", (3, 1, 1)), **under("model.", s)},
        normalised=True,
    ),
    "mean [3]": Form(lambda s, o: {**norm("mean", "std"), **s}, normalised=True, note="own normalisation is used"),
    "mean [3,1,1]": Form(lambda s, o: {**norm("mean", "std", (3, 1, 1)), **s}, normalised=True),
    "mean [1,3,1,1]": Form(lambda s, o: {**norm("mean", "std", (1, 3, 1, 1)), **s}, normalised=True),
    "mu and sigma": Form(lambda s, o: {**norm("mu", "sigma", (1, 3, 1, 1)), **s}, normalised=True),
    "mean of another shape": Form(
        lambda s, o: {"mean": torch.zeros(4), "std": torch.ones(4), **s}, "2 unexpected: mean, std"
    ),
    "mean without std": Form(lambda s, o: {"mean": MEAN, **s}, "1 unexpected: mean"),
    "std of zero": Form(lambda s, o: {"mean": MEAN, "std": MEAN * 0, **s}, "are no mean and std of pixels"),
    "Sequential": Form(lambda s, o: {**norm("0.mean", "0.std"), **under("1.", s)}, normalised=True),
    "Sequential with a third layer": Form(
        lambda s, o: {**norm("0.mean", "0.std"), **under("1.", s), "2.weight": MEAN}, "does not fit the architecture"
    ),
    "madrylab": Form(
        lambda s, o: {
            "model": {
                **under("module.model.", s),
                **norm("module.normalizer.new_mean", "module.normalizer.new_std", (3, 1, 1)),
                **under("module.attacker.model.", s),
                **norm("module.attacker.normalize.new_mean", "module.attacker.normalize.new_std", (3, 1, 1)),
            },
            "epoch": 7,
        },
        normalised=True,
    ),
    "normalisation beside": Form(lambda s, o: {"net": s, **norm("mean", "std")}, normalised=True),
    "two normalisations": Form(
        lambda s, o: {**norm("a.mean", "a.std"), **norm("b.std", "b.mean"), **under("model.", s)},
        "two normalisations that differ, a.mean and b.mean",
    ),
    "said and the same": Form(
        lambda s, o: {**norm("mean", "std"), **s},
        options={"preprocessing": {"mean": (0.5, 0.25, 0.125)}},
        normalised=True,
    ),
    "said and another": Form(
        lambda s, o: {**norm("mean", "std"), **s},
        r"--mean 0.4,0.4,0.4 differs from .*, which holds 0.5,0.25,0.125",
        {"preprocessing": {"mean": (0.4, 0.4, 0.4)}},
    ),
    "said as 0 to 255": Form(
        lambda s, o: s,
        r"got 125,123,113: write --mean 0.490196,0.482353,0.443137$",
        {"preprocessing": {"mean": (125.0, 123.0, 113.0)}},
    ),
    **{
        f"prefix {prefix}": Form(lambda s, o, prefix=prefix: under(prefix, s))
        for prefix in ("_orig_mod.", "module.", "model.", "net.", "backbone.", "module.0.", "1.", "a.b.c.")
    },
    "module inside of names": Form(lambda s, o: {k.replace(".", "._orig_mod.module.", 1): v for k, v in s.items()}),
    "two prefixes that differ": Form(
        lambda s, o: {**under("student.", s), **under("teacher.", o)}, "fit and differ, student and teacher: save the"
    ),
    "two prefixes that agree": Form(lambda s, o: {**under("a.", s), **under("b.", s)}),
    "Lightning": Form(
        lambda s, o: {
            "epoch": 1,
            "state_dict": {**under("model.", s), "criterion.weight": torch.ones(6), "val_acc.total": torch.tensor(3)},
            "hyper_parameters": {"lr": 0.1},
            "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []}],
        },
        note="2 entries outside of the network are left out: criterion.weight, val_acc.total",
    ),
    "net, acc and epoch": Form(lambda s, o: {"net": s, "acc": 91.2, "epoch": 199}),
    "numpy's acc": Form(lambda s, o: {"net": s, "acc": np.float64(91.2)}),
    "model.state_dict": Form(lambda s, o: {"model": {"state_dict": s}}),
    "an unknown key": Form(lambda s, o: {"best_weights": under("module.", s)}),
    "momenta under names": Form(lambda s, o: {"model": s, "optimizer": {"exp_avg": o}}),
    "another network": Form(
        lambda s, o: {"net": {"weight": MEAN}, "epoch": 3},
        r"1 unexpected: weight; these are of net, its top-level entries are net, epoch$",
    ),
    "two sets that differ": Form(lambda s, o: {"model": s, "best": o}, "fit and differ, best and model"),
    "no num_batches_tracked": Form(lambda s, o: untracked(s)),
    "averaged beside raw ones": Form(
        lambda s, o: {"model_state_dict": s, "unaveraged_model_state_dict": o},
        options={"which": "ema"},
    ),
    "raw beside averaged ones": Form(
        lambda s, o: {"model_state_dict": o, "unaveraged_model_state_dict": s},
        note="the raw weights are taken; model_state_dict holds averaged ones: --weights ema takes them",
    ),
    "raw and ema": Form(lambda s, o: {"model": s, "ema": o}, note="ema holds averaged ones: --weights ema takes them"),
    **{
        f"raw and {name}, asked": Form(
            lambda s, o, name=name: {"model": s, name: o}, options={"which": "ema"}, other=True
        )
        for name in ("ema", "ema_state_dict", "model_ema", "swa", "averaged", "state_dict_ema")
    },
    "raw, asked": Form(lambda s, o: {"model": s, "ema": o}, options={"which": "raw"}),
    "both in one state": Form(lambda s, o: {**under("model.", s), **under("ema_model.module.", o)}),
    "raw bare, ema with prefix": Form(lambda s, o: {**s, **under("ema.", o)}),
    "AveragedModel": Form(
        lambda s, o: {**under("module.", s), "n_averaged": torch.tensor(3)}, options={"which": "ema"}
    ),
    "ema alone": Form(lambda s, o: {"ema": s}),
    "ema that is not there": Form(
        lambda s, o: {"model": s}, "has no ema weights that fit: it has model;", {"which": "ema"}
    ),
    "raw that is not there": Form(
        lambda s, o: {"ema": s}, "has no raw weights that fit: it has ema;", {"which": "raw"}
    ),
    "float64": Form(lambda s, o: cast(s, torch.float64)),
    "bfloat16": Form(lambda s, o: cast(s, torch.bfloat16)),
    "float16": Form(lambda s, o: cast(s, torch.float16)),
    "int8": Form(lambda s, o: cast(s, torch.int8), "its weights are whole numbers"),
    "numpy arrays": Form(lambda s, o: arrays(s)),
    "numpy in a container": Form(lambda s, o: {"state_dict": under("module.", arrays(s))}),
    "a whole module": Form(
        lambda s, o: nn.Sequential(nn.Linear(2, 2)), r"needs torch\.nn\.modules\.container\.Sequential, which is code"
    ),
    "a refused global": Form(
        lambda s, o: {"net": s, "path": Path("x")}, r"needs pathlib\S*, which is code and is not run"
    ),
    "no tensors": Form(lambda s, o: {"epoch": 3, "args": {}}, "its top-level entries are epoch, args$"),
    "classes said": Form(lambda s, o: s, options={"num_classes": 6}),
    "other classes said": Form(lambda s, o: s, r"has 6 classes .*, --classes says 10", {"num_classes": 10}),
}


@pytest.fixture
def nets(tmp_path, monkeypatch) -> str:
    name = f"nets_of_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return f"python:{name}"


def made(nets: str, kind: str = "Net", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    net: nn.Module = getattr(__import__(nets.removeprefix("python:")), kind)(6)
    return net.eval()


def take(path: Path | None, nets: str, folder: Path, kind: str = "Net", **options: Any) -> tuple[nn.Module, list[str]]:
    notes: list[str] = []
    arguments = {"kwargs": {}, "preprocessing": {}, **options}
    import_teacher(path, folder, arch=f"{nets}:{kind}", on_note=notes.append, **arguments)
    assert not any("\n" in note for note in notes)
    return load_teacher(folder, CPU)[0], notes


def images() -> torch.Tensor:
    return torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_how_many_forms_there_are():
    assert len(FORMS) == 66


@pytest.mark.parametrize("name", FORMS)
def test_a_form(name, nets, tmp_path):
    form, net, other = FORMS[name], made(nets), made(nets, seed=1)
    path, folder = tmp_path / "w.pt", tmp_path / "t"
    torch.save(form.make(dict(net.state_dict()), dict(other.state_dict())), path)
    if form.refused is not None:
        with pytest.raises(ModelError, match=form.refused) as caught:
            take(path, nets, folder, **form.options)
        assert "\n" not in str(caught.value) and not folder.exists()
        return
    teacher, notes = take(path, nets, folder, **form.options)
    mean, std = (value.view(1, 3, 1, 1) for value in (MEAN, STD))
    x = (images() - mean) / std if form.normalised else images()
    tolerance = 0.05 if name in ("bfloat16", "float16") else 0.0
    torch.testing.assert_close(teacher(images()), (other if form.other else net)(x), rtol=tolerance, atol=tolerance)
    assert any(form.note in note for note in notes) or not form.note


@pytest.mark.parametrize("form", ["plain", "tuple", "list", "dict", "named", "object"])
def test_logits_inside_of_an_answer(form, nets, tmp_path):
    net = made(nets)
    torch.save(net.state_dict(), tmp_path / "w.pt")
    teacher, notes = take(tmp_path / "w.pt", nets, tmp_path / "t", kwargs={"form": form})
    assert torch.equal(teacher(images()), net(images()))
    key = {"tuple": 1, "list": 0, "dict": "out", "named": "logits", "object": "logits"}.get(form)
    assert load_teacher(tmp_path / "t", CPU)[1].training.get("logits") == key
    assert any("holds its logits under" in note for note in notes) == (key is not None)


@pytest.mark.parametrize(
    ("form", "part"),
    [
        ("twice", r"answers with tuple \(0: \(2, 6\), 1: \(2, 6\)\): 2 tensors have that shape"),
        ("features", r"answers with Tensor \(\(2, 4\)\): check --classes and --arch"),
        ("text", r"answers with str \(no tensors\)"),
    ],
)
def test_an_answer_without_logits_is_refused(form, part, nets, tmp_path):
    torch.save(made(nets).state_dict(), tmp_path / "w.pt")
    with pytest.raises(ModelError, match=part):
        take(tmp_path / "w.pt", nets, tmp_path / "t", kwargs={"form": form})
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("save", [torch.save, safetensors.torch.save_model])
def test_layers_that_share_their_weights(save, nets, tmp_path):
    net = made(nets, "Shared")
    path = tmp_path / ("w.pt" if save is torch.save else "w.safetensors")
    save(net.state_dict() if save is torch.save else copy.deepcopy(net), str(path))
    teacher, _ = take(path, nets, tmp_path / "t", "Shared")
    assert torch.equal(teacher(images()), net(images()))


def test_a_normalisation_that_is_the_networks_own_stays_there(nets, tmp_path):
    net = made(nets, "Normalised")
    torch.save({"net": net.state_dict()}, tmp_path / "w.pt")
    teacher, notes = take(tmp_path / "w.pt", nets, tmp_path / "t", "Normalised")
    assert torch.equal(teacher(images()), net(images())) and not notes


def test_a_callable_brings_its_own_weights(nets, tmp_path):
    teacher, _ = take(None, nets, tmp_path / "t", "ready")
    assert teacher(images()).shape == (4, 6)
    with pytest.raises(ModelError, match="takes any class count: say it with --classes"):
        take(None, nets, tmp_path / "other")
    with pytest.raises(ModelError, match=r"has 6 classes .*, --classes says 7"):
        take(None, nets, tmp_path / "other", "ready", num_classes=7)
    with pytest.raises(ModelError, match="has no weights of its own"):
        import_teacher(None, tmp_path / "other", arch="resnet18", kwargs={}, preprocessing={})


def test_numpy_arrays_that_an_old_numpy_wrote(nets, tmp_path):
    net = made(nets)
    path = tmp_path / "w.pt"
    torch.save(arrays(net.state_dict()), path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    assert b"numpy._core." in content
    path.write_bytes(content.replace(b"numpy._core.", b"numpy.core."))
    teacher, _ = take(path, nets, tmp_path / "t")
    assert torch.equal(teacher(images()), net(images()))


def test_the_class_count_is_that_of_the_last_layer(tmp_path):
    state = {"module.block.se.fc.weight": torch.zeros(16, 4), "module.fc.weight": torch.zeros(7, 4)}
    torch.save({"net": state, "epoch": 1}, tmp_path / "w.pt")
    checkpoint = read_checkpoint(tmp_path / "w.pt")
    assert count_classes(checkpoint, "fc") == 7 and count_classes(checkpoint, "head") is None
