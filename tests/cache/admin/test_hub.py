"""A cache that goes to a stand-in of the hub, is read from there, and pulled; teachers and students from there."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from hub_server import LARGE, TOKEN, Hub, hub_server
from runs import write_student

import darht
from darht.cache.admin.copies import pull, push
from darht.cache.admin.verify import verify
from darht.cache.export.webdataset import export_webdataset
from darht.cache.read.local_copy import CopySettings
from darht.cache.read.reach import Reach
from darht.cache.read.reader import open_cache
from darht.core import hub as names
from darht.core import storage_hub
from darht.core.errors import ConfigError, DarhtError, SpecMismatchError

ADDRESS = "hf://datasets/me/cache"
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the hub's client against httpx


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with hub_server() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("DARHT_TOKEN", "for another server")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        names.forget_commits()
        yield server


def test_a_cache_goes_to_the_hub_and_is_read_from_there(hub: Hub, fine_cache: Path, tmp_path: Path):
    here = open_cache(fine_cache)
    sent = push(fine_cache, ADDRESS)
    files = hub.repos["datasets/me/cache"]
    assert sent.files == len(files) - 2 and sent.there == 0 and "origin.json" not in files
    there = open_cache(ADDRESS)
    assert there.root_hash == here.root_hash == sent.root_hash and str(there.folder) == ADDRESS
    for name in ("label", "image", "logits/cnn/clean"):
        assert np.array_equal(there.read(name), here.read(name))
    pull(ADDRESS, tmp_path / "out")
    assert verify(tmp_path / "out") == []
    assert {token for _, path, token in hub.asked if path.startswith("/large/")} == {""}  # the token stays with the hub
    assert {token for _, path, token in hub.asked if not path.startswith("/large/")} == {TOKEN}
    assert any(len(data) >= LARGE for data in files.values())


def test_the_dataset_card_and_what_is_not_sent_again(hub: Hub, fine_cache: Path, tmp_path: Path):
    push(fine_cache, ADDRESS)
    files = hub.repos["datasets/me/cache"]
    front, text = files["README.md"].decode().removeprefix("---\n").split("\n---\n")
    about = yaml.safe_load(front)
    assert about["task_categories"] == ["image-classification"] and about["size_categories"] == ["n<1K"]
    assert "darht-train --shards hf://datasets/me/cache" in text and open_cache(fine_cache).root_hash in text
    assert "| vit | timm:vit_tiny_patch16_224 |" in text and "| pgd-vit | pgd | vit | 2 | 32/255 |" in text
    assert json.loads(files["croissant.json"])["@type"] == "sc:Dataset"
    files["README.md"] = b"what people wrote"
    del files["manifest.json"]
    again = push(fine_cache, ADDRESS)
    assert again.files == 1 and files["README.md"] == b"what people wrote"
    hub.asked.clear()
    assert push(fine_cache, ADDRESS).files == 0
    assert not [path for method, path, _ in hub.asked if method == "POST" and "commit" in path]


def test_of_another_state_nothing_looks_whole_while_files_are_sent(
    hub: Hub, fine_cache: Path, tmp_path: Path, monkeypatch
):
    push(fine_cache, ADDRESS)
    files = hub.repos["datasets/me/cache"]
    monkeypatch.setattr(storage_hub, "_FILES", 5)
    files["manifest.json"] = files["index.json"] = b"of another state"
    shards = [key for key in files if "/c/" in key]
    for key in shards[:8]:
        files[key] = b"of another state"
    seen = []
    commit = hub.commit

    def watch(repo: str, body: bytes) -> dict:
        found = commit(repo, body)
        seen.append({"manifest.json", "index.json"} & files.keys())
        return found

    monkeypatch.setattr(hub, "commit", watch)
    with pytest.raises(
        SpecMismatchError, match=r"index\.json describes what this version does not know, .* another URL"
    ):
        push(fine_cache, ADDRESS)
    export_webdataset(open_cache(fine_cache), tmp_path / "tars", "blocks")
    files["index.json"] = (tmp_path / "tars" / "index.json").read_bytes()
    names.forget_commits()
    push(fine_cache, ADDRESS)
    assert seen == [set(), {"manifest.json"}] and verify(ADDRESS) == []


def test_each_shard_crosses_the_network_once(hub: Hub, fine_cache: Path, tmp_path: Path):
    push(fine_cache, ADDRESS)
    cache = open_cache(ADDRESS, Reach(CopySettings(tmp_path / "copies", 1 << 30)))
    assert sum(path.startswith("/api") for _, path, _ in hub.asked[-4:]) <= 1
    for _ in range(2):
        cache.read("image")
    hub.asked.clear()
    cache.read("image")
    assert hub.asked == []


def test_teachers_and_students_from_the_hub(hub: Hub, tiny_teachers: dict[str, Path], tmp_path: Path):
    write_student(tmp_path / "student", 0)
    for name, folder in (("net", tiny_teachers["cnn"]), ("student", tmp_path / "student")):
        hub.repos[f"models/me/{name}"] = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.repos["models/me/net"]["code.py"] = b"is not fetched"
    x = torch.rand(2, 3, 8, 8)
    teacher = darht.load_teacher("hf://me/net", "cpu")
    assert torch.equal(teacher(x), darht.load_teacher(tiny_teachers["cnn"], "cpu")(x))
    student = darht.load_student("hf://me/student", "cpu")
    assert torch.equal(student(x), darht.load_student(tmp_path / "student", "cpu")(x))
    assert not [path for _, path, _ in hub.asked if "code.py" in path]
    config = {"data": {"source": "digits", "limit": 60}, "teachers": {"one": {"path": "hf://me/net"}}}
    assert darht.build_cache(config, tmp_path / "cache", device="cpu", allow=["one"]).teachers == ("one",)


def test_what_the_hub_does_not_have(hub: Hub, fine_cache: Path):
    with pytest.raises(DarhtError, match="the hub has no such repository or revision, or you may not read it"):
        open_cache("hf://datasets/me/nothing")
    with pytest.raises(ConfigError, match="a cache goes to a dataset of the hub"):
        push(fine_cache, "hf://me/net")
    push(fine_cache, ADDRESS)
    with pytest.raises(DarhtError, match="darht-cache push it to hf://datasets/me/cache"):
        open_cache(ADDRESS).folder.write("x", b"")
    shutil.rmtree(huggingface_hub.constants.HF_HUB_CACHE, ignore_errors=True)
