"""Every way to name a model, and what a wrong name says."""

import shutil
import types

import pytest
import torch
from reseal import rewrite
from safetensors.torch import load_file, save
from torch import nn

from darht.core.errors import CacheError, ConfigError, ModelError
from darht.core.nets import build
from darht.trainer.evaluation import zoo
from darht.trainer.evaluation.target import ModelOptions, check_classes, find, load

CPU = torch.device("cpu")
SMALL = {"width": 4, "blocks": [1, 1, 1, 1]}


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "net.pt"
    torch.save({"state_dict": build("resnet18", 10, SMALL).state_dict()}, path)
    return path


def test_what_a_name_is(runs, tiny_teachers, weights):
    assert find(str(runs / "pgd"), ModelOptions()) == "run"
    assert find(str(runs / "pgd" / "student"), ModelOptions()) == "student"
    assert find(str(tiny_teachers["cnn"]), ModelOptions()) == "teacher"
    assert find(str(weights), ModelOptions(arch="resnet18")) == "weights"
    assert [find(f"{kind}:x", ModelOptions()) for kind in ("timm", "torchvision", "python")] == [
        "timm", "torchvision", "python",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "error", "part"),
    [
        ("nowhere", ConfigError, "there is no 'nowhere': give a run, a student's or teacher's folder"),
        (".", CacheError, "is not a run: it holds none of run.json, teacher.json, config.json"),
        ("net.pt", ConfigError, "say with --arch what network they belong to"),
    ],
)
def test_a_wrong_name(name, error, part, weights, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=part):
        find(name, ModelOptions())


def frozen(target):
    return not target.model.training and not any(p.requires_grad for p in target.model.parameters())


def test_a_run_is_its_folded_student_with_cache_and_origin(runs):
    target = load(str(runs / "pgd"), ModelOptions(), CPU)
    assert (target.kind, target.name, target.eps, target.data) == ("run", "pgd", 32, "digits")
    assert target.about["which"] == "student" and target.about["epoch"] == 1
    assert set(target.origin["teachers"]) == {"cnn", "vit"}
    assert frozen(target) and target.student is not None and target.cache is not None
    last = load(str(runs / "pgd"), ModelOptions(), CPU, which="last")
    assert last.name == "pgd (last)" and last.about["which"] == "last"
    alone = load(str(runs / "pgd" / "student"), ModelOptions(), CPU)
    assert (alone.data is None and alone.fingerprint() != last.fingerprint()) or last.card == alone.card


def test_the_cached_run_says_what_it_buys(runs):
    assert "transfer robustness" in load(str(runs / "cached"), ModelOptions(), CPU).note


def noted(run, tmp_path, **recipe):
    student = shutil.copytree(run / "student", tmp_path / "student")
    card = load(str(student), ModelOptions(), CPU).card
    rewrite(student / "config.json", recipe={**card.recipe, **recipe})
    return load(str(student), ModelOptions(), CPU).note


@pytest.mark.parametrize("recipe", [{"recipe": "kd", "loss": {}}, {"recipe": "at", "loss": {"clean_share": 1.0}}])
def test_a_student_of_clean_images_says_so(runs, tmp_path, recipe):
    said = f"recipe {recipe['recipe']} trains on clean images only: robust accuracy is shown beside it"
    assert noted(runs / "pgd", tmp_path, **recipe) == said


@pytest.mark.parametrize(
    ("inner", "start"),
    [
        ({"kind": "warm"}, "its row's last perturbation"),
        ({"kind": "warm", "warm": {"start": "noise"}}, "its row's last perturbation"),
        ({"kind": "warm", "warm": {"start": "label"}}, "its label's pattern"),
        ({"kind": "n-fgsm"}, "noise of twice the radius"),
    ],
)
def test_a_single_step_says_where_it_starts(runs, tmp_path, inner, start):
    note = noted(runs / "pgd", tmp_path, inner={"eps": 8.0, "steps": 10, **inner})
    assert f"inner: {inner['kind']}, one step on the student from {start}, " in note


def test_a_teacher_brings_its_card(tiny_teachers):
    target = load(str(tiny_teachers["vit"]), ModelOptions(), CPU)
    assert (target.kind, target.num_classes, target.name) == ("teacher", 10, "vit") and frozen(target)


def test_plain_weights_with_their_preprocessing(weights):
    options = ModelOptions("resnet18", SMALL, {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)})
    target = load(str(weights), options, CPU, classes=10)
    net = build("resnet18", 10, SMALL)
    net.load_state_dict(torch.load(weights)["state_dict"])
    x = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(target.model(x), net.eval()((x - 0.5) / 0.2))
    assert frozen(target)


def test_plain_weights_with_a_normalisation_inside(tmp_path):
    net, path = build("resnet18", 10, SMALL), tmp_path / "net.pt"
    torch.save({**net.state_dict(), "mean": torch.full((3,), 0.5), "std": torch.full((3,), 0.25)}, path)
    target = load(str(path), ModelOptions("resnet18", SMALL), CPU, classes=10)
    x = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(target.model(x), net.eval()((x - 0.5) / 0.25))
    assert target.about["preprocessing"]["std"] == [0.25, 0.25, 0.25]
    with pytest.raises(ModelError, match="--mean 0,0,0 differs from"):
        load(str(path), ModelOptions("resnet18", SMALL, {"mean": (0.0, 0.0, 0.0)}), CPU, classes=10)


def test_a_file_with_raw_and_averaged_weights(tmp_path):
    raw, averaged = (build("resnet18", 10, SMALL).eval() for _ in range(2))
    torch.save({"model": raw.state_dict(), "ema": averaged.state_dict()}, tmp_path / "w.pt")
    x = torch.rand(2, 3, 8, 8)
    for which, net in ((None, raw), ("raw", raw), ("ema", averaged)):
        target = load(str(tmp_path / "w.pt"), ModelOptions("resnet18", SMALL, weights=which), CPU, classes=10)
        assert torch.equal(target.model(x), net(x))
    with pytest.raises(ConfigError, match="--weights chooses in a file"):
        load("python:frauds:honest", ModelOptions(weights="ema"), CPU, classes=10)


def test_a_file_of_robustbench(tmp_path):
    net = build("dm-wrn-28-10", 10, {"width": 1}).eval()
    torch.save(net.state_dict(), tmp_path / "w.pt")
    options = ModelOptions("robustbench:Wang2023Better_WRN-28-10", {"width": 1})
    target = load(str(tmp_path / "w.pt"), options, CPU, classes=10)
    assert target.about["arch"] == "dm-wrn-28-10"
    assert target.about["preprocessing"]["std"] == [0.2471, 0.2435, 0.2616]
    with pytest.raises(ModelError, match="does not fit the architecture"):
        load(str(tmp_path / "w.pt"), options, CPU, classes=100)


@pytest.mark.parametrize("options", [{"arch": "resnet18"}, {"kwargs": SMALL}, {"preprocessing": {"mean": (0, 0, 0)}}])
def test_what_knows_its_network_is_not_told_another(runs, tiny_teachers, options):
    for kind, folder in (
        ("run", runs / "pgd"),
        ("student", runs / "pgd" / "student"),
        ("teacher", tiny_teachers["cnn"]),
    ):
        with pytest.raises(ConfigError, match=f"is a {kind}, which knows its network: --arch, --kwargs, --mean"):
            load(str(folder), ModelOptions(**options), CPU)


def test_which_is_for_runs(runs, tiny_teachers, sound):
    for text, kind in ((tiny_teachers["cnn"], "teacher"), (runs / "pgd" / "student", "student"),
                       ("python:frauds:honest", "python")):  # fmt: skip
        with pytest.raises(ConfigError, match=f"is no run but a {kind}: --which chooses among the two students"):
            load(str(text), ModelOptions(), CPU, which="last")


def test_weights_of_another_network(weights):
    with pytest.raises(ModelError, match="does not fit the architecture"):
        load(str(weights), ModelOptions("preact_resnet18", SMALL), CPU, classes=10)


def test_a_callable_of_python(sound):
    target = load("python:frauds:honest", ModelOptions(), CPU, classes=10)
    assert frozen(target) and target.kind == "python"
    with pytest.raises(ModelError, match="cannot import 'no_such_module'"):
        load("python:no_such_module:f", ModelOptions(), CPU, classes=10)


def test_fingerprints_tell_weights_and_networks_apart(sound, weights):
    first, second = (
        load(f"python:frauds:{name}", ModelOptions(), CPU, classes=10).fingerprint() for name in ("honest", "scaled")
    )
    assert first != second
    assert first == load("python:frauds:honest", ModelOptions(), CPU, classes=10).fingerprint()


class Published(nn.Sequential):
    """A model as timm hands it out."""

    def __init__(self):
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 7))
        self.pretrained_cfg = {"input_size": (3, 16, 16), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.2)}
        self.num_classes = 7


def test_a_timm_model_brings_its_own_preprocessing(monkeypatch):
    import timm

    asked = []
    monkeypatch.setattr(timm, "create_model", lambda name, **options: asked.append((name, options)) or Published())
    target = load("timm:some_net", ModelOptions(kwargs={"a": 1}), CPU, classes=10)
    assert asked == [("some_net", {"pretrained": True, "a": 1})]
    assert target.num_classes == 7
    assert target.about["preprocessing"] == {"resize": 16, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2]}
    larger = load("timm:some_net", ModelOptions(preprocessing={"resize": 32}), CPU, classes=10)
    assert larger.about["preprocessing"] == {"resize": 32, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2]}
    own = {"resize": None, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    plain = load("timm:some_net", ModelOptions(preprocessing=own), CPU, classes=10)
    assert plain.about["preprocessing"] == {key: value and list(value) for key, value in own.items()}


def test_a_torchvision_model_brings_its_own_preprocessing(monkeypatch):
    class Weights:
        meta = types.MappingProxyType({"categories": list("abcdefg")})

        def transforms(self):
            return types.SimpleNamespace(crop_size=[16], mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2))

    models = types.SimpleNamespace(
        get_model_weights=lambda name: types.SimpleNamespace(DEFAULT=Weights()),
        get_model=lambda name, weights, **options: Published(),
    )
    monkeypatch.setattr(zoo, "torchvision", lambda: types.SimpleNamespace(models=models))
    target = load("torchvision:some_net", ModelOptions(), CPU)
    assert target.num_classes == 7 and target.about["preprocessing"]["resize"] == 16


@pytest.mark.parametrize("name", ["timm:no_such_net", "torchvision:no_such_net"])
def test_a_model_that_is_not_there_names_the_other_way(name):
    with pytest.raises(ModelError, match=f"{name} cannot be had with its published weights .* FILE --arch {name}"):
        load(name, ModelOptions(), CPU)


def test_classes_must_be_the_datas(sound, runs):
    x = torch.rand(1, 3, 8, 8)
    honest = load("python:frauds:honest", ModelOptions(), CPU, classes=10)
    check_classes(honest, honest.model, x, tuple("0123456789"))
    with pytest.raises(ConfigError, match="has 10 classes, the data has 3"):
        check_classes(honest, honest.model, x, ("a", "b", "c"))
    with pytest.raises(ModelError, match=r"must return logits \[B, C\]; it returned \[1\]"):
        one = load("python:frauds:one_logit", ModelOptions(), CPU, classes=10)
        check_classes(one, one.model, x, ("a", "b"))
    run = load(str(runs / "pgd"), ModelOptions(), CPU)
    with pytest.raises(
        ConfigError, match="the same classes in another order: class 0 is '0' in the first, '9' in the sec"
    ):
        check_classes(run, run.model, x, tuple("9876543210"))


def test_another_cache_in_the_place_of_the_own_one_is_refused(runs, tmp_path):
    run = shutil.copytree(runs / "pgd", tmp_path / "run")
    rewrite(run / "student" / "config.json", cache_root_hash="f" * 64)
    with pytest.raises(ConfigError, match=r"is not the cache that .* was trained from: its root hash differs"):
        load(str(run), ModelOptions(), CPU)


def test_the_student_or_the_weights_of_another_run_are_refused(runs, tmp_path):
    run = shutil.copytree(runs / "pgd", tmp_path / "run")
    weights = run / "student" / "model.safetensors"
    weights.write_bytes(save({name: value + 1 for name, value in load_file(weights).items()}))
    with pytest.raises(ModelError, match=r"model\.safetensors has sha256 .*, config\.json says .*--resume"):
        load(str(run), ModelOptions(), CPU)
    shutil.copytree(runs / "cached" / "student", run / "student", dirs_exist_ok=True)
    with pytest.raises(CacheError, match=r"holds the student of another run than .*run\.json describes"):
        load(str(run), ModelOptions(), CPU)


def test_a_url_that_a_run_names_is_not_fetched(runs, tmp_path):
    run = shutil.copytree(runs / "pgd", tmp_path / "run")
    rewrite(run / "run.json", cache="http://127.0.0.1:1/cache")
    with pytest.raises(CacheError, match=r"what a folder says is not fetched: --shards http://127\.0\.0\.1:1/cache"):
        load(str(run), ModelOptions(), CPU)
    cache = str(load(str(runs / "pgd"), ModelOptions(), CPU).cache.folder)
    assert load(str(run), ModelOptions(shards=cache), CPU).cache is not None
    with pytest.raises(ConfigError, match="--shards says where the cache of a run lies"):
        load(str(run / "student"), ModelOptions(shards=cache), CPU)
