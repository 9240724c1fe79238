"""A student trained from a sealed cache: the same bits again, whatever interrupts it, and every refusal."""

import contextlib
import dataclasses
import json

import numpy as np
import pytest
import torch
from built import sealed_cache
from runs import CONFIG, CPU, Stopped, assert_same_bits, changed, log, stop_after

from darht.attacks import Engine
from darht.cache.export.webdataset import export_webdataset
from darht.cache.read.loader import GIB
from darht.cache.read.reader import open_cache
from darht.cache.read.sizes import needed_bytes
from darht.cache.read.stream import Feed, level_counts
from darht.cache.read.webdataset import open_shards
from darht.core.config import to_plain
from darht.core.errors import CacheError, ConfigError, DarhtError, ModelError, SpecMismatchError
from darht.core.rng import RowRng
from darht.trainer.config import ComputeConfig, StudentConfig, WarmConfig
from darht.trainer.schedule import make_optimizer
from darht.trainer.state.checkpoint import BEST, CHECKPOINT, LAST, StudentCard, load_student
from darht.trainer.student import score as score_module
from darht.trainer.student.checkpoints import Checkpoints, advance
from darht.trainer.student.inner import Examples
from darht.trainer.student.run import TrainState
from darht.trainer.student.score import holdout_source, score
from darht.trainer.student.setup import feed_plan, make_student, normalisation
from darht.trainer.student.train import Callbacks, train
from darht.trainer.student.validate import short_phases

PLAIN = dataclasses.replace(CONFIG.student, feature_map=False)
VIT = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
DROPOUT = dataclasses.replace(
    CONFIG,
    student=StudentConfig(arch="timm:vit_tiny_patch16_224", kwargs={**VIT, "proj_drop_rate": 0.3}),
    recipe="at",
    loss={"clean_share": 0.5},
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
    return open_cache(sealed_cache(config, folder))


@pytest.fixture
def open_feed():
    """`open_feed(cache)` gives the batches of `CONFIG`, from memory."""
    with contextlib.ExitStack() as stack:

        def run(cache):
            plan = feed_plan(CONFIG, cache, CPU, 1.0)
            return stack.enter_context(Feed(cache, plan, seed=CONFIG.seed, epochs=CONFIG.optim.epochs))

        yield run


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
    "darht-cached": changed(inner={"kind": "cached"}, loss={**CONFIG.loss, "kd": "mse", "weights": "row"}),
    "rslad-pgd": changed(recipe="rslad"),
    "at-plain": changed(recipe="at", loss={"clean_share": 0.5}, student=PLAIN),
    "dropout": DROPOUT,
    "darht-warm": changed(inner={"kind": "warm", "warm": WarmConfig(momentum=0.5, check_rows=16)}),
    "trades-warm": changed(
        recipe="trades",
        student=PLAIN,
        inner={"kind": "warm", "step": 16, "warm": WarmConfig(start="noise", check_rows=0)},
    ),
    "mc-dropout": changed(student=dataclasses.replace(CONFIG.student, mc_dropout=0.3, mc_samples=4)),
}


@pytest.mark.parametrize("name", RUNS)
def test_two_runs_give_the_same_bits(name, cache, whole, tmp_path):
    torch.rand(3)  # the caller's generator stands somewhere else
    train(RUNS[name], cache, tmp_path / "again", device=CPU)
    assert_same_bits(tmp_path / "again", whole(name, RUNS[name]))


@pytest.mark.parametrize("name", ["darht-pgd", "darht-cached", "dropout", "darht-warm"])
@pytest.mark.parametrize(
    "hook",
    [{"on_step": 1}, {"on_step": 3}, {"on_epoch": 2}, {"on_epoch": 3}],
    ids=["first step", "second epoch", "epoch 2", "epoch 3"],
)
def test_an_interrupted_run_goes_on_to_the_same_bits(name, hook, cache, whole, tmp_path):
    config = RUNS[name]
    with pytest.raises(Stopped):
        told = Callbacks(**{key: stop_after(count) for key, count in hook.items()})
        train(config, cache, tmp_path, device=CPU, callbacks=told)
    progress = train(config, cache, tmp_path, device=CPU, resume=True)
    assert progress.epoch == config.optim.epochs
    assert_same_bits(tmp_path, whole(name, config))


def test_a_finished_run_is_not_trained_further(cache, whole, tmp_path):
    first = whole("darht-pgd", CONFIG)
    before = (first / CHECKPOINT).read_bytes()
    told = []
    progress = train(CONFIG, cache, first, device=CPU, resume=True, callbacks=Callbacks(on_epoch=told.append))
    assert told == []
    assert progress.epoch == len(progress.history) == 3
    assert (first / CHECKPOINT).read_bytes() == before


@pytest.mark.parametrize("config", [CONFIG, DROPOUT, RUNS["mc-dropout"]], ids=["resnet18", "dropout", "mc-dropout"])
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
    train(
        CONFIG,
        cache,
        tmp_path,
        device=CPU,
        callbacks=Callbacks(on_step=lambda *told: steps.append(told[:3]), on_epoch=rows.append),
    )
    per_epoch = (100 - len(cache.manifest.holdout)) // 32
    assert steps == [(n, 3 * per_epoch, 32) for n in range(1, 3 * per_epoch + 1)]
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert all(0 <= row[key] <= 100 for row in rows for key in ("train_clean", "train_adversarial") if row[key])
    expected = [
        "epoch",
        "loss",
        "train_clean",
        "train_adversarial",
        "lr",
        "images_per_second",
        "seconds",
        "cpu_seconds",
    ]
    expected += ["holdout_clean", "holdout_pgd"]
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
    assert card.image_size == (8, 8)
    assert "On rows held out of the *training* split" in (out / BEST / "README.md").read_text()
    assert "| cnn | resnet18 | robust |" in (out / LAST / "README.md").read_text()
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
def test_best_and_last_are_kept_apart(scores, best, cache, tmp_path, open_feed):
    feed = open_feed(cache)
    student = make_student(CONFIG, feed, cache.spec.data.classes)
    run = TrainState(student, student, make_optimizer(student, CONFIG.optim), None)
    kept = Checkpoints(tmp_path, writes=True, goes_back=False)
    for epoch, accuracy in enumerate(scores, start=1):
        row = {"epoch": epoch, "holdout_pgd": float(accuracy)}
        card = StudentCard(
            "resnet18",
            CONFIG.student.kwargs,
            ("cnn", "vit"),
            10,
            student.preprocessing,
            (),
            "",
            to_plain(CONFIG),
            epoch,
        )
        with torch.no_grad():
            student.head.bias.fill_(epoch)
        kept.add(run, card, best=advance(run.progress, row), now=False)
        run.load(tmp_path / CHECKPOINT)
    for folder, epoch in ((BEST, best), (LAST, 3)):
        kept, card = load_student(tmp_path / folder, CPU)
        assert card.epoch == epoch
        assert kept.head.bias.unique().tolist() == [epoch]
    assert (run.progress.epoch, run.progress.best) == (3, max(scores))


def test_a_student_is_folded_into_one_network_again_and_again(cache, open_feed):
    """And a GPU, which is played, searches in bfloat16, in few large parts."""
    student = make_student(CONFIG, open_feed(cache), cache.spec.data.classes).eval()
    x = torch.rand(4, 3, 8, 8)
    twin = score_module._folded(student)
    for value in (0.5, 2.0):
        with torch.no_grad():
            student.map.bias.fill_(value)
            assert score_module._folded(student) is twin
            torch.testing.assert_close(twin(x), student(x).logits, atol=1e-5, rtol=1e-5)
    engine, at_once = score_module._engine(torch.device("cuda"), draws=True)
    assert (engine.precision, engine.lanes, at_once) == ("bf16", 1, 10_000)
    assert score_module._engine(CPU, draws=False) == (Engine(), 1000)


def test_with_nothing_held_out_the_last_epoch_is_the_best(plain_cache, tmp_path):
    progress = train(changed(recipe="at", optim={"epochs": 2}), plain_cache, tmp_path, device=CPU)
    assert "holdout_pgd" not in progress.history[0]
    assert load_student(tmp_path / BEST, CPU)[1].epoch == 2
    assert load_student(tmp_path / BEST, CPU)[1].selection == {}


def test_a_batch_may_be_all_rows_and_no_more(plain_cache, tmp_path):
    steps = []
    config = changed(recipe="at", optim={"epochs": 2, "batch_size": 40})
    callbacks = Callbacks(on_step=lambda *told: steps.append(told[:3]))
    train(config, plain_cache, tmp_path / "all", device=CPU, callbacks=callbacks)
    assert steps == [(1, 2, 40), (2, 2, 40)]
    config = changed(recipe="at", optim={"epochs": 2, "batch_size": 41})
    with pytest.raises(ConfigError, match=r"got 41 for 40 rows: set optim.batch_size to 40 or less"):
        train(config, plain_cache, tmp_path / "more", device=CPU)
    assert not (tmp_path / "more").exists()


def test_training_lowers_the_loss(cache, tmp_path):
    config = changed(recipe="at", loss={"clean_share": 1.0}, optim={"epochs": 14, "schedule": "constant"})
    history = train(config, cache, tmp_path, device=CPU).history
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]


def test_the_holdout_is_never_trained_on(cache, tmp_path, monkeypatch):
    seen, original = [], Examples.draw

    def spy(examples, student, data, at, **options):
        seen.extend(data.rows[at].tolist())
        return original(examples, student, data, at, **options)

    monkeypatch.setattr(Examples, "draw", spy)
    train(CONFIG, cache, tmp_path, device=CPU)
    holdout = set(cache.manifest.holdout)
    assert holdout
    assert not holdout & set(seen)
    per_epoch = len(seen) // 3
    assert all(len(set(seen[k * per_epoch : (k + 1) * per_epoch])) == per_epoch for k in range(3))


def test_scores_leave_the_student_in_its_mode(cache, open_feed):
    feed, attack = open_feed(cache), CONFIG.inner.pgd()
    student = make_student(CONFIG, feed, cache.spec.data.classes).train()
    clean, robust = score(student, holdout_source(feed), attack, CPU, CONFIG.seed)
    assert student.training
    assert score(student.eval(), holdout_source(feed), attack, CPU, CONFIG.seed) == (clean, robust)
    assert 0 <= robust <= clean <= 100


def test_scores_are_those_of_the_student_by_hand_and_of_any_number_of_rows_at_once(cache, monkeypatch, open_feed):
    feed, attack = open_feed(cache), CONFIG.inner.pgd()
    held = holdout_source(feed)
    student = make_student(CONFIG, feed, cache.spec.data.classes).eval()
    x, y = torch.from_numpy(held.images).float() / 255, torch.from_numpy(held.labels)
    generator = RowRng.create(CONFIG.seed, "evaluate", rows=torch.arange(len(y)))
    x_adv = attack(lambda x: student(x).logits, x, y, generator=generator)
    right = [(student(pixels).logits.argmax(1) == y).numpy() for pixels in (x, x_adv)]
    clean, robust = score(student, held, attack, CPU, CONFIG.seed)
    assert clean == pytest.approx(100 * right[0].mean(), abs=1e-3)
    assert robust <= 100 * (right[0] & right[1]).mean() + 1e-3  # a step on the way may fool where the last fails
    monkeypatch.setattr(score_module, "_SCORED", 5)
    assert score(student, held, attack, CPU, CONFIG.seed) == (clean, robust)


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
    with pytest.raises(ConfigError, match=r"inner: cached needs stored perturbations.*use inner.kind: pgd"):
        train(changed(inner={"kind": "cached"}), plain_cache, tmp_path / "run", device=CPU)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("changes", [{"recipe": "darht"}, {"recipe": "rslad"}, {"recipe": "ard"}])
def test_vanilla_teachers_alone_do_not_supervise_adversarial_images(plain_cache, tmp_path, changes):
    with pytest.raises(ConfigError, match="needs a robust teacher on adversarial images"):
        train(changed(**changes), plain_cache, tmp_path / "run", device=CPU)


@pytest.mark.parametrize(
    ("epochs", "phases", "told"), [(1, (0.2, 0.4), True), (1, (0.1, 0.8), False), (100, (0.2, 0.4), False)]
)
def test_a_short_run_that_leaves_its_head_untrained_is_told(epochs, phases, told):
    config = changed(CONFIG, loss={"phases": phases}, optim={"epochs": epochs})
    note = short_phases(config)
    assert (note is not None) is told
    if note is not None:
        assert note.startswith("the head is trained in the first 0.4 of 1 epochs only; short runs do better")
    assert short_phases(changed(CONFIG, recipe="rslad", optim={"epochs": epochs})) is None


def test_cached_examples_of_another_radius_are_refused(cache, tmp_path):
    config = changed(inner={"kind": "cached", "eps": 8, "step": 2})
    with pytest.raises(ConfigError, match=r"the cache's L-inf attacks, 32; got 8: set inner\.eps: 32"):
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inner": {"kind": "warm"}}, r"inner\.warm\.start: cached needs stored perturbations, .* has no attacks; use"),
        ({"targets": "nearest"}, r"targets: nearest needs stored answers, .* has no attacks; use targets: clean"),
        (
            {"targets": "first-order"},
            r"targets: first-order needs the Jacobian of every teacher, .* lacks cnn; ",
        ),
        ({"recipe": "mtard"}, r"recipe mtard needs a robust teacher on adversarial images"),
        ({"recipe": "adaad"}, r"recipe adaad needs a robust teacher on adversarial images"),
    ],
)
def test_what_a_recipe_needs_and_the_cache_lacks(plain_cache, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        train(changed(**changes), plain_cache, tmp_path / "run", device=CPU)
    assert not (tmp_path / "run").exists()


def test_mtard_needs_a_vanilla_teacher(cache, tmp_path):
    with pytest.raises(ConfigError, match=r"needs a teacher whose role is vanilla on clean images; .* all robust"):
        train(changed(recipe="mtard"), cache, tmp_path / "run", device=CPU)


@pytest.mark.parametrize("changes", [{}, {"targets": "clean"}, {"targets": "nearest"}, {"inner": {"kind": "cached"}}])
def test_igdm_needs_teachers_who_tell_two_points_apart(mixed_cache, tmp_path, changes):
    config = changed(recipe="adaad", loss={"igdm": 20.0}, **changes)
    with pytest.raises(ConfigError, match=r"loss\.igdm compares .* use targets: first-order or teachers: live"):
        train(config, mixed_cache, tmp_path / "run", device=CPU)


@pytest.mark.parametrize("recipe", ["kd", "at", "trades"])
def test_recipes_that_vanilla_teachers_are_enough_for(plain_cache, tmp_path, recipe):
    config = changed(recipe=recipe, optim={"epochs": 1}, inner={"steps": 1})
    assert train(config, plain_cache, tmp_path / "run", device=CPU).epoch == 1


def test_a_cache_beyond_the_budget_is_refused(cache, tmp_path):
    with pytest.raises(ConfigError, match="raise --memory"):
        train(CONFIG, cache, tmp_path / "run", device=CPU, memory_gib=1e-6)


@pytest.fixture(scope="module")
def streamed(fine_cache):
    """A cache of 100 rows, and a budget that holds fewer, in GiB."""
    cache = open_cache(fine_cache)
    return cache, 0.9 * needed_bytes(cache, adversarial=True) / GIB


STREAMED = changed(CONFIG, inner={"kind": "cached"}, optim={"epochs": 2, "batch_size": 8})


def test_two_streamed_runs_and_one_that_was_killed_end_with_the_same_bits(streamed, tmp_path):
    cache, budget = streamed
    options = {"device": CPU, "memory_gib": budget}
    train(STREAMED, cache, tmp_path / "one", **options)
    assert json.loads((tmp_path / "one" / "run.json").read_text())["feed"].startswith("cache: ")
    assert "streamed" in json.loads((tmp_path / "one" / "run.json").read_text())["feed"]
    train(STREAMED, cache, tmp_path / "two", **options)
    assert_same_bits(tmp_path / "one", tmp_path / "two")

    def kill(step, total, images, metrics):
        if step == 15:  # of 22: in the middle of the second epoch
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(STREAMED, cache, tmp_path / "killed", callbacks=Callbacks(on_step=kill), **options)
    train(STREAMED, cache, tmp_path / "killed", resume=True, **options)
    assert_same_bits(tmp_path / "one", tmp_path / "killed")


def test_a_streamed_run_from_an_export_has_the_bits_of_one_from_the_cache(streamed, tmp_path):
    cache, budget = streamed
    export_webdataset(cache, tmp_path / "out", "blocks")
    pattern = f"{tmp_path}/out/shard-{{00000..00006}}.tar"
    train(STREAMED, cache, tmp_path / "zarr", device=CPU, memory_gib=budget)
    train(STREAMED, open_shards(pattern), tmp_path / "tar", device=CPU, memory_gib=budget)
    assert_same_bits(tmp_path / "zarr", tmp_path / "tar")


def test_a_streamed_run_goes_on_with_its_own_window_only(streamed, tmp_path):
    cache, budget = streamed
    config = changed(STREAMED, optim={"epochs": 1, "batch_size": 4})
    train(config, cache, tmp_path, device=CPU, memory_gib=budget)
    again = {"device": CPU, "resume": True}
    with pytest.raises(SpecMismatchError, match="window_rows: "):
        train(config, cache, tmp_path, memory_gib=0.7 * budget, **again)
    with pytest.raises(SpecMismatchError, match="window_rows: "):
        train(config, cache, tmp_path, memory_gib=1.0, **again)


def test_where_the_rows_are_changes_neither_normalisation_nor_holdout(streamed):
    cache, budget = streamed
    found = []
    for memory in (budget, 1.0):
        with Feed(cache, feed_plan(STREAMED, cache, CPU, memory), seed=0, epochs=1) as feed:
            student, held = make_student(STREAMED, feed, cache.spec.data.classes), holdout_source(feed)
            found.append((student.preprocessing, held.images.tolist(), held.labels.tolist()))
    assert found[0] == found[1]


def test_a_network_that_does_not_take_the_images_is_refused(cache, tmp_path):
    config = changed(student=StudentConfig(arch="timm:vit_tiny_patch16_224", kwargs={"depth": 1}))
    with pytest.raises(ModelError, match=r"does not take images of 8x8 pixels .*224.*; change its kwargs"):
        train(config, cache, tmp_path / "run", device=CPU)
    assert not (tmp_path / "run").exists()


def test_normalisation_is_the_mean_and_deviation_of_the_pixels():
    images = torch.randint(0, 256, (7, 3, 5, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = normalisation(level_counts(images))
    pixels = images.numpy().astype(np.float64) / 255
    np.testing.assert_allclose(found.mean, pixels.mean((0, 2, 3)), atol=5.1e-5)
    np.testing.assert_allclose(found.std, pixels.std((0, 2, 3)), atol=5.1e-5)
    assert normalisation(level_counts(torch.zeros(2, 3, 4, 4, dtype=torch.uint8))).std == (0.01, 0.01, 0.01)


def test_the_student_normalises_by_the_training_rows_alone(cache, open_feed):
    feed = open_feed(cache)
    student = make_student(CONFIG, feed, cache.spec.data.classes)
    images = torch.from_numpy(cache.read("image")[feed.training])
    assert student.preprocessing == normalisation(level_counts(images))


def test_clean_batches_alone_have_no_adversarial_accuracy(cache, tmp_path):
    config = changed(recipe="at", loss={"clean_share": 1.0}, optim={"epochs": 1})
    row = train(config, cache, tmp_path, device=CPU).history[0]
    assert row["train_adversarial"] is None
    assert 0 < row["train_clean"] <= 100
    assert ",," in (tmp_path / "log.csv").read_text()


def test_a_student_that_does_not_fold_is_refused_before_it_trains(cache, tmp_path):
    config = changed(student=StudentConfig(arch="torchvision:squeezenet1_1"))
    with pytest.raises(ModelError, match="puts ReLU after its classifier"):
        train(config, cache, tmp_path / "run", device=CPU)


def test_monte_carlo_dropout_is_part_of_the_student(cache, whole):
    student, card = load_student(whole("mc-dropout", RUNS["mc-dropout"]) / BEST, CPU)
    assert (card.mc_dropout, card.mc_samples) == (student.dropout.p, student.dropout.samples) == (0.3, 4)


def test_deterministic_kernels_change_no_bit_on_a_cpu_and_are_part_of_the_run_when_asked_for(cache, tmp_path):
    short = changed(optim={"epochs": 1})
    for name, on in (("plain", False), ("deterministic", True)):
        train(changed(short, compute=ComputeConfig(deterministic=on)), cache, tmp_path / name, device=CPU)
    plain, strict = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("plain", "deterministic"))
    assert "deterministic" not in plain["identity"]["recipe"]["compute"]  # runs from before go on
    assert strict["identity"]["recipe"]["compute"]["deterministic"] is True
    assert plain["repeats"] == strict["repeats"] == "same bits"
    weights = [(tmp_path / name / LAST / "model.safetensors").read_bytes() for name in ("plain", "deterministic")]
    assert weights[0] == weights[1]
