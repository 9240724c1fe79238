"""Teachers: trained by the loop of students, from a source that nobody built a cache of."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from built import sealed_cache
from PIL import Image
from runs import log

from darht.cache.builder.config import ViewConfig
from darht.cache.builder.teachers import CARD, WEIGHTS, load_teacher, read_card, save_teacher
from darht.cache.read.reader import open_cache
from darht.cache.sources.encoded import EncodedImages
from darht.cache.sources.load import load_source
from darht.core.config import to_plain
from darht.core.errors import CacheError, ConfigError, ModelError, SpecMismatchError
from darht.trainer.config import AverageConfig, InnerConfig, OptimConfig, StudentConfig, WarmConfig
from darht.trainer.state.checkpoint import CHECKPOINT, RUN, cache_of
from darht.trainer.student import checkpoints
from darht.trainer.student.train import Callbacks, train
from darht.trainer.teacher.cli import opened
from darht.trainer.teacher.config import TeachConfig, load_teaching
from darht.trainer.teacher.train import TRAINING, check_free, expected_card, finish, is_finished, teach

CPU = torch.device("cpu")
NET = StudentConfig(arch="resnet18", kwargs={"width": 4, "blocks": [1, 1, 1, 1]}, feature_map=False)
VIEWS = ViewConfig(padding=1, flip=False)
OPTIM = OptimConfig(epochs=3, batch_size=64, lr=0.05, schedule="constant")
INNER = InnerConfig(eps=8, step=4, steps=2)


@pytest.fixture(scope="module")
def digits():
    return load_source("digits", None, "train", limit=256)


def settings(algorithm="pgd-at", **changes):
    inner = replace(INNER, kind="fat" if algorithm == "fat" else "pgd")
    return TeachConfig(algorithm=algorithm, **({"optim": OPTIM, "inner": inner, "views": VIEWS} | changes))


def weights(folder):
    return load_teacher(folder, CPU)[0].state_dict()


def assert_same(one, other):
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("algorithm", ["standard", "pgd-at", "trades", "fat"])
def test_every_algorithm_lowers_its_loss(algorithm, digits, tmp_path):
    loss = {"beta": 1.0} if algorithm == "trades" else {}
    card = teach(settings(algorithm, loss=loss), digits, NET, tmp_path, device=CPU)
    rows = log(tmp_path / TRAINING)
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]
    assert (rows[0]["train_adversarial"] is None) == (algorithm == "standard")
    assert card.training["algorithm"] == algorithm
    assert card.training["average"]["kind"] == ("none" if algorithm == "standard" else "ema")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """1,000 digits as PNG files."""
    source = load_source("digits", None, "train", limit=1000)
    root = tmp_path_factory.mktemp("digits")
    for number, (image, label) in enumerate(zip(source.images, source.labels, strict=True)):
        path = root / "train" / str(label) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.transpose(1, 2, 0)).save(path)
    return root


def test_a_teacher_of_files_that_are_read_is_that_of_files_that_are_loaded(folder, tmp_path):
    config = settings("standard", optim=replace(OPTIM, epochs=1))
    sources = (load_source("imagefolder", folder, "train"), opened("imagefolder", folder, "train"))
    cards = [teach(config, one, NET, tmp_path / str(k), device=CPU) for k, one in enumerate(sources)]
    assert cards[0] == cards[1]
    assert_same(tmp_path / "0", tmp_path / "1")


def test_files_above_the_memory_are_decoded_in_pieces_and_never_all_held(folder, tmp_path, monkeypatch):
    source, decoded, read = opened("imagefolder", folder, "train"), [], EncodedImages.__getitem__

    def spy(images, rows):
        decoded.append(len(range(*rows.indices(len(images)))))
        return read(images, rows)

    monkeypatch.setattr(EncodedImages, "__getitem__", spy)
    config = settings("standard", optim=replace(OPTIM, epochs=2), holdout=0.1)
    teach(config, source, NET, tmp_path, device=CPU, memory_gib=0.95 * 1000 * 200 / 2**30)
    assert "streamed" in json.loads((tmp_path / TRAINING / RUN).read_text())["feed"]
    assert max(decoded) <= 64
    assert log(tmp_path / TRAINING)[-1]["holdout_clean"] > 10


def test_a_teacher_is_the_student_of_a_cache_without_teachers(digits, tmp_path):
    """The same bits as `darht-cache build` with `teachers: {}` and `darht-train` give, held-out rows and all."""
    config = settings(holdout=0.1, seed=3, optim=replace(OPTIM, epochs=2))
    teach(config, digits, NET, tmp_path / "teacher", device=CPU)
    data = {"source": "digits", "limit": 256, "holdout": 0.1}
    spec = {"data": data, "teachers": {}, "views": to_plain(VIEWS), "seed": 3}
    cache = open_cache(sealed_cache(spec, tmp_path))
    train(config.recipe(NET), cache, tmp_path / "student", device=CPU)
    assert log(tmp_path / "teacher" / TRAINING) == log(tmp_path / "student")
    assert_same(tmp_path / "teacher", tmp_path / "student")


def test_the_card_says_how_and_on_what(digits, tmp_path):
    average = AverageConfig(kind="none")
    config = settings(optim=OptimConfig(epochs=1, batch_size=128), average=average, seed=5)
    card = teach(config, digits, replace(NET, resize=12), tmp_path, device=CPU)
    assert card == read_card(tmp_path)
    assert (card.arch, card.kwargs, card.num_classes) == (NET.arch, NET.kwargs, 10)
    assert card.training == {"eps": 8.0, **to_plain(config)}
    assert card.data == {"source": "digits", "split": "train", "rows": 256, "sha256": digits.sha256}
    pixels = digits.images / 255
    np.testing.assert_allclose(card.preprocessing.mean, pixels.mean((0, 2, 3)), atol=1e-4)
    np.testing.assert_allclose(card.preprocessing.std, pixels.std((0, 2, 3)), atol=1e-4)
    assert load_teacher(tmp_path, CPU)[0].preprocess(torch.zeros(1, 3, 8, 8)).shape == (1, 3, 12, 12)
    assert CARD in {path.name for path in tmp_path.iterdir()}
    with pytest.raises(CacheError, match="does not say where its cache lay"):
        cache_of(tmp_path / TRAINING)


@pytest.mark.parametrize("kind", ["warm", "n-fgsm"])
def test_a_teacher_of_one_step_is_watched_for_collapse(kind, digits, tmp_path):
    config = load_teaching({"inner": {"kind": kind}}, ("optim.epochs=2", "optim.batch_size=64", "views.padding=1"))
    teach(config, digits, NET, tmp_path, device=CPU)
    assert all("training_pgd" in row for row in log(tmp_path / TRAINING))
    assert any(path.name.startswith("memory") for path in (tmp_path / TRAINING).iterdir()) == (kind == "warm")
    finish(tmp_path)
    assert sorted(path.name for path in (tmp_path / TRAINING).iterdir()) == ["log.csv", "log.jsonl", RUN]


def test_what_a_command_line_says():
    assert load_teaching({"algorithm": "pgd-at"}) == load_teaching({}) == TeachConfig()
    config = load_teaching(
        {"algorithm": "trades", "inner": {"kind": "warm"}},
        ("loss.beta=4", "inner.eps=4", "inner.warm.reset=40", "views.flip=false"),
    )
    warm = WarmConfig(start="noise", reset=40)
    assert (config.loss, config.inner) == ({"beta": 4}, InnerConfig(kind="warm", eps=4, warm=warm))
    assert config.views == ViewConfig(flip=False) and config.compute.channels_last
    assert load_teaching({"algorithm": "fat"}, ("inner.tau=3", "loss.smoothing=null")).inner.tau == 3
    assert load_teaching({"inner": {"kind": "warm"}}, ("inner.warm.start=zero",)).inner.warm.start == "zero"
    for old, new in (("eps=8", "inner.eps=8"), ("beta=1", "loss.beta=1"), ("compile=true", "compute.compile=true")):
        with pytest.raises(ConfigError, match=f"--set {old[: old.index('=')]} is called .* now: write --set {new}"):
            load_teaching({}, (old,))


@pytest.mark.parametrize(
    ("config", "network", "message"),
    [
        (settings(), StudentConfig(arch="timm:vit_tiny_patch16_224", kwargs={"depth": 1}), "images of 8x8 pixels"),
        (settings(views=ViewConfig(padding=8)), NET, "padding must be smaller than the image side; got 8"),
        (settings(optim=OptimConfig(batch_size=257)), NET, "got 257 for 256 rows"),
        (settings(inner=InnerConfig(kind="warm")), NET, "the train split of digits has no attacks; use start: noise"),
        (settings(inner=InnerConfig(kind="cached")), NET, "the train split of digits has no attacks; use inner.kind"),
    ],
)  # fmt: skip
def test_what_does_not_go_together(config, network, message, digits, tmp_path):
    with pytest.raises((ConfigError, ModelError), match=message):
        teach(config, digits, replace(network, feature_map=False), tmp_path, device=CPU)


def test_a_stopped_training_goes_on_to_the_same_bits(digits, tmp_path):
    config = settings("fat")
    teach(config, digits, NET, tmp_path / "whole", device=CPU)
    for stop in (2, 5):  # within the first epoch, and within the second

        def on_step(step, *_, stop=stop):
            if step == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            teach(config, digits, NET, tmp_path / "cut", device=CPU, resume=True, callbacks=Callbacks(on_step=on_step))
    made = []
    callbacks = Callbacks(on_step=lambda step, *_: made.append(step))
    teach(config, digits, NET, tmp_path / "cut", device=CPU, resume=True, callbacks=callbacks)
    assert made == list(range(6, 13))
    assert_same(tmp_path / "whole", tmp_path / "cut")
    with pytest.raises(SpecMismatchError, match=r"recipe\.loss\.smoothing: 0\.0 -> 0\.1"):
        teach(replace(config, loss={"smoothing": 0.1}), digits, NET, tmp_path / "cut", device=CPU, resume=True)


def test_a_training_that_is_killed_costs_its_epoch(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "EVERY", 0.0)
    config = settings("standard")
    made = []

    def on_step(step, *_):
        made.append(step)
        if step == 7:
            raise RuntimeError("as a kill")

    with pytest.raises(RuntimeError, match="as a kill"):
        teach(config, digits, NET, tmp_path / "cut", device=CPU, callbacks=Callbacks(on_step=on_step))
    callbacks = Callbacks(on_step=lambda step, *_: made.append(step))
    teach(config, digits, NET, tmp_path / "cut", device=CPU, resume=True, callbacks=callbacks)
    assert made == [*range(1, 8), *range(5, 13)]
    teach(config, digits, NET, tmp_path / "whole", device=CPU)
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_what_is_free_to_train_into(tmp_path):
    check_free(tmp_path)
    check_free(tmp_path / "new", resume=True)  # a script may ask for it from the start
    (tmp_path / "file").write_text("")
    for folder, said in (
        (tmp_path, "is not empty"),
        (tmp_path / "file", "is a file: choose a new or empty --out folder"),
    ):
        with pytest.raises(CacheError, match=said):
            check_free(folder, resume=True)
    (tmp_path / TRAINING).mkdir()
    (tmp_path / TRAINING / RUN).write_bytes(b"")
    check_free(tmp_path, resume=True)
    with pytest.raises(CacheError, match="--resume goes on with it"):
        check_free(tmp_path)


def test_a_teacher_is_finished_when_its_checkpoint_is_gone(digits, tmp_path):
    """A kill between any two files that are written or removed at the end leaves what `--resume` goes on with."""
    config = settings("standard", optim=OptimConfig(epochs=1, batch_size=128))
    expected = expected_card(config, digits, NET)
    assert not is_finished(tmp_path, expected)
    card = teach(config, digits, NET, tmp_path, device=CPU)
    before = (tmp_path / WEIGHTS).read_bytes()
    assert not is_finished(tmp_path, expected)  # measuring was stopped
    for name in (CARD, WEIGHTS):  # killed before they were written
        (tmp_path / name).unlink()
        check_free(tmp_path, resume=True)
        assert teach(config, digits, NET, tmp_path, device=CPU, resume=True) == card
    assert (tmp_path / WEIGHTS).read_bytes() == before
    (tmp_path / TRAINING / CHECKPOINT).unlink()  # killed in `finish`
    assert is_finished(tmp_path, expected)
    finish(tmp_path)
    assert sorted(path.name for path in (tmp_path / TRAINING).iterdir()) == ["log.csv", "log.jsonl", RUN]
    check_free(tmp_path, resume=True)
    with pytest.raises(CacheError, match="is not empty"):
        check_free(tmp_path)
    assert is_finished(tmp_path, expected)
    with pytest.raises(SpecMismatchError, match=r"data\.rows: 256 -> 255"):
        is_finished(tmp_path, replace(expected, data=expected.data | {"rows": 255}))


def test_a_folder_of_the_time_before_is_a_teacher(digits, tmp_path):
    """When teachers had a loop of their own, cards named its settings, and nothing lay beside them."""
    card = teach(settings("standard", optim=replace(OPTIM, epochs=1)), digits, NET, tmp_path / "new", device=CPU)
    old = replace(card, training={"algorithm": "standard", "eps": 8.0, "tau": 1, "padding": 1})
    saved = save_teacher(tmp_path / "old", load_teacher(tmp_path / "new", CPU)[0].net, old)
    assert load_teacher(tmp_path / "old", CPU)[1] == saved
    assert_same(tmp_path / "old", tmp_path / "new")
