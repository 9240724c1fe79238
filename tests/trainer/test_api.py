"""The public calls: what they make of their arguments."""

from pathlib import Path

import pytest

from darht.trainer import api
from darht.trainer.evaluation.config import EvalConfig

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
