"""The model card: what it tells, and that it tells nothing that was not measured."""

import json

import pytest
import torch
import yaml
from markdown_it import MarkdownIt
from safetensors.torch import save_file

from darht.cache.builder.teachers import read_card
from darht.cache.read.reader import open_cache
from darht.core.preprocessing import Preprocessing
from darht.trainer.export.model_card import (
    README,
    count_parameters,
    inner_label,
    model_card,
    teacher_notes,
    write_model_card,
)
from darht.trainer.state.checkpoint import BEST, StudentCard, save_student
from darht.trainer.student.model import Student

KWARGS = {"width": 4, "blocks": [1, 1, 1, 1]}
INNER = {"kind": "pgd", "eps": 8.0, "steps": 10}
TEACHERS = {
    "wrn": {"role": "robust", "arch": "wrn-34-10", "algorithm": "trades",
            "accuracy": {"cifar10 test": {"clean": 84.9, "pgd-20": 55.1, "eps": 8.0}}},
    "vit": {"role": "vanilla", "arch": "timm:vit"},
}  # fmt: skip


def measured(name, accuracy, count, attack=None, family="", on="all images", words=""):
    return {"name": name, "accuracy": accuracy, "interval95": [accuracy - 1, accuracy + 1], "count": count,
            "correct": round(accuracy * count / 100), "attack": attack or {}, "family": family, "on": on,
            "in_words": words}  # fmt: skip


OVER = {"over": ["clean", "pgd-20", "check:noise", "square"], "eps": 8.0, "norm": "linf", "seed": 0}
REPORT = {
    "schema_version": 2,
    "epoch": 3,
    "cache_root_hash": "aa" * 32,
    "tier": "full",
    "data": {"source": "cifar10", "split": "test", "rows": 10_000},
    "warnings": [],
    "masking": {"passed": True},
    "robust_accuracy": measured("worst case", 48.0, 10_000, OVER),
    "scores": [
        measured("clean", 81.26, 10_000),
        measured("pgd-20", 52.0, 10_000, family="white-box", words="L-inf 8/255, 20 steps, on the evaluated model"),
        measured("check:noise", 99.0, 100, family="check", on="the sample of 100 images"),
        measured("square", 90.0, 500, family="black-box", on="those that withstood pgd-20"),
        measured("worst case", 48.0, 10_000, OVER, words="per image, over all 3 attacks and clean"),
    ],
}


def make_card(inner=INNER, **changes):
    values = {
        "arch": "resnet18",
        "kwargs": KWARGS,
        "teachers": ("wrn", "vit"),
        "num_classes": 5,
        "preprocessing": Preprocessing(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)),
        "classes": tuple("abcde"),
        "cache_root_hash": "aa" * 32,
        "recipe": {"recipe": "darht", "inner": inner, "optim": {"epochs": 9, "batch_size": 32, "lr": 0.1}, "seed": 4},
        "epoch": 3,
        "selection": {"holdout_clean": 80.0, "holdout_pgd": 50.5},
        "image_size": (32, 32),
    }
    return StudentCard(**{**values, **changes})


def text(card=None, teachers=TEACHERS, report=None, form="hub"):
    return model_card(card or make_card(), teachers, report, parameters=11_173_962, form=form)


def test_the_card_says_where_the_student_came_from():
    said = text()
    front = yaml.safe_load(said.split("---")[1])
    assert front["pipeline_tag"] == "image-classification"
    for part in (
        "feature map of 2 rows (wrn, vit)",
        "32x32 pixels, 5 classes",
        "11,173,962 parameters",
        "aa" * 32,
        "| recipe | `darht` |",
        "`pgd`, 10 steps on the student",
        "L-inf, 8/255",
        "| epoch | 3 of 9 |",
        "| wrn | wrn-34-10 | robust | trades | cifar10 test: clean 84.9, PGD-20 at 8/255 55.1 |",
        "| vit | timm:vit | vanilla | not known | not known |",
        "## Intended use",
        "## Limits",
    ):
        assert part in said, part
    assert "transfer robustness" not in said
    assert "Dropout" not in said and "dropout" not in said


def test_held_out_accuracies_are_called_what_they_are():
    said = text()
    assert "On rows held out of the *training* split" in said
    assert "clean 80.0 %, PGD at 8/255 50.5 %" in said
    assert "not test accuracies" in said and "has not been evaluated on test images" in said
    assert "Not measured: no training rows were held out" in text(make_card(selection={}))


def test_an_evaluation_takes_their_place():
    said = text(report=REPORT)
    assert "tier `full`, on 10,000 images of the test split of cifar10" in said
    assert "**48.0 %** [47.0, 49.0] at L-inf 8/255: the worst case per image over all 3 attacks." in said
    assert "| clean | 81.3 | 80.3 - 82.3 | 8126 of 10000 | all images |  |" in said
    assert "| 5200 of 10000 | all images | L-inf 8/255, 20 steps, on the evaluated model |" in said
    assert "| square | 90.0 | 89.0 - 91.0 | 450 of 500 | those that withstood pgd-20 |" in said
    assert "per image, over all 3 attacks and clean |" in said
    assert "check:" not in said and "all checks passed" in said and "Warning" not in said
    assert "held out" not in said and "has not been evaluated" not in said


def test_what_is_not_to_be_believed_says_so():
    said = text(report={**REPORT, "masking": {"passed": False}, "warnings": ["60 of 60 test images lie in the cache"]})
    assert "do not believe these numbers" in said and "all checks passed" not in said
    assert "**Warning:** 60 of 60 test images lie in the cache" in said


def test_cached_is_labelled_transfer_robustness():
    card = make_card({**INNER, "kind": "cached"})
    assert "transfer robustness" in inner_label(card)
    assert text(card).count("transfer robustness") == 2  # in the table and among the limits
    assert inner_label(make_card({**INNER, "kind": "warm"})) == "`warm`, on the student"


@pytest.mark.parametrize("recipe", [{"recipe": "kd"}, {"recipe": "at", "loss": {"clean_share": 1.0}}])
@pytest.mark.parametrize("kind", ["pgd", "cached"])
def test_clean_training_is_not_called_adversarial(recipe, kind):
    said = text(make_card(recipe={**make_card().recipe, **recipe, "inner": {**INNER, "kind": kind}}))
    assert "| adversarial examples | none: clean images only |" in said
    assert "trained on clean images only; no robustness is claimed" in said
    for wrong in ("10 steps", "| radius |", "trained against", "transfer robustness"):
        assert wrong not in said
    part = text(make_card(recipe={**make_card().recipe, "recipe": "at", "loss": {"clean_share": 0.5}}))
    assert "| radius | L-inf, 8/255 |" in part and "trained against L-inf" in part


@pytest.mark.parametrize(
    ("form", "part"),
    [
        ("hub", "load_student(Path("),
        ("plain", "net = build('resnet18', 5, {'width': 4, 'blocks': [1, 1, 1, 1]}).eval()"),
        ("onnx", 'session.run(["logits"], {"pixels": pixels})[0]'),
    ],
)
def test_each_form_says_how_it_is_used(form, part):
    said = text(make_card(mc_dropout=0.2, mc_samples=16), form=form)
    assert part in said
    dropout = "answers are means over 16 random passes" if form == "hub" else "which is off here"
    assert f"Monte-Carlo dropout of 0.2{';' if form == 'hub' else ','} {dropout}" in said


@pytest.mark.parametrize("side", [None, 12])
def test_the_snippet_of_the_plain_form_answers_as_the_student(side, tmp_path, monkeypatch):
    card = make_card(preprocessing=Preprocessing(resize=side, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)))
    with torch.random.fork_rng(devices=[]):
        student = Student("resnet18", KWARGS, teachers=2, num_classes=5, preprocessing=card.preprocessing).eval()
    save_file(student.plain().net.state_dict(), tmp_path / "plain.safetensors")
    said = text(card, form="plain")
    assert ("pixels go in *resized to 12x12 and normalised*" if side else "pixels go in *normalised*") in said
    monkeypatch.chdir(tmp_path)
    pixels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    names = {"pixels": pixels}
    with torch.no_grad():
        exec(said.split("```python\n")[1].split("```")[0], names)
        torch.testing.assert_close(names["logits"], student.fold()(pixels))


def saved(run, **changes):
    card = make_card(**changes)
    with torch.random.fork_rng(devices=[]):
        student = Student("resnet18", KWARGS, teachers=2, num_classes=5, preprocessing=card.preprocessing)
    save_student(run / BEST, student, card)
    (run / "run.json").write_text(json.dumps({"teachers": TEACHERS}))
    return student


def test_parameters_are_counted_without_statistics(tmp_path):
    student = saved(tmp_path)
    assert count_parameters(tmp_path / BEST / "model.safetensors") == sum(p.numel() for p in student.parameters())


@pytest.mark.parametrize("changes", [{}, {"epoch": 2}, {"cache_root_hash": "bb"}, {"schema_version": 1}])
def test_an_evaluation_of_another_student_does_not_count(changes, tmp_path):
    saved(tmp_path)
    (tmp_path / "eval.json").write_text(json.dumps({**REPORT, **changes}))
    write_model_card(tmp_path, BEST)
    said = (tmp_path / BEST / README).read_text()
    assert ("of the test split of cifar10" in said) == (not changes)
    assert ("On rows held out" in said) == bool(changes)
    assert "wrn-34-10" in said


def test_teachers_are_noted_with_what_was_measured_on_them(tiny_cache, tiny_teachers, monkeypatch):
    cache = open_cache(tiny_cache)
    notes = teacher_notes(cache)
    assert list(notes) == ["cnn", "vit"]
    assert notes["cnn"]["role"] == "robust" and notes["cnn"]["arch"] == "resnet18"
    assert notes["cnn"]["weights_sha256"] == cache.spec.teachers["cnn"].weights_sha256
    assert notes["cnn"]["accuracy"] == read_card(tiny_teachers["cnn"]).accuracy
    folders = {"cnn": str(tiny_teachers["vit"]), "vit": str(tiny_cache)}  # other weights, and no teacher at all
    monkeypatch.setattr(cache, "origin", lambda: {"teachers": folders})
    assert all("accuracy" not in note for note in teacher_notes(cache).values())
    monkeypatch.setattr(cache, "origin", dict)
    assert [note["role"] for note in teacher_notes(cache).values()] == ["robust", "robust"]


def test_names_are_text_in_the_card():
    hostile = "a | [b](http://c) <img src=d>\n# e"
    report = {**REPORT, "warnings": [hostile], "scores": [measured(hostile, 50.0, 10, on=hostile, words=hostile)]}
    teachers = {hostile: {"role": hostile, "arch": hostile, "algorithm": hostile,
                          "accuracy": {hostile: {"clean": 1.0, "pgd-20": 1.0, "eps": 8.0}}}}  # fmt: skip
    text = model_card(make_card(arch=hostile, teachers=(hostile,)), teachers, report, parameters=1)
    front, body = text.removeprefix("---\n").split("\n---\n", 1)
    assert yaml.safe_load(front)["tags"][-1] == hostile.replace(":", "-")
    html = MarkdownIt("commonmark").enable("table").render(body)
    assert not any(tag in html for tag in ("<a", "<img", "<h1>e"))
    assert html.count("<h1>") == 1
