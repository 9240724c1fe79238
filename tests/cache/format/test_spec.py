"""Every rule of a cache's YAML, through the command line: one line, the numbers, the fix, exit code 2."""

import dataclasses
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from darht.attacks import ATTACKS, FGSM, PGD, parse_eps
from darht.cache.builder.config import CacheConfig, attack_spec, load_config
from darht.cache.builder.resolve import resolve
from darht.cache.builder.teachers import Card, save_teacher
from darht.cache.format.manifest import read_spec
from darht.cache.format.spec import AttackSpec, StoreSpec
from darht.core.config import canonical_json, parse
from darht.core.errors import ConfigError
from darht.core.nets import build


def put(*path, value):
    """A change of a config: set the entry at `path`."""

    def change(config):
        for key in path[:-1]:
            config = config.setdefault(key, {})
        config[path[-1]] = value

    return change


BOX = {"kind": "resized-crop", "count": 3, "size": 6}
ATTACK = {"kind": "pgd", "teacher": "cnn"}
TOP = "spec.yaml.store: store.top_k says how many logits of an answer are kept (at least 1), with store.logits: top-k "
RULES = [
    (put("store", value={"logits": "top-k"}), TOP + "and only then; got logits top-k and top_k 0"),
    (put("store", "top_k", value=5), TOP + "and only then; got logits float16 and top_k 5"),
    (
        put("store", value={"logits": "top-k", "top_k": 10}),
        "store.top_k must lie in 1..9 for 10 classes; got 10: store.logits: float16 keeps all",
    ),
    (put("veiws", value={}), "spec.yaml: unknown key 'veiws'; did you mean 'views'?"),
    (put("views", "paddding", value=1), "spec.yaml.views: unknown key 'paddding'; did you mean 'padding'?"),
    (put("data", "spilt", value="train"), "spec.yaml.data: unknown key 'spilt'; did you mean 'split'?"),
    (put("data", "split", value="val"), "spec.yaml.data.split must be one of train, test; got 'val'"),
    (put("data", "holdout", value=1), "spec.yaml.data: holdout is a share in [0, 1); got 1"),
    (put("data", "holdout", value=float("nan")), "spec.yaml.data.holdout must be a finite number; got nan"),
    (put("data", "limit", value=0), "limit must be at least 1 row; got 0; leave it out to take all rows"),
    (
        put("data", "limit", value=7),
        "class 4 (4), class 8 (8), class 9 (9) have no images in the train split of digits; "
        "raise limit (first 7 rows), or leave it out",
    ),
    (
        put("data", "source", value="digit"),
        "source must be one of digits, cifar10, cifar100, tiny-imagenet, imagefolder, npz, webdataset, parquet; got "
        "'digit'",
    ),
    (put("views", "padding", value=128), "spec.yaml.views: padding must lie in 0..127 pixels; got 128"),
    (
        put("views", value={"padding": 8, "count": 3}),
        "padding must be smaller than the image side; got 8 for images of 8 x 8 pixels, of which some views would be "
        "black: write at most 7",
    ),
    (put("seed", value=-3), "spec.yaml: seed must be at least 0; got -3: write 3"),
    (
        put("attacks", "a", value={**ATTACK, "kind": ["pgd"]}),
        "spec.yaml: attack 'a': kind must be one of pgd, fgsm, mim, apgd, apgd-t, fab-t, cw, cw-linf, "
        "square; got ['pgd']",
    ),
    (put("views", "count", value=10), "views.count must lie in 1..9 for padding 1; got 10"),
    (
        put("views", "kind", value="crop"),
        "spec.yaml.views.kind must be one of identity, crop-flip, resized-crop; got 'crop'",
    ),
    (
        put("views", value={**BOX, "size": 9}),
        "views.size must be at most the image side; got 9 for images of 8 x 8 pixels: write at most 8",
    ),
    (
        put("views", value={**BOX, "scale": [0, 1.5]}),
        "spec.yaml.views: views.scale must be two shares of the area in (0, 1], the smaller first; got [0.0, 1.5]",
    ),
    (
        put("views", value={**BOX, "size": 0, "ratio": [2, 1]}),
        "spec.yaml.views: views.size must be at least 1 pixel; got 0; "
        "views.ratio must be two ratios of width to height in 1/16..16, the smaller first; got [2.0, 1.0]",
    ),
    (
        put("views", value={"kind": "resized-crop", "size": 6}),
        "spec.yaml.views: resized-crop needs size (side in pixels) "
        "and count (views of each row, at least 1); got size 6 and count None",
    ),
    (put("views", "size", value=6), "spec.yaml.views: size: only for kind resized-crop; leave out of crop-flip"),
    (
        put("store", value={"rows_per_shard": 1000, "rows_per_chunk": 256}),
        "spec.yaml.store: rows_per_shard must be a multiple of rows_per_chunk; got 1000 % 256 = 232",
    ),
    (
        put("store", "rows_per_chunk", value=0),
        "spec.yaml.store: rows_per_shard and rows_per_chunk must be at least 1; got 32 and 0",
    ),
    (
        put("store", value={"rows_per_shard": 10**8, "rows_per_chunk": 10**8}),
        "store.rows_per_chunk is 100000000, but chunks must be below 2 GiB and a row of delta/pgd-vit has 384 bytes; "
        "write at most 5592405",
    ),
    (
        put("store", "logits", value="bfloat16"),
        "spec.yaml.store.logits must be one of float16, float32, top-k, int8; got 'bfloat16'",
    ),
    (lambda config: config.pop("teachers"), "spec.yaml: key 'teachers' is required"),
    (
        lambda config: config.update(teachers={}, attacks={"pgd": {"teacher": "cnn"}}),
        "spec.yaml: attack 'pgd' names teacher 'cnn', which is not there; teachers are none",
    ),
    (put("teachers", "cnn", value="teachers/cnn"), "spec.yaml.teachers.cnn must be a mapping; got 'teachers/cnn'"),
    (
        put("teachers", "cnn", "role", value="strong"),
        "spec.yaml.teachers.cnn.role must be one of robust, vanilla; got 'strong'",
    ),
    (
        put("teachers", "a b", value={"path": "x"}),
        "spec.yaml: teacher name 'a b' must be letters, digits, '_', '.' or '-'",
    ),
    (
        put("attacks", "../x", value=ATTACK),
        "spec.yaml: attack name '../x' must be letters, digits, '_', '.' or '-'",
    ),
    (put("attacks", "clean", value=ATTACK), "spec.yaml: attack name 'clean' is taken by the format"),
    (put("attacks", "jacobian", value=ATTACK), "spec.yaml: attack name 'jacobian' is taken by the format"),
    (put("attacks", "zarr.json", value=ATTACK), "spec.yaml: attack name 'zarr.json' is taken by the format"),
    (put("teachers", "zarr.json", value={"path": "x"}), "spec.yaml: teacher name 'zarr.json' is taken by the format"),
    (
        put("attacks", "a", value={**ATTACK, "teacher": "cnm"}),
        "spec.yaml: attack 'a' names teacher 'cnm', which is not there; did you mean 'cnn'?",
    ),
    (
        put("attacks", "a", value={**ATTACK, "teacher": "bit"}),
        "spec.yaml: attack 'a' names teacher 'bit', which is not there; did you mean 'vit'?",
    ),
    (
        put("attacks", "a", value={"kind": "pgd"}),
        "spec.yaml: attack 'a' names teacher None, which is not there; teachers are cnn, vit",
    ),
    (
        put("attacks", "a", value={**ATTACK, "kind": "pdg"}),
        "spec.yaml: attack 'a': kind must be one of pgd, fgsm, mim, apgd, apgd-t, fab-t, cw, cw-linf, square; "
        "got 'pdg'",
    ),
    (
        put("attacks", "a", value={**ATTACK, "step_size": 2}),
        "spec.yaml: attack 'a': unknown key 'step_size'; did you mean 'steps'?",
    ),
    (
        put("attacks", "a", value={**ATTACK, "eps": 0.03}),
        "spec.yaml: attack 'a': epsilon must be a whole number of pixel levels; got '0.03': 0.03 levels are not whole, "
        "and 0.03 is 7.6 levels as a share of 1: write 8 or 8/255",
    ),
    (
        put("attacks", "a", value={**ATTACK, "step": 0.007}),
        "spec.yaml: attack 'a': step is in whole pixel levels of 255; got 0.007, which is 1.79 levels: write step: 2",
    ),
    (
        put("attacks", "a", value={**ATTACK, "eps": 7.65}),
        "spec.yaml: attack 'a': epsilon must be a whole number of pixel levels; got '7.65': 7.65 levels are not whole, "
        "and 7.65 is 1950.8 levels as a share of 1: write 8 or 8/255",
    ),
    (
        put("attacks", "a", value={**ATTACK, "eps": 128}),
        "spec.yaml: attack 'a': a stored perturbation is int8, so eps is at most 127; got 128",
    ),
    (
        put("attacks", "a", value={**ATTACK, "norm": "l2", "eps": 1.0}),
        "spec.yaml: attack 'a': an L2 epsilon below 16 has two readings; got '1.0': 1 pixel levels are 0.0039, and 1 "
        "as a share of 1 is 255 levels: write 1/255 or 255/255",
    ),
    (
        put("attacks", "a", value={**ATTACK, "norm": "l2", "eps": "0.5/255"}),
        "spec.yaml: attack 'a': a stored perturbation is whole levels, so eps is at least 1; got 0.5",
    ),
    (put("attacks", "a", value={**ATTACK, "steps": 0}), "spec.yaml: attack 'a': steps must be at least 1; got 0"),
    (
        put("attacks", "a", value={**ATTACK, "eps": "eight"}),
        "spec.yaml: attack 'a': epsilon reads 8 or 8/255, in pixel levels above 0; got 'eight'",
    ),
    (
        put("attacks", "a", value={**ATTACK, "views": 0}),
        "spec.yaml: attack 'a': views must be a whole number of at least 1; got 0",
    ),
    (
        put("attacks", "a", value={**ATTACK, "views": True}),
        "spec.yaml: attack 'a': views must be a whole number of at least 1; got True",
    ),
    (put("attacks", "a", value={**ATTACK, "views": 10}), "attack 'a' asks for 10 views, the cache has 9"),
    (put("attacks", "a", value=3), "spec.yaml.attacks.a must be a mapping; got 3"),
    (put("seed", value=1.5), "spec.yaml.seed must be a whole number; got 1.5"),
]


@pytest.mark.parametrize(("change", "expected"), RULES, ids=[text[:60] for _, text in RULES])
def test_a_broken_rule(refusal, tmp_path: Path, change, expected):
    assert refusal(change) == expected
    assert not (tmp_path / "out").exists()


def test_all_problems_come_at_once(refusal):
    def change(config):
        config["attacks"] = {"clean": {**ATTACK, "eps": 0.03}, "b": {**ATTACK, "teacher": "x"}}

    assert refusal(change) == (
        "spec.yaml: attack name 'clean' is taken by the format; "
        "attack 'clean': epsilon must be a whole number of pixel levels; got '0.03': 0.03 levels are not whole, and "
        "0.03 is 7.6 levels as a share of 1: write 8 or 8/255; "
        "attack 'b' names teacher 'x', which is not there; teachers are cnn, vit"
    )


def test_a_teacher_with_another_class_count(refusal, tmp_path: Path):
    kwargs = {"width": 4, "blocks": [1, 1, 1, 1]}
    save_teacher(
        tmp_path / "hundred",
        build("resnet18", 100, kwargs),
        Card(arch="resnet18", kwargs=kwargs, num_classes=100, weights_sha256=""),
    )
    text = refusal(put("teachers", "other", value={"path": "hundred"}))
    assert text == "teacher 'other' has 100 classes, the data has 10"


def test_a_teacher_folder_that_is_not_there(refusal, tmp_path: Path):
    text = refusal(put("teachers", "other", value={"path": "nowhere"}))
    folder = tmp_path / "nowhere"
    assert text == (
        f"{folder} is not a teacher folder: {folder}/teacher.json is missing; darht-teacher train or import makes one"
    )


def test_a_cuda_device_that_is_not_there(invoke, variant, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    result = invoke("build", variant(), "--out", tmp_path / "out", "--device", "cuda:1")
    assert result.exit_code == 2
    assert result.output == "error: device cuda:1 is not there: torch sees 0 CUDA devices; use --device cpu or auto\n"


def test_a_spec_that_is_missing(invoke, tmp_path: Path):
    result = invoke("build", tmp_path / "no.yaml", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert result.output == f"error: cannot read {tmp_path}/no.yaml: No such file or directory\n"


def test_an_output_folder_with_another_spec(refusal, tiny_cache: Path):
    def change(config):
        config["seed"] = 4
        config["attacks"]["pgd-cnn"]["steps"] = 3
        config["store"]["rows_per_shard"] = 64

    assert refusal(change, out=tiny_cache) == (
        f"{tiny_cache} holds another spec: attacks.pgd-cnn.parameters.steps: 2 -> 3; "
        "seed: 10 -> 4; store.rows_per_shard: 32 -> 64; choose another --out folder"
    )


def test_an_output_folder_of_something_else(refusal, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    assert refusal() == f"{tmp_path}/out is not empty and holds no spec.json: choose a new or empty --out folder"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_the_config_of_the_tiny_cache(tiny_cache_config: Path):
    config = load_config(tiny_cache_config)
    assert list(config.teachers) == ["cnn", "vit"] and config.teachers["cnn"].role == "robust"
    assert (config.data.source, config.data.limit, config.views.padding, config.seed) == ("digits", 100, 1, 10)


def test_the_defaults_are_pinned():
    config = parse(CacheConfig, {"data": {"source": "digits"}, "teachers": {"a": {"path": "x"}}}, "x")
    assert canonical_json(config) == (
        '{"attacks":{},"data":{"holdout":0.02,"image_size":null,"limit":null,"root":null,"source":"digits",'
        '"split":"train"},"jacobians":{},"precision":{"amp":false,"tf32":false},"seed":0,"store":{"logits":"float16",'
        '"rows_per_chunk":128,"rows_per_shard":1024},"teachers":{"a":{"path":"x","role":"robust"}},'
        '"views":{"count":null,"flip":true,"kind":"crop-flip","padding":4}}\n'
    )


def test_an_attack_holds_all_its_parameters():
    spec = attack_spec("a", {"teacher": "t", "eps": 4}, ("t",))
    assert (spec.kind, spec.views) == ("pgd", 1)
    assert spec.parameters == {
        "eps": 4.0,
        "step": 2.0,
        "steps": 10,
        "norm": "linf",
        "objective": "ce",
        "random_start": True,
    }
    assert spec.attack() == PGD(eps=4)
    assert attack_spec("a", {"kind": "fgsm", "teacher": "t"}, ("t",)).attack() == FGSM()


def test_a_start_in_l2_has_rules_of_its_own():
    pgd = {"teacher": "t", "norm": "l2", "eps": 128, "step": 16}
    assert attack_spec("a", pgd, ("t",)).rules == 2
    assert {attack_spec("a", raw, ("t",)).rules for raw in (pgd | {"random_start": False}, {"teacher": "t"})} == {1}
    assert '"rules"' not in canonical_json(attack_spec("a", {"teacher": "t"}, ("t",)))
    with pytest.raises(ConfigError, match=r"rules of an attack are 3, this darht knows 1\.\.2"):
        AttackSpec("pgd", "t", 1, {}, rules=3)


def test_the_order_of_keys_does_not_matter(small, variant):
    def turn(config):
        for key in list(config):
            config[key] = config.pop(key)
        config["teachers"] = dict(reversed(config["teachers"].items()))

    assert canonical_json(small().spec) == canonical_json(small(turn).spec)


def test_paths_are_relative_to_the_yaml_and_know_the_home_folder(small, tmp_path, tiny_teachers, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "sub").symlink_to(tiny_teachers["cnn"])
    plain = small(put("teachers", value={"cnn": {"path": str(tiny_teachers["cnn"])}}))
    assert small(put("teachers", value={"cnn": {"path": "sub"}})).spec == plain.spec
    assert small(put("teachers", value={"cnn": {"path": "~/sub"}})).spec == plain.spec
    folder = tmp_path / "images"
    folder.mkdir()
    with pytest.raises(Exception, match=str(folder)):
        small(put("data", value={"source": "cifar10", "root": "~/images"}))


def test_a_resolved_spec_needs_all_class_counts_to_agree(small):
    plan = small()
    cards = {name: Card(arch="x", num_classes=n, weights_sha256="") for name, n in [("cnn", 10), ("vit", 11)]}
    config = parse(
        CacheConfig,
        yaml.safe_load("{data: {source: digits}, teachers: {cnn: {path: x}, vit: {path: y}}}"),
        "x",
    )
    with pytest.raises(ConfigError, match=r"^teacher 'vit' has 11 classes, the data has 10$"):
        resolve(config, plan.source, cards, 1)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("kind", list(ATTACKS))
def test_which_perturbations_are_whole_levels_is_known_without_the_attack(kind, norm):
    try:
        attack = ATTACKS[kind](eps=8, norm=norm)
    except (ConfigError, TypeError):
        pytest.skip(f"{kind} has no {norm}")
    spec = AttackSpec(kind, "t", 1, {"eps": 8.0, "norm": norm})
    assert (spec.scale == 1.0) is attack.whole_levels
    assert spec.scale == (1.0 if attack.whole_levels else 8 / 127)


def test_shards_are_as_many_as_can_be_looked_at(tiny_cache: Path):
    spec = read_spec(tiny_cache)
    data = dataclasses.replace(spec.data, rows=100_001)
    with pytest.raises(ConfigError, match="an array may have 100,000 shards; 100001 rows in shards of 1 are 100001"):
        dataclasses.replace(spec, data=data, store=StoreSpec(1, 1))
    assert dataclasses.replace(spec, data=data, store=StoreSpec(2, 1)).data.rows == 100_001


def test_a_cache_s_yaml_may_write_a_share_of_255(variant):
    def shares(config):
        config["attacks"] = {"a": {**ATTACK, "eps": "8/255", "step": "2/255"}}

    config = load_config(variant(shares))
    assert attack_spec("a", config.attacks["a"], ("cnn",)).parameters["eps"] == 8.0


@pytest.mark.parametrize(
    ("norm", "written"), [("linf", 8), ("linf", 8.0), ("linf", "8/255"), ("l2", "8/255"), ("l2", 16)]
)
def test_a_radius_in_a_file_means_what_it_means_on_a_command_line(norm, written):
    raw = {"kind": "pgd", "teacher": "t", "eps": written, "norm": norm}
    assert attack_spec("a", raw, ("t",)).eps == parse_eps(str(written), norm)


@given(st.floats(0.001, 15.9), st.sampled_from(["linf", "l2"]))
def test_what_a_command_line_refuses_a_file_does_too(value, norm):
    said = []
    for read in (lambda: parse_eps(str(value), norm),
                 lambda: attack_spec("a", {"teacher": "t", "eps": value, "norm": norm}, ("t",))):  # fmt: skip
        try:
            read()
            said.append("")
        except ConfigError as error:
            said.append(str(error).removeprefix("attack 'a': "))
    assert said[0] == said[1]
