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
