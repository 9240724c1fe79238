"""Teachers packed to be given to others: half of the bytes, nearly the same answers, a card that says where from."""

import pytest
import torch
from click.testing import CliRunner
from runs import CONFIG, CPU, changed

from darht.cache.builder.teachers import CARD, WEIGHTS, load_teacher, read_card
from darht.cache.read.webdataset import open_shards
from darht.core import zoo
from darht.core.errors import CacheError
from darht.trainer.cli import teacher
from darht.trainer.student.train import train
from darht.trainer.teacher.pack import pack_teacher


def test_kernels_are_halved_and_answers_stay(folder, tmp_path):
    card = pack_teacher(folder, tmp_path / "out")
    model, _ = load_teacher(folder, CPU)
    packed, again = load_teacher(tmp_path / "out", CPU)
    x = torch.rand(16, 1, 8, 8)
    assert (packed(x) - model(x)).abs().max() < 0.01
    assert (tmp_path / "out" / WEIGHTS).stat().st_size < 0.7 * (folder / WEIGHTS).stat().st_size
    assert again == card and not card.accuracy and card.arch == read_card(folder).arch


def test_what_is_packed_again_has_the_same_weights(folder, tmp_path):
    first = pack_teacher(folder, tmp_path / "first")
    second = pack_teacher(tmp_path / "first", tmp_path / "second")
    assert first.weights_sha256 == second.weights_sha256


def test_of_a_run_the_card_says_how_it_was_trained(tiny_cache, tmp_path):
    config = changed(recipe="at", optim={"epochs": 1})
    train(config, open_shards(tiny_cache), tmp_path / "run", device=CPU)
    card = pack_teacher(tmp_path / "run", tmp_path / "out")
    spec = open_shards(tiny_cache).spec
    assert card.training["algorithm"] == "at" and card.training["eps"] == CONFIG.inner.eps
    assert card.training["cache_root_hash"] == open_shards(tiny_cache).root_hash
    assert card.data == {
        "source": spec.data.source,
        "split": "train",
        "rows": spec.data.rows,
        "sha256": spec.data.sha256,
    }


def test_nothing_is_overwritten(folder, tmp_path):
    before = (folder / CARD).read_bytes()
    with pytest.raises(CacheError, match="choose a new or empty --out folder"):
        pack_teacher(folder, folder)
    assert (folder / CARD).read_bytes() == before


def test_the_commands_pack_and_list(folder, digits, tmp_path, monkeypatch):
    run = CliRunner()
    made = run.invoke(teacher, ["pack", str(folder), "--out", str(tmp_path / "digits-cnn")])
    assert made.exit_code == 0, made.output
    assert "bytes, weights" in made.output
    checked = run.invoke(teacher, ["check", str(tmp_path / "digits-cnn"), "--data", "digits", "--allow", "digits-cnn"])
    assert checked.exit_code == 0, checked.output
    monkeypatch.setattr(zoo, "zoo", lambda: {"digits-cnn": tmp_path / "digits-cnn"})
    listed = run.invoke(teacher, ["list"])
    figures = read_card(tmp_path / "digits-cnn").accuracy["digits test"]
    assert "zoo:digits-cnn" in listed.output and f"{figures['clean']:.1f}" in listed.output
