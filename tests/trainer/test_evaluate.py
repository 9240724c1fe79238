"""Accuracies of models whose answers are known, and the evaluation of a whole run."""

import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from darht.attacks import FGSM, PGD, AutoAttack
from darht.cache.reader import open_cache
from darht.cache.source import Source, load_source
from darht.cache.teachers import Card, Preprocessing, save_teacher
from darht.core.errors import CacheError, ConfigError
from darht.core.nets import build
from darht.core.stats import wilson
from darht.trainer import evaluate_run as evaluate_run_module
from darht.trainer.config import InnerConfig, OptimConfig, StudentConfig, TrainConfig
from darht.trainer.evaluate import AttackOn, Score, correct_rows, evaluate, quick_attacks, write_report
from darht.trainer.evaluate_run import EvalConfig, RunReport, evaluate_run
from darht.trainer.train import train

CPU = torch.device("cpu")
THRESHOLD = 127.5
VALUES = np.array([100, 118, 121, 124, 127, 128, 131, 134, 137, 200])


def brightness(x):
    """Class 1 above the middle grey, by a margin that grows with the mean level."""
    margin = (x.flatten(1).mean(1) * 255 - THRESHOLD) * 0.1
    return torch.stack([-margin, margin], dim=1)


def darkness(x):
    return brightness(x).flip(1)


@pytest.fixture
def greys():
    """Uniform images; all labels are what `brightness` says but the last one's."""
    images = np.repeat(VALUES.astype(np.uint8), 3 * 4 * 4).reshape(-1, 3, 4, 4)
    labels = (VALUES > THRESHOLD).astype(np.int64)
    labels[-1] = 0
    return Source("npz", "test", images, labels, ("dark", "bright"), "0" * 64)


def beyond(eps):
    """Right on clean images, and still right when every pixel moves by `eps` levels against the answer."""
    return (np.abs(VALUES - THRESHOLD) > eps) & (np.arange(len(VALUES)) < len(VALUES) - 1)


@pytest.mark.parametrize("eps", [1, 4, 8, 30])
@pytest.mark.parametrize("kind", ["fgsm", "pgd"])
def test_a_linear_model_is_right_exactly_where_its_margin_exceeds_epsilon(greys, eps, kind):
    attack = FGSM(eps=eps) if kind == "fgsm" else PGD(eps=eps, step=max(1, eps // 4), steps=20)
    assert correct_rows(brightness, greys, None, device=CPU).tolist() == beyond(0).tolist()
    found = correct_rows(brightness, greys, AttackOn(attack), device=CPU, seed=3)
    assert found.tolist() == beyond(eps).tolist()


def test_evaluate_names_counts_and_describes_each_score(greys):
    told = []
    attacks = quick_attacks(8, {"dark": darkness})
    scores = evaluate(
        brightness, greys, attacks, device=CPU, seed=5, on_batch=lambda name, images: told.append((name, images))
    )
    assert [score.name for score in scores] == ["clean", "fgsm", "pgd-20", "transfer:dark", "worst case"]
    assert [score.correct for score in scores[:3]] == [9, beyond(8).sum(), beyond(8).sum()]
    assert {score.count for score in scores} == {10}
    assert told == [(name, 10) for name in ("clean", "fgsm", "pgd-20", "transfer:dark")]
    assert scores[0].attack == {}
    assert scores[2].attack == {
        "kind": "pgd",
        "eps": 8,
        "step": 2.0,
        "steps": 20,
        "norm": "linf",
        "objective": "ce",
        "random_start": True,
        "against": "the evaluated model",
        "seed": 5,
    }
    assert scores[3].attack["against"] == "dark"
    assert scores[4].attack == {"over": ["clean", "fgsm", "pgd-20", "transfer:dark"], "eps": 8}


def test_transfer_climbs_the_other_model(greys):
    """Against the opposite model, climbing drives every image away from the boundary: all become or stay right."""
    attack = PGD(eps=8, step=2, steps=20)
    opposed = correct_rows(brightness, greys, AttackOn(attack, darkness, "dark"), device=CPU)
    assert opposed.tolist() == beyond(0).tolist()
    same = correct_rows(brightness, greys, AttackOn(attack, brightness, "same"), device=CPU)
    assert same.tolist() == beyond(8).tolist()


def test_worst_case_is_taken_image_by_image():
    """Two attacks that break one image each: both leave half of them, together they leave none."""
    images = np.full((2, 3, 4, 4), 200, dtype=np.uint8)
    images[0, :, :, :2] = images[1, :, :, 2:] = 130
    source = Source("npz", "test", images, np.ones(2, dtype=np.int64), ("dark", "bright"), "0" * 64)

    def left(x):
        return brightness(x[..., :2])

    def right(x):
        return brightness(x[..., 2:])

    def both(x):  # bright where both halves are
        return torch.stack(
            [torch.maximum(left(x)[:, 0], right(x)[:, 0]), torch.minimum(left(x)[:, 1], right(x)[:, 1])], 1
        )

    attacks = {name: AttackOn(PGD(eps=8), model, name) for name, model in (("left", left), ("right", right))}
    scores = evaluate(both, source, attacks, device=CPU)
    assert [(score.name, score.correct) for score in scores] == [
        ("clean", 2),
        ("left", 1),
        ("right", 1),
        ("worst case", 0),
    ]


def test_without_attacks_there_is_no_worst_case(greys):
    assert [score.name for score in evaluate(brightness, greys, {}, device=CPU)] == ["clean"]


@pytest.mark.parametrize(("eps", "step"), [(1, 1), (3, 1), (8, 2), (32, 8)])
def test_the_step_is_a_quarter_of_epsilon_and_at_least_one_level(eps, step):
    attacks = quick_attacks(eps, {})
    assert list(attacks) == ["fgsm", "pgd-20"]
    assert attacks["pgd-20"].attack == PGD(eps=eps, step=step, steps=20)
    assert attacks["fgsm"].attack == FGSM(eps=eps)


def net():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build("wrn-10-1", 10, {"width": 4}).double().eval()


def test_neither_repetition_nor_batch_size_changes_the_answers():
    source, model = load_source("digits", None, "test", limit=45), net()
    attack = AttackOn(PGD(eps=16, step=4, steps=4))

    def answers(**options):
        return correct_rows(lambda x: model(x.double()), source, attack, device=CPU, **options).tolist()

    first = answers()
    assert answers() == first
    assert answers(batch_size=7) == first
    assert answers(batch_size=1) == first


def test_batches_are_told_as_they_are_done(greys):
    told = []
    correct_rows(brightness, greys, None, device=CPU, batch_size=4, on_batch=told.append)
    assert told == [4, 4, 2]


def test_evaluation_leaves_the_model_alone(greys):
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2)).eval()
    correct_rows(model, greys, AttackOn(PGD()), device=CPU)
    assert not model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(("correct", "low", "high"), [(0, 0.0, 27.75), (5, 23.66, 76.34), (10, 72.25, 100.0)])
def test_wilson_interval_of_ten(correct, low, high):
    score = Score("clean", correct, 10)
    assert score.interval == pytest.approx((low, high), abs=5e-3)
    assert score.interval == tuple(100 * end for end in wilson(correct, 10))
    assert score.interval[0] <= score.accuracy <= score.interval[1] + 1e-9


def test_the_report_holds_what_was_measured_on_what(greys, tmp_path):
    scores = evaluate(brightness, greys, quick_attacks(8, {}), device=CPU)
    report = write_report(tmp_path / "eval.json", scores, greys, {"which": "student"})
    assert json.loads((tmp_path / "eval.json").read_text()) == report
    assert report["schema_version"] == 1
    assert report["which"] == "student"
    assert report["data"] == {"source": "npz", "split": "test", "rows": 10, "sha256": "0" * 64}
    assert report["scores"][0] == {
        "name": "clean",
        "correct": 9,
        "count": 10,
        "attack": {},
        "accuracy": 90.0,
        "interval95": [59.585, 98.2124],
    }


@pytest.fixture(scope="module")
def runs(tiny_cache, tmp_path_factory):
    """Two runs of one epoch: `cached` and `pgd`."""
    root, cache = tmp_path_factory.mktemp("runs"), open_cache(tiny_cache)
    for kind in ("cached", "pgd"):
        config = TrainConfig(
            student=StudentConfig(arch="resnet18", kwargs={"width": 4, "blocks": [1, 1, 1, 1]}),
            inner=InnerConfig(kind=kind, eps=32, step=8, steps=1),
            optim=OptimConfig(epochs=1, batch_size=32, lr=0.01),
        )
        train(config, cache, root / kind, device=CPU)
    return root


def ask(run, **options):
    told = []
    config = EvalConfig(**{"limit": 40, **options})
    report = evaluate_run(run, config, device=CPU, on_batch=lambda *batch: told.append(batch))
    return report, told


def test_autoattack_is_added_and_never_above_the_worst_case(runs, monkeypatch):
    monkeypatch.setattr(evaluate_run_module, "AutoAttack", partial(AutoAttack, steps=3, queries=20))
    scores = {score.name: score for score in ask(runs / "pgd", teachers=None, autoattack=True)[0].scores}
    assert list(scores) == ["clean", "fgsm", "pgd-20", "autoattack", "worst case"]
    assert scores["worst case"].correct <= scores["autoattack"].correct <= scores["clean"].correct
    assert scores["autoattack"].attack["kind"] == "autoattack" and scores["autoattack"].attack["by"] == "darht"
    assert (runs / "pgd" / "autoattack-student.pt").is_file()
    again = {score.name: score for score in ask(runs / "pgd", teachers=None, autoattack=True)[0].scores}
    assert again == scores  # from the state file


def test_the_reference_is_an_option_of_autoattack():
    with pytest.raises(ConfigError, match="add --attack autoattack"):
        EvalConfig(reference=True)


def test_a_run_is_measured_white_box_and_by_transfer_from_its_teachers(runs, tiny_cache):
    report, told = ask(runs / "pgd")
    names = ["clean", "fgsm", "pgd-20", "transfer:cnn", "transfer:vit", "worst case"]
    assert [score.name for score in report.scores] == names
    assert told == [(name, 40, 40) for name in names[:-1]]
    assert {score.attack.get("eps", 32) for score in report.scores} == {32}  # the radius trained for
    assert all(report.scores[-1].correct <= score.correct for score in report.scores)
    data = json.loads(report.path.read_text())
    assert report.path == runs / "pgd" / "eval.json"
    assert data["which"] == "student"
    assert data["epoch"] == 1
    assert data["cache_root_hash"] == open_cache(tiny_cache).root_hash
    assert data["recipe"]["inner"]["eps"] == 32
    assert data["data"] == {
        "source": "digits",
        "split": "test",
        "rows": 40,
        "sha256": load_source("digits", None, "test", limit=40).sha256,
    }
    assert data["note"] == report.note == "inner: pgd, 1 steps on the student, teachers quoted on the clean view"


def test_the_same_call_twice_writes_the_same_bytes(runs):
    first = ask(runs / "pgd", which="last")[0].path.read_bytes()
    assert ask(runs / "pgd", which="last")[0].path.read_bytes() == first
    assert b'"which": "last"' in first


def test_cached_runs_are_labelled_transfer_robustness(runs):
    assert "transfer robustness" in ask(runs / "cached", teachers=None)[0].note


def test_transfer_can_be_left_out(runs):
    assert [score.name for score in ask(runs / "pgd", teachers=None)[0].scores][-2:] == ["pgd-20", "worst case"]


def test_a_teacher_can_be_given_by_folder(runs, tiny_teachers, tmp_path):
    moved = shutil.copytree(tiny_teachers["vit"], tmp_path / "moved")
    own = ask(runs / "pgd")[0].scores
    assert ask(runs / "pgd", teachers={"vit": str(moved)})[0].scores == own


def test_a_teacher_that_is_not_there_names_the_options(runs, tmp_path):
    with pytest.raises(ConfigError, match=r"is not a teacher folder.*give --teacher NAME=FOLDER, or --no-transfer"):
        ask(runs / "pgd", teachers={"cnn": str(tmp_path)})


def test_a_teacher_of_other_classes_cannot_transfer(runs, tmp_path):
    kwargs = {"width": 4}
    card = Card("wrn-10-1", 4, "", kwargs=kwargs, preprocessing=Preprocessing())
    save_teacher(tmp_path, build("wrn-10-1", 4, kwargs), card)
    with pytest.raises(ConfigError, match="the student has 10 classes, teacher 'cnn' has 4"):
        ask(runs / "pgd", teachers={"cnn": str(tmp_path)})


def test_another_cache_in_the_place_of_the_own_one_is_refused(runs, tmp_path):
    run = shutil.copytree(runs / "pgd", tmp_path / "run")
    card = json.loads((run / "student" / "config.json").read_text())
    (run / "student" / "config.json").write_text(json.dumps({**card, "cache_root_hash": "f" * 64}))
    with pytest.raises(ConfigError, match=r"is not the cache that .* was trained from: its root hash differs"):
        ask(run)
    with pytest.raises(CacheError, match="is not a run"):
        ask(tmp_path)


@pytest.mark.parametrize(
    ("score", "text"),
    [
        (Score("clean", 1, 2), ""),
        (Score("worst case", 1, 2, {"over": ["clean"], "eps": 8.0}), "per image, over all rows above"),
        (
            Score("fgsm", 1, 2, {"kind": "fgsm", "norm": "linf", "eps": 8.0, "against": "the evaluated model"}),
            "linf 8/255, on the evaluated model",
        ),
        (
            Score("p", 1, 2, {"norm": "linf", "eps": 8.0, "step": 2.0, "steps": 20, "against": "cnn"}),
            "linf 8/255, 20 steps of 2, on cnn",
        ),
    ],
)
def test_an_attack_in_a_few_words(score, text):
    assert RunReport.describe(score) == text
