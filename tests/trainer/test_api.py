"""The public calls: what they make of their arguments."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from darht.cache.builder.teachers import read_card
from darht.core.errors import CacheError, ConfigError
from darht.trainer import api
from darht.trainer.cli import teacher
from darht.trainer.evaluation.config import EvalConfig
from darht.trainer.teacher.config import TeachConfig, load_teaching

GIVEN = EvalConfig(data="cifar10", root=Path("there"), eps=4, limit=7, teachers={"one": "folder"})


@pytest.fixture
def chosen(monkeypatch):
    """The configurations that evaluations were asked for."""
    configs = []
    monkeypatch.setattr(api, "evaluate_target", lambda text, config, **rest: configs.append(config))
    return configs


def test_an_option_that_is_none_says_so(chosen):
    api.evaluate("run", teachers=None, device="cpu")
    api.evaluate("run", config=GIVEN, eps=None, limit=None, device="cpu")
    assert chosen[0].teachers is None
    assert (chosen[1].eps, chosen[1].limit, chosen[1].teachers) == (None, None, {"one": "folder"})


def test_data_and_root_that_are_left_out_stay_as_the_config_has_them(chosen):
    api.evaluate("run", config=GIVEN, device="cpu")
    api.evaluate("run", "digits", root="here", config=GIVEN, device="cpu")
    assert chosen[0] == GIVEN
    assert (chosen[1].data, chosen[1].root, chosen[1].eps) == ("digits", Path("here"), 4)


DATA = {"source": "digits", "limit": 96}
KWARGS = {"width": 4, "blocks": [1, 1, 1, 1]}
NETWORK = {"arch": "resnet18", "kwargs": KWARGS}
SHORT = {
    "inner": {"kind": "warm", "eps": 32, "warm": {"check_rows": 0}},
    "optim": {"epochs": 1, "batch_size": 32},
    "views": {"padding": 1, "flip": False},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A teacher's folder, its card as it was given back, and the log's rows that were told."""
    out, rows = tmp_path_factory.mktemp("teacher") / "warm", []
    card = api.train_teacher(SHORT, DATA, NETWORK, out, device="cpu", on_epoch=rows.append)
    return out, card, rows


def test_a_teacher_from_python_is_that_of_the_command_line(trained, tmp_path):
    out, card, rows = trained
    words = ["train", "--data", "digits", "--limit", "96", "--arch", "resnet18", "--kwargs", json.dumps(KWARGS)]
    words += ["--inner", "warm", "--device", "cpu", "--out", str(tmp_path / "typed")]
    settings = ("inner.eps=32", "inner.warm.check_rows=0", "optim.epochs=1", "optim.batch_size=32", "views.padding=1")
    for setting in (*settings, "views.flip=false"):
        words += ["--set", setting]
    result = CliRunner().invoke(teacher, words)
    assert result.exit_code == 0, result.output
    assert card == read_card(out) == read_card(tmp_path / "typed")
    assert card.accuracy["digits test"]["eps"] == 32 and card.data["rows"] == 96
    assert [row["epoch"] for row in rows] == [1]


def test_a_teacher_that_is_there_stays_and_another_is_refused(trained):
    out, card, _ = trained
    with pytest.raises(CacheError, match="is not empty"):
        api.train_teacher(SHORT, DATA, NETWORK, out, device="cpu")
    assert api.train_teacher(load_teaching(SHORT), DATA, NETWORK, out, device="cpu", resume=True) == card
    with pytest.raises(CacheError, match="holds another teacher"):
        api.train_teacher({**SHORT, "seed": 1}, DATA, NETWORK, out, device="cpu", resume=True)


@pytest.mark.parametrize(
    ("config", "data", "network", "message"),
    [
        ({"algoritm": "fat"}, DATA, NETWORK, "algoritm"),
        ({}, {**DATA, "holdout": 0.1, "share": 0.5}, NETWORK, "got holdout, share too: leave it out"),
        ({}, {**DATA, "sauce": 1}, NETWORK, "sauce"),
        ({}, DATA, {"kwargs": {}}, "a network has arch, and may have kwargs and resize; got kwargs"),
        ({}, DATA, {**NETWORK, "feature_map": True}, "got arch, kwargs, feature_map"),
    ],
)
def test_a_wrong_teacher_is_refused_in_one_line(config, data, network, message, tmp_path):
    with pytest.raises(ConfigError, match=message) as caught:
        api.train_teacher(config, data, network, tmp_path / "new", device="cpu")
    assert "\n" not in str(caught.value) and not (tmp_path / "new").exists()


def test_a_mapping_has_the_defaults_of_the_command_line():
    assert load_teaching({}) == TeachConfig()
    assert load_teaching({"algorithm": "fat", "inner": {"tau": 3}}).inner.kind == "fat"
    assert load_teaching({"compute": {"compile": True}}).compute.channels_last
    given = {"inner": {"kind": "warm", "warm": {"reset": 4}}}
    assert load_teaching(given).inner.warm.start == "noise" and given["inner"]["warm"] == {"reset": 4}
