"""Names of the hub, and what is told of a repository that is not there."""

import pytest
from huggingface_hub import errors

from darht.core.errors import ConfigError, DarhtError, UnreachableError
from darht.core.hub import ask_hub, fetched, hub_credentials, is_hub, parse_hub


@pytest.mark.parametrize("text", ["hf://datasets/me/cache", "hf://me/net@v1.0", "hf://datasets/me/c@abc/sub/folder"])
def test_a_name_is_written_as_it_is_read(text):
    assert str(parse_hub(text)) == text and is_hub(text)
    assert parse_hub(text.replace("hf://", "hf:/")) == parse_hub(text)


@pytest.mark.parametrize("text", ["hf://net", "hf://datasets/me", "hf://me/net/../other", "hf://me/net?x=1", "hf://"])
def test_other_names_are_refused(text):
    with pytest.raises(ConfigError, match="a name of the hub reads hf://datasets/USER/NAME or hf://USER/NAME"):
        parse_hub(text)


def test_a_dataset_is_no_teacher(tmp_path):
    with pytest.raises(ConfigError, match="is a dataset, so a cache"):
        fetched(type(tmp_path)("hf://datasets/me/cache"))
    assert fetched(tmp_path) == tmp_path


def test_the_hubs_token_is_for_the_hub_alone(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    assert hub_credentials("https://huggingface.co/datasets/me/c/resolve/abc") == {"Authorization": "Bearer hf_x"}
    assert hub_credentials("https://elsewhere.org/huggingface.co/x") is None


@pytest.mark.parametrize(
    ("error", "told", "text"),
    [
        (errors.HTTPError("connection refused"), UnreachableError, "cannot read it: 1 tries .*connection refused"),
        (errors.OfflineModeIsEnabled("offline"), DarhtError, "HF_HUB_OFFLINE keeps the hub from being asked; unset it"),
    ],
)
def test_a_hub_that_is_away_is_waited_for_and_one_that_may_not_be_asked_is_not(error, told, text):
    def ask():
        raise error

    with pytest.raises(told, match=text):
        ask_hub(ask, "read it", retry_for=0)
