"""A file of tensors comes back as it was, or is named as damaged."""

import pytest
import torch

from darht.core.errors import CacheError
from darht.core.tensors import load_tensors, save_tensors


@pytest.mark.parametrize("lazily", [False, True])
def test_what_is_saved_comes_back(tmp_path, lazily):
    state = {"a": torch.arange(5), "b": {"c": [1, "two", None]}}
    save_tensors(tmp_path / "state.pt", state)
    found = load_tensors(tmp_path / "state.pt", lazily=lazily)
    assert torch.equal(found.pop("a"), state["a"]) and found == {"b": state["b"]}
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04", b"<html>", None], ids=["empty", "no zip", "a page", "cut"])
@pytest.mark.parametrize("lazily", [False, True])
def test_a_damaged_file_is_named(tmp_path, damage, lazily):
    path = tmp_path / "state.pt"
    save_tensors(path, {"a": torch.zeros(10_000)})
    path.write_bytes(path.read_bytes()[:-1000] if damage is None else damage)
    with pytest.raises(CacheError, match=r"state\.pt is damaged \(.+\): remove it") as caught:
        load_tensors(path, lazily=lazily)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("lazily", [False, True])
def test_nobody_is_told_to_remove_a_file_that_is_whole(tmp_path, monkeypatch, lazily):
    path = tmp_path / "state.pt"
    path.mkdir()  # cannot be opened, by root either
    with pytest.raises(CacheError, match=r"state\.pt cannot be read: ") as caught:
        load_tensors(path, lazily=lazily)
    assert "remove" not in str(caught.value).replace(str(tmp_path), "")  # the folder bears this test's name
    path.rmdir()
    save_tensors(path, {})

    def full(*_, **__):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(torch.OutOfMemoryError):
        load_tensors(path, lazily=lazily)
