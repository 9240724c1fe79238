"""The evaluation of whole runs: what is found by itself, what is resumed, what is refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from reseal import rewrite

from darht.attacks import AutoAttack
from darht.cache.builder.teachers import Card, save_teacher
from darht.cache.read.reader import open_cache
from darht.cache.sources.load import load_source
from darht.core.errors import CacheError, ConfigError
from darht.core.nets import build
from darht.core.preprocessing import Preprocessing
from darht.trainer.config import InnerConfig, OptimConfig, StudentConfig, TrainConfig
from darht.trainer.evaluation import load as subject
from darht.trainer.evaluation import run as run_module
from darht.trainer.evaluation.attacks import adaptive
from darht.trainer.evaluation.attacks.substitute import Substitution
from darht.trainer.evaluation.checks import calibration
from darht.trainer.evaluation.config import EvalConfig
from darht.trainer.evaluation.ledger import Ledger
from darht.trainer.evaluation.run import evaluate
from darht.trainer.student.train import train

CPU = torch.device("cpu")
TINY = AutoAttack(steps=3, queries=20)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(run_module, "_MASKING_IMAGES", dict.fromkeys(("quick", "standard", "full"), 10))
    monkeypatch.setattr(adaptive, "STEPS", 2)
    monkeypatch.setattr(calibration, "CORRUPTIONS", dict.fromkeys(("contrast", "jpeg")))


def ask(run, **options):
    told, out = [], options.pop("out", None)
    config = EvalConfig(**{"limit": 40, "autoattack": TINY, "queries": (30, 50), **options})
    report = evaluate(str(run), config, out=out, device=CPU, on_batch=lambda *batch: told.append(batch))
    return report, told


def names(report):
    return [score.name for score in report.scores if not score.name.startswith("check:")]


def test_a_run_is_measured_white_box_and_by_transfer_from_its_teachers(runs, tiny_cache):
    report, _ = ask(runs / "pgd")
    assert names(report) == ["clean", "fgsm", "pgd-20", "transfer:cnn", "transfer:vit", "worst case"]
    assert report.record["threat"] == {"norm": "linf", "eps": 32}  # the radius trained for
    assert all(report.scores[-1].correct <= score.correct for score in report.scores if score.count == 40)
    data = json.loads(report.path.read_text())
    assert report.path == runs / "pgd" / "eval.json"
    assert data["schema_version"] == 2
    assert (data["which"], data["epoch"], data["tier"]) == ("student", 1, "quick")
    assert data["cache_root_hash"] == open_cache(tiny_cache).root_hash
    assert data["recipe"]["inner"]["eps"] == 32
    sha256 = load_source("digits", None, "test", limit=40).sha256
    assert data["data"] == {"source": "digits", "split": "test", "rows": 40, "sha256": sha256}
    assert data["note"] == report.note == "inner: pgd, 1 steps on the student, teachers quoted on the clean view"
    assert data["folded"]["passed"] and data["folded"]["differing"] == 0


def test_the_same_call_twice_writes_the_same_bytes_and_crafts_nothing(runs, monkeypatch):
    first = ask(runs / "pgd", which="last")[0]
    files = [first.path, first.path.with_suffix(".md"), first.path.with_suffix(".npz"), first.page]
    assert [file.name for file in files] == ["eval-last.json", "eval-last.md", "eval-last.npz", "report-last.html"]
    before = [file.read_bytes() for file in files]
    monkeypatch.setattr("darht.attacks.engine.engine.Engine.run", None)
    ask(runs / "pgd", which="last")
    assert [file.read_bytes() for file in files] == before


def test_a_killed_evaluation_goes_on(runs, tmp_path, monkeypatch):
    """Stopped twice, it ends with what an undisturbed one finds, and computes nothing a second time."""
    run = shutil.copytree(runs / "pgd", tmp_path / "run", ignore=shutil.ignore_patterns("eval*", "report*"))
    (run / "run.json").write_text((runs / "pgd" / "run.json").read_text())
    facts = json.loads((run / "run.json").read_text())
    facts["cache"] = str((runs / "pgd" / facts["cache"]).resolve())
    rewrite(run / "run.json", cache=facts["cache"])
    want = ask(run, out=tmp_path / "whole", tier="standard")[0]

    made, get = [], Ledger.get

    def counted(self, name, facts, make):
        return get(self, name, facts, lambda: made.append((name, str(facts))) or make())

    monkeypatch.setattr(Ledger, "get", counted)

    class Killed(BaseException):
        pass

    def kill_after(batches):
        left = [batches]

        def on_batch(name, done, total, alive):
            left[0] -= 1
            if left[0] < 0:
                raise Killed

        return on_batch

    config = EvalConfig(limit=40, autoattack=TINY, queries=(30, 50), tier="standard")
    for batches in (5, 30):
        before = len(made)
        with pytest.raises(Killed):
            evaluate(str(run), config, out=tmp_path / "parts", device=CPU, on_batch=kill_after(batches))
        assert len(made) > before
    got = evaluate(str(run), config, out=tmp_path / "parts", device=CPU)
    assert len(set(made)) == len(made)
    assert got.record == want.record
    assert got.path.with_suffix(".npz").read_bytes() == want.path.with_suffix(".npz").read_bytes()


def test_the_model_card_of_a_run_carries_what_was_measured(runs, tmp_path):
    for which in ("student", "last"):
        card = runs / "pgd" / which / "README.md"
        report = ask(runs / "pgd", which=which, teachers=None)[0]
        worst, said = report.scores[-1], card.read_text()
        assert f"Robust accuracy **{worst.accuracy:.1f} %**" in said and "has not been evaluated" not in said
        for score in report.scores:
            row = f"| {score.name} | {score.accuracy:.1f} |"
            assert (row in said) == (score.family != "check")
    ask(runs / "pgd", teachers=None, eps=1.0, out=tmp_path)
    assert "1/255: the worst case" not in card.read_text()  # a report elsewhere is not the run's


def test_the_standard_tier_adds_autoattack_and_takes_all_images(runs):
    report, _ = ask(runs / "pgd", tier="standard", teachers=None)
    assert names(report) == ["clean", "fgsm", "pgd-20", "autoattack", "worst case"]
    scores = {score.name: score for score in report.scores}
    assert scores["worst case"].correct <= scores["autoattack"].correct <= scores["clean"].correct
    assert scores["autoattack"].attack["by"] == "darht"


def test_the_full_tier_runs_everything_or_says_why_not(runs):
    shares = Substitution(shares=(0.02,), rounds=2, epochs=1, width=4)
    report, _ = ask(runs / "pgd", tier="full", substitution=shares, surrogates=(str(runs / "cached" / "student"),))
    found = set(names(report)) | set(report.record["left_out"])
    for name in ("adaptive:z, ce", "adaptive:row cnn, dlr", "adaptive:all rows, ce", "adaptive:nearest row",
                 "adaptive:ensemble of z and rows", "adaptive:kl away from teachers", "adaptive:apgd from cnn",
                 "adaptive:saga", "square", "rays", "surrogate:cached/student", "substitute:2% of data"):  # fmt: skip
        assert name in found
    assert list(report.record["corruptions"]["accuracy"]) == ["contrast", "jpeg"]
    assert {"square", "rays"} <= set(report.record["robust_accuracy"]["attack"]["over"])


def test_a_teacher_is_evaluated_as_a_model_of_its_own(tiny_teachers, tmp_path):
    report, _ = ask(tiny_teachers["cnn"], data="digits", eps=8, out=tmp_path, tier="full", teachers={},
                    substitution=Substitution(shares=(0.02,), rounds=1, epochs=1, width=4))  # fmt: skip
    assert report.record["model"]["kind"] == "teacher"
    assert "not a student" in report.record["left_out"]["adaptive"]
    assert report.path == tmp_path / "eval.json"


def test_every_images_fate_is_kept(runs):
    report, _ = ask(runs / "pgd", teachers=None)
    held = np.load(report.path.with_suffix(".npz"))
    attacks = held["attacks"].tolist()
    assert attacks[0] == "clean" and attacks[-1] == "worst case"
    right = held["right"]
    assert right.shape == (len(attacks), 40) and set(np.unique(right)) <= {-1, 0, 1}
    assert (right[-1] == 1).sum() == report.scores[-1].correct
    assert ((held["adversarial"] == held["label"]) == (right[-1] == 1)).all()


def test_quick_takes_a_thousand_images_and_every_class(monkeypatch):
    source = load_source("digits", None, "test")
    monkeypatch.setattr(subject, "QUICK_IMAGES", 50)
    order = np.argsort(source.labels, kind="stable")
    ordered = subject._first(
        type(source)("digits", "test", source.images[order], source.labels[order], source.classes, ""), 50
    )
    assert len(ordered.images) == 50 and len(np.unique(ordered.labels)) == 10
    assert subject._first(source, 50).sha256 == load_source("digits", None, "test", limit=50).sha256


def test_quick_takes_a_row_of_every_class_of_shuffled_rows():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(40), 5))
    images = np.arange(200, dtype=np.uint8).repeat(3).reshape(200, 3, 1, 1)
    source = type(load_source("digits", None, "test"))("many", "test", images, labels, tuple(map(str, range(40))), "")
    assert len(np.unique(labels[:50])) < 40
    part = subject._first(source, 50)
    rows = part.images[:, 0, 0, 0]
    assert (np.diff(rows.astype(int)) > 0).all() and np.array_equal(part.labels, labels[rows])
    taken = np.bincount(part.labels, minlength=40)
    assert sorted(taken) == [1] * 30 + [2] * 10
    for label in range(40):  # of a class its first rows, and two of those ten that appear first
        assert np.array_equal(rows[part.labels == label], np.flatnonzero(labels == label)[: taken[label]])
    order = list(dict.fromkeys(labels.tolist()))
    assert all(taken[label] == 2 for label in order[:10])


def test_classes_without_images_have_a_place_in_the_report(runs, monkeypatch):
    monkeypatch.setattr(subject, "QUICK_IMAGES", 5)
    report, _ = ask(runs / "pgd", limit=None, teachers=None)
    assert sum(row["count"] == 0 for row in report.record["per_class"]) == 5
    assert "no images" in report.page.read_text()


def test_a_model_trained_on_the_test_images_is_told(runs, tiny_cache, tmp_path):
    from darht.trainer.evaluation.checks.leakage import trained_on

    cache = open_cache(tiny_cache)
    train = load_source("digits", None, "train", limit=100)
    assert trained_on(cache, train) == 100
    part = type(train)("digits", "test", train.images[:7], train.labels[:7], train.classes, "")
    assert trained_on(cache, part) == 7
    assert trained_on(cache, load_source("digits", None, "test", limit=40)) < 3


def test_a_teacher_can_be_given_by_folder(runs, tiny_teachers, tmp_path):
    moved = shutil.copytree(tiny_teachers["vit"], tmp_path / "moved")
    own = ask(runs / "pgd")[0].scores
    assert ask(runs / "pgd", teachers={"vit": str(moved)})[0].scores == own


def test_a_source_swapped_under_its_name_gives_its_own_numbers(runs, tiny_teachers, tmp_path):
    """The books of the first source are not taken for the second one's, though every name is the same."""
    place, found = tmp_path / "source", {}
    for name in ("cnn", "vit"):
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(tiny_teachers[name], place)
        for out in ("same", name):  # in one folder, and in one of its own
            report, _ = ask(
                runs / "pgd", limit=24, teachers={"cnn": str(place)}, surrogates=(str(place),), out=tmp_path / out
            )
            scores = {score.name: score for score in report.scores}
            told = [score for name, score in scores.items() if name.startswith(("transfer:cnn", "surrogate:"))]
            found[name, out] = [(score.name, score.attack["weights"], score.correct) for score in told]
            fates = np.load(report.path.with_suffix(".npz"))
            found[name, out].append(fates["right"][fates["attacks"].tolist().index("transfer:cnn")].tolist())
    assert len(found["cnn", "same"]) == 3
    assert found["cnn", "same"] == found["cnn", "cnn"] and found["vit", "same"] == found["vit", "vit"]
    for first, second in zip(found["cnn", "same"][:2], found["vit", "same"][:2], strict=True):
        assert first[1] != second[1]


def test_a_stronger_evaluation_stays(runs, tmp_path):
    first = ask(runs / "pgd", tier="standard", teachers=None)[0]
    before, told = first.path.read_bytes(), []
    for options in ({"tier": "quick"}, {"tier": "standard", "limit": 30}, {"tier": "standard", "eps": 16.0}):
        config = EvalConfig(**{"limit": 40, "autoattack": TINY, "queries": (30, 50), "teachers": None, **options})
        with pytest.raises(ConfigError, match=r"eval.json holds an? .*: give --out DIR, or remove it"):
            evaluate(str(runs / "pgd"), config, device=CPU, on_batch=lambda *batch: told.append(batch))
    assert told == [] and first.path.read_bytes() == before
    ask(runs / "pgd", tier="standard", teachers=None)
    ask(runs / "pgd", teachers=None, out=tmp_path)
    first.path.write_text("{")
    assert ask(runs / "pgd", teachers=None)[0].record["tier"] == "quick"


def test_a_teacher_that_is_not_there_names_the_options(runs, tmp_path):
    with pytest.raises(ConfigError, match=r"is not a teacher folder.*give --teacher NAME=FOLDER, or --no-transfer"):
        ask(runs / "pgd", teachers={"cnn": str(tmp_path)})


def test_a_teacher_of_other_classes_cannot_transfer(runs, tmp_path):
    kwargs = {"width": 4}
    save_teacher(
        tmp_path, build("wrn-10-1", 4, kwargs), Card("wrn-10-1", 4, "", kwargs=kwargs, preprocessing=Preprocessing())
    )
    with pytest.raises(ConfigError, match="the student has 10 classes, teacher 'cnn' has 4"):
        ask(runs / "pgd", teachers={"cnn": str(tmp_path)})


def test_a_student_alone_does_not_say_what_data_it_belongs_to(runs):
    with pytest.raises(ConfigError, match="give --data NAME"):
        ask(runs / "pgd" / "student")


def test_a_folder_that_is_nothing(tmp_path):
    with pytest.raises(CacheError, match="is not a run"):
        ask(tmp_path)


def test_options_that_do_not_go_together():
    with pytest.raises(ConfigError, match="add --tier standard"):
        EvalConfig(reference=True)
    with pytest.raises(ConfigError, match="an L2 radius has no default"):
        EvalConfig(norm="l2")


def test_l2_is_measured_and_says_what_it_cannot_do(runs, tmp_path):
    report, _ = ask(runs / "pgd", norm="l2", eps=128.0, teachers=None, out=tmp_path)
    assert report.record["threat"] == {"norm": "l2", "eps": 128.0}
    assert report.scores[-1].attack["norm"] == "l2"


def test_a_student_with_monte_carlo_dropout_is_attacked_in_expectation(tiny_cache, tmp_path):
    """Trained and evaluated as a user would, with everything that the full tier has."""
    config = TrainConfig(
        student=StudentConfig(arch="resnet18", kwargs={"width": 4, "blocks": [1, 1, 1, 1]}, mc_dropout=0.3,
                              mc_samples=2),
        recipe="at",
        inner=InnerConfig(kind="pgd", eps=32, step=8, steps=1),
        optim=OptimConfig(epochs=3, batch_size=32, lr=0.1),
    )  # fmt: skip
    train(config, open_cache(tiny_cache), tmp_path / "run", device=CPU)
    shares = Substitution(shares=(0.02,), rounds=1, epochs=1, width=4)
    options = {"tier": "full", "samples": 2, "substitution": shares, "limit": 24, "queries": (10, 20)}
    report, _ = ask(tmp_path / "run", **options)
    scores = {score.name: score for score in report.scores}
    assert list(scores["autoattack"].attack["after"]) == ["apgd-ce", "apgd-dlr"]  # version rand
    assert report.record["warnings"] == ["the model's output is random: attacked and judged as the mean of 2 draws"]
    check = next(one for one in report.masking.checks if one.name == "the answer is not random")
    assert check.passed and check.figures == {"random": 1.0}
    assert report.record["folded"]["passed"]  # for the same draws
    assert {"adaptive:z, ce", "adaptive:saga", "square", "rays"} <= set(scores) | set(report.record["left_out"])
    card = (tmp_path / "run" / "student" / "README.md").read_text()
    assert "**Warning:** the model's output is random" in card and "dropout of 0.3" in card
    shutil.rmtree(tmp_path / "run" / "eval-parts")
    report.path.unlink()
    again, _ = ask(tmp_path / "run", **options | {"tier": "standard", "corruptions": True})
    assert again.record["corruptions"] == report.record["corruptions"]  # every draw is seeded
    assert {score.name: score for score in again.scores}["autoattack"].correct == scores["autoattack"].correct


def test_a_model_that_is_never_right_gets_a_report_too(sound, tmp_path):
    report, _ = ask("python:frauds:never", data="digits", eps=8, tier="standard", out=tmp_path)
    assert report.scores[-1].correct == 0
    assert [check.name for check in report.masking.checks if not check.passed] == ["something to attack"]
    assert "No image fell" in report.page.read_text()
