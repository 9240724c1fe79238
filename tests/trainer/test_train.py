"""A student trained from a sealed cache: the same bits again, whatever interrupts it, and every refusal."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import yaml

import darht.trainer.train as trainer
from darht.cache.build import build, plan_build
from darht.cache.loader import load_training_set
from darht.cache.reader import open_cache
from darht.cache.seal import seal
from darht.core.errors import CacheError, ConfigError, DarhtError, ModelError, SpecMismatchError
from darht.trainer.checkpoint import BEST, CHECKPOINT, LAST, Progress, StudentCard, load_student
from darht.trainer.config import InnerConfig, OptimConfig, StudentConfig, TrainConfig
from darht.trainer.schedule import make_optimizer
from darht.trainer.train import check_pixels, make_student, normalisation, save_epoch, score_holdout, train

CPU = torch.device("cpu")
TIMINGS = ("seconds", "images_per_second")
CONFIG = TrainConfig(
    student=StudentConfig(arch="resnet18", kwargs={"width": 4, "blocks": [1, 1, 1, 1]}),
    inner=InnerConfig(eps=32, step=8, steps=2),
    optim=OptimConfig(epochs=3, batch_size=32, lr=0.05, warmup=0.2, schedule="cosine", clip_norm=5.0),
    phases=(0.2, 0.6),
    seed=7,
)
VIT = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
DROPOUT = dataclasses.replace(
    CONFIG, student=StudentConfig(arch="timm:vit_tiny_patch16_224", kwargs={**VIT, "proj_drop_rate": 0.3}), recipe="at"
)


@pytest.fixture(scope="module")
def cache(tiny_cache):
    return open_cache(tiny_cache)


@pytest.fixture(scope="module")
def plain_cache(tiny_teachers, tmp_path_factory):
    """40 digits, one view, a vanilla teacher, no attacks, nothing held out."""
    folder = tmp_path_factory.mktemp("plain")
    config = {
        "data": {"source": "digits", "limit": 40, "holdout": 0.0},
        "teachers": {"cnn": {"path": str(tiny_teachers["cnn"]), "role": "vanilla"}},
        "views": {"kind": "identity"},
        "store": {"rows_per_shard": 64, "rows_per_chunk": 64},
    }
    (folder / "cache.yaml").write_text(yaml.safe_dump(config))
    plan = plan_build(folder / "cache.yaml", device=CPU)
    build(plan, folder / "cache", device=CPU, on_unit=lambda array, shard, seconds: None)
    seal(folder / "cache")
    return open_cache(folder / "cache")


def changed(config=CONFIG, **changes):
    """The recipe with changes, those of `optim` and `inner` given as dictionaries."""
    nested = {
        key: dataclasses.replace(getattr(config, key), **value) if isinstance(value, dict) else value
        for key, value in changes.items()
    }
    return dataclasses.replace(config, **nested)


def log(out):
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in rows]


def leaves(value, where=""):
    """Every tensor and number of a nested checkpoint, by its path."""
    if isinstance(value, dict):
        return {path: leaf for key, item in value.items() for path, leaf in leaves(item, f"{where}/{key}").items()}
    if isinstance(value, list | tuple):
        return {path: leaf for i, item in enumerate(value) for path, leaf in leaves(item, f"{where}/{i}").items()}
    return {where: value}


def assert_same_bits(one, other):
    assert log(one) == log(other)
    for folder in (BEST, LAST):
        for name in ("model.safetensors", "config.json"):
            assert (one / folder / name).read_bytes() == (other / folder / name).read_bytes(), f"{folder}/{name}"
    found, expected = (
        leaves(torch.load(out / CHECKPOINT, map_location="cpu", weights_only=True)) for out in (one, other)
    )
    assert found.keys() == expected.keys()
    for path, value in found.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, expected[path]), path
        elif not path.endswith(TIMINGS):
            assert value == expected[path], path


@pytest.fixture(scope="module")
def whole(cache, tmp_path_factory):
    """An uninterrupted run for every recipe and inner mode that the tests below compare with."""
    root, done = tmp_path_factory.mktemp("whole"), {}

    def get(name, config):
        if name not in done:
            done[name] = root / name
            train(config, cache, done[name], device=CPU)
        return done[name]

    return get


RUNS = {
    "darht-pgd": CONFIG,
    "darht-cached": changed(inner={"kind": "cached"}, kd_loss="mse", weights="row"),
    "rslad-pgd": changed(recipe="rslad"),
    "at-plain": changed(recipe="at", student=dataclasses.replace(CONFIG.student, feature_map=False)),
    "dropout": DROPOUT,
}


@pytest.mark.parametrize("name", RUNS)
def test_two_runs_give_the_same_bits(name, cache, whole, tmp_path):
    torch.rand(3)  # the caller's generator stands somewhere else
    train(RUNS[name], cache, tmp_path / "again", device=CPU)
    assert_same_bits(tmp_path / "again", whole(name, RUNS[name]))


class Stopped(Exception):
    pass


def stop_after(count):
    seen = []

    def hook(*_):
        seen.append(0)
        if len(seen) == count:
            raise Stopped

    return hook


@pytest.mark.parametrize("name", ["darht-pgd", "darht-cached", "dropout"])
@pytest.mark.parametrize(
    "hook",
    [{"on_step": 1}, {"on_step": 3}, {"on_epoch": 2}, {"on_epoch": 3}],
    ids=["first step", "second epoch", "epoch 2", "epoch 3"],
)
def test_an_interrupted_run_goes_on_to_the_same_bits(name, hook, cache, whole, tmp_path):
    config = RUNS[name]
    with pytest.raises(Stopped):
        train(config, cache, tmp_path, device=CPU, **{key: stop_after(count) for key, count in hook.items()})
    progress = train(config, cache, tmp_path, device=CPU, resume=True)
    assert progress.epoch == config.optim.epochs
    assert_same_bits(tmp_path, whole(name, config))


def test_a_finished_run_is_not_trained_further(cache, whole, tmp_path):
    first = whole("darht-pgd", CONFIG)
    before = (first / CHECKPOINT).read_bytes()
    told = []
    progress = train(CONFIG, cache, first, device=CPU, resume=True, on_epoch=told.append)
    assert told == []
    assert progress.epoch == len(progress.history) == 3
    assert (first / CHECKPOINT).read_bytes() == before


@pytest.mark.parametrize("config", [CONFIG, DROPOUT], ids=["resnet18", "dropout"])
def test_the_caller_s_generators_are_left_alone(config, cache, tmp_path):
    torch.manual_seed(123)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    train(changed(config, optim={"epochs": 1}), cache, tmp_path, device=CPU)
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()  # noqa: NPY002


def test_another_seed_gives_another_student(cache, whole, tmp_path):
    train(changed(seed=8), cache, tmp_path, device=CPU)
    first = (whole("darht-pgd", CONFIG) / LAST / "model.safetensors").read_bytes()
    assert (tmp_path / LAST / "model.safetensors").read_bytes() != first


def test_hooks_are_told_every_step_and_epoch(cache, tmp_path):
    steps, rows = [], []
    train(CONFIG, cache, tmp_path, device=CPU, on_step=lambda *told: steps.append(told), on_epoch=rows.append)
    per_epoch = (100 - len(cache.manifest.holdout)) // 32
    assert steps == [(n, 3 * per_epoch, 32) for n in range(1, 3 * per_epoch + 1)]
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    expected = ["epoch", "loss", "holdout_clean", "holdout_pgd", "lr", "images_per_second", "seconds"]
    assert list(rows[0]) == expected
    assert (tmp_path / "log.csv").read_text().splitlines()[0] == ",".join(expected)


def test_what_a_run_leaves_behind(cache, whole):
    out = whole("darht-pgd", CONFIG)
    assert sorted(path.name for path in out.iterdir()) == [
        CHECKPOINT,
        LAST,
        "log.csv",
        "log.jsonl",
        "run.json",
        BEST,
    ]
    student, card = load_student(out / LAST, CPU)
    assert student.teachers == 2
    assert card.teachers == ("cnn", "vit")
    assert card.cache_root_hash == cache.root_hash
    assert card.epoch == 3
    assert card.classes == tuple("0123456789")
    assert card.selection == {key: log(out)[-1][key] for key in ("holdout_clean", "holdout_pgd")}
    run = json.loads((out / "run.json").read_text())
    assert (out / run["cache"]).resolve() == cache.folder.folder.resolve()
    assert run["identity"]["cache_root_hash"] == cache.root_hash
    checkpoint = torch.load(out / CHECKPOINT, weights_only=True)
    assert all(torch.equal(checkpoint["student"][name], value) for name, value in student.state_dict().items())


def test_a_student_without_map_has_no_teachers(whole):
    student, card = load_student(whole("at-plain", RUNS["at-plain"]) / BEST, CPU)
    assert student.teachers == 0
    assert card.teachers == ()


@pytest.mark.parametrize("name", RUNS)
def test_best_is_the_epoch_with_the_best_held_out_pgd(name, whole):
    out = whole(name, RUNS[name])
    scores = [row["holdout_pgd"] for row in log(out)]
    best = max(range(3), key=lambda epoch: (scores[epoch], epoch))  # of equals the later one
    assert load_student(out / BEST, CPU)[1].epoch == best + 1


@pytest.mark.parametrize(
    ("scores", "best"), [([10, 30, 20], 2), ([30, 20, 10], 1), ([10, 10, 10], 3), ([0, 0, 0], 3), ([5, 9, 9], 3)]
)
def test_best_and_last_are_kept_apart(scores, best, cache, tmp_path):
    data = load_training_set(cache, device=CPU, adversarial=False, budget_gib=1)
    student, progress = make_student(CONFIG, data, cache.spec.data.classes), Progress()
    optimizer = make_optimizer(student, CONFIG.optim)
    for epoch, score in enumerate(scores, start=1):
        row = {"epoch": epoch, "holdout_pgd": float(score)}
        card = StudentCard(
            "resnet18", CONFIG.student.kwargs, ("cnn", "vit"), 10, student.preprocessing, (), "", {}, epoch
        )
        with torch.no_grad():
            student.head.bias.fill_(epoch)
        save_epoch(tmp_path, student, optimizer, progress, row=row, card=card)
    for folder, epoch in ((BEST, best), (LAST, 3)):
        kept, card = load_student(tmp_path / folder, CPU)
        assert card.epoch == epoch
        assert kept.head.bias.unique().tolist() == [epoch]
    assert (progress.epoch, progress.best) == (3, max(scores))


def test_with_nothing_held_out_the_last_epoch_is_the_best(plain_cache, tmp_path):
    progress = train(changed(recipe="at", optim={"epochs": 2}), plain_cache, tmp_path, device=CPU)
    assert "holdout_pgd" not in progress.history[0]
    assert load_student(tmp_path / BEST, CPU)[1].epoch == 2
    assert load_student(tmp_path / BEST, CPU)[1].selection == {}


def test_fewer_rows_than_a_batch_are_one_batch(plain_cache, tmp_path):
    steps = []
    config = changed(recipe="at", optim={"epochs": 2, "batch_size": 256})
    train(config, plain_cache, tmp_path, device=CPU, on_step=lambda *told: steps.append(told))
    assert steps == [(1, 2, 40), (2, 2, 40)]


def test_training_lowers_the_loss(cache, tmp_path):
    config = changed(recipe="at", clean_share=1.0, optim={"epochs": 8, "schedule": "constant"})
    history = train(config, cache, tmp_path, device=CPU).history
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]


def test_the_holdout_is_never_trained_on(cache, tmp_path, monkeypatch):
    seen, original = [], trainer.draw_step

    def spy(student, data, rows, *rest, **options):
        seen.extend(rows.tolist())
        return original(student, data, rows, *rest, **options)

    monkeypatch.setattr(trainer, "draw_step", spy)
    train(CONFIG, cache, tmp_path, device=CPU)
    holdout = set(cache.manifest.holdout)
    assert holdout
    assert not holdout & set(seen)
    per_epoch = len(seen) // 3
    assert all(len(set(seen[k * per_epoch : (k + 1) * per_epoch])) == per_epoch for k in range(3))


def test_holdout_scores_leave_the_student_in_its_mode(cache):
    data = load_training_set(cache, device=CPU, adversarial=False, budget_gib=1)
    student = make_student(CONFIG, data, cache.spec.data.classes).train()
    scores = score_holdout(student, data, CONFIG, CPU)
    assert student.training
    assert scores == score_holdout(student.eval(), data, CONFIG, CPU)
    assert 0 <= scores["holdout_pgd"] <= scores["holdout_clean"] <= 100


def test_a_held_out_row_is_robust_only_when_it_is_right_clean_too(cache, monkeypatch):
    data = load_training_set(cache, device=CPU, adversarial=False, budget_gib=1)
    answers = iter([np.array([True, True, False, False]), np.array([True, False, True, False])])
    monkeypatch.setattr(trainer, "correct_rows", lambda *_, **__: next(answers))
    student = make_student(CONFIG, data, cache.spec.data.classes)
    assert score_holdout(student, data, CONFIG, CPU) == {"holdout_clean": 50.0, "holdout_pgd": 25.0}


@pytest.mark.parametrize("resume", [True, False])
def test_another_recipe_in_the_same_folder_is_refused(resume, cache, whole):
    out = whole("darht-pgd", CONFIG)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    other = changed(seed=8, optim={"lr": 0.1})
    with pytest.raises(SpecMismatchError) as caught:
        train(other, cache, out, device=CPU, resume=resume)
    assert "recipe.optim.lr: 0.05 -> 0.1" in str(caught.value)
    assert "recipe.seed: 7 -> 8" in str(caught.value)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_another_cache_in_the_same_folder_is_refused(plain_cache, whole):
    config = changed(recipe="at", student=dataclasses.replace(CONFIG.student, feature_map=False))
    with pytest.raises(SpecMismatchError, match="cache_root_hash: "):
        train(config, plain_cache, whole("at-plain", config), device=CPU, resume=True)


def test_the_same_run_again_needs_resume(cache, whole):
    with pytest.raises(CacheError, match="add --resume, or choose another --out folder"):
        train(CONFIG, cache, whole("darht-pgd", CONFIG), device=CPU)


def test_a_folder_with_other_things_is_refused(cache, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(CacheError, match="is not empty and holds no run"):
        train(CONFIG, cache, tmp_path, device=CPU)


def test_cached_needs_stored_perturbations(plain_cache, tmp_path):
    with pytest.raises(ConfigError, match=r"inner: cached needs stored perturbations.*use inner: pgd"):
        train(changed(inner={"kind": "cached"}), plain_cache, tmp_path / "run", device=CPU)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("changes", [{"recipe": "darht"}, {"recipe": "rslad", "clean_share": 1.0}])
def test_vanilla_teachers_alone_do_not_supervise_adversarial_images(plain_cache, tmp_path, changes):
    with pytest.raises(ConfigError, match="needs a robust teacher on adversarial images"):
        train(changed(**changes), plain_cache, tmp_path / "run", device=CPU)


def test_cached_examples_of_another_radius_are_refused(cache, tmp_path):
    config = changed(inner={"kind": "cached", "eps": 8, "step": 2})
    with pytest.raises(ConfigError, match=r"inner\.eps is 8, attacks of the cache have 32"):
        train(config, cache, tmp_path / "run", device=CPU)


def test_a_run_that_diverges_stops_and_says_what_to_change(cache, tmp_path):
    config = changed(optim={"lr": 1e30})
    with pytest.raises(DarhtError, match=r"(the loss is|the student diverged).*: lower optim\.lr"):
        train(config, cache, tmp_path / "run", device=CPU)
    assert not (tmp_path / "run" / "log.csv").exists() or "nan" not in (tmp_path / "run" / "log.csv").read_text()


def test_rslad_needs_a_robust_teacher(plain_cache, tmp_path):
    with pytest.raises(
        ConfigError, match=r"recipe rslad needs a robust teacher on adversarial images; those of .* are all vanilla"
    ):
        train(changed(recipe="rslad"), plain_cache, tmp_path / "run", device=CPU)


def test_a_cache_beyond_the_budget_is_refused(cache, tmp_path):
    with pytest.raises(ConfigError, match="raise --memory"):
        train(CONFIG, cache, tmp_path / "run", device=CPU, memory_gib=1e-6)


def test_a_network_that_does_not_take_the_images_is_refused(cache, tmp_path):
    config = changed(student=StudentConfig(arch="timm:vit_tiny_patch16_224", kwargs={"depth": 1}))
    with pytest.raises(ModelError, match=r"does not take images of 8x8 pixels .*224.*; change its kwargs"):
        train(config, cache, tmp_path / "run", device=CPU)
    assert not (tmp_path / "run").exists()


def test_asking_a_network_for_one_image_changes_nothing_in_it():
    net = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.Flatten(), torch.nn.Linear(48, 2)).train()
    check_pixels(net, torch.zeros(5, 3, 4, 4, dtype=torch.uint8), "net")
    assert net.training
    assert net[0].num_batches_tracked == 0
    with pytest.raises(ModelError, match="net does not take images of 6x5 pixels"):
        check_pixels(net, torch.zeros(5, 3, 5, 6, dtype=torch.uint8), "net")
    assert net.training


def test_normalisation_is_the_mean_and_deviation_of_the_pixels():
    images = torch.randint(0, 256, (7, 3, 5, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = normalisation(images)
    pixels = images.numpy().astype(np.float64) / 255
    np.testing.assert_allclose(found.mean, pixels.mean((0, 2, 3)), atol=5.1e-5)
    np.testing.assert_allclose(found.std, pixels.std((0, 2, 3)), atol=5.1e-5)
    assert normalisation(torch.zeros(2, 3, 4, 4, dtype=torch.uint8)).std == (0.01, 0.01, 0.01)


def test_the_student_normalises_by_the_training_rows_alone(cache):
    data = load_training_set(cache, device=CPU, adversarial=False, budget_gib=1)
    student = make_student(CONFIG, data, cache.spec.data.classes)
    assert student.preprocessing == normalisation(data.images[torch.from_numpy(data.training)])
