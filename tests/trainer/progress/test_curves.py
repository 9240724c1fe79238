"""The picture of a run: it is drawn from whatever the log holds, and shows what it holds."""

import io
import json

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from darht.core.errors import CacheError
from darht.trainer.progress import curves
from darht.trainer.progress.curves import draw_curves, write_curves
from darht.trainer.state.checkpoint import write_run

PHASES = ((0.0, "CE"), (2.0, "CE + KD"), (4.0, "KD"))
ROWS = [
    {"epoch": 1, "loss": 2.0, "train_clean": 30.0, "train_adversarial": None, "holdout_clean": 40.0,
     "holdout_pgd": 20.0, "lr": 0.1},
    {"epoch": 2, "loss": 1.0, "train_clean": 50.0, "train_adversarial": 30.0, "holdout_clean": 60.0,
     "holdout_pgd": 35.0, "lr": 0.1},
    {"epoch": 3, "loss": 0.5, "train_clean": 60.0, "train_adversarial": 40.0, "holdout_clean": 61.0,
     "holdout_pgd": 35.0, "lr": 0.01},
]  # fmt: skip


@pytest.fixture
def figures(monkeypatch):
    """Every figure that is saved."""
    kept, save = [], Figure.savefig

    def keep(figure, *arguments, **options):
        kept.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return kept


def drawn(axes):
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


def test_the_curves_show_the_log(figures):
    picture = draw_curves(ROWS, epochs=6, phases=PHASES, title="a run")
    assert np.asarray(Image.open(io.BytesIO(picture))).shape[:2] == (960, 960)
    loss, accuracy, rate = figures[0].axes
    assert list(loss.lines[0].get_ydata()) == [2.0, 1.0, 0.5]
    lines = drawn(accuracy)
    assert lines["held out, clean"] == ([1, 2, 3], [40.0, 60.0, 61.0])
    assert lines["held out, PGD"] == ([1, 2, 3], [20.0, 35.0, 35.0])
    assert lines["training, adversarial"] == ([2, 3], [30.0, 40.0])  # what was not measured is left out
    assert lines["best: epoch 3, PGD 35.0 %"] == ([3], [35.0])  # of equals the later one, as the run keeps it
    assert list(rate.lines[0].get_ydata()) == [0.1, 0.1, 0.01]
    assert rate.get_xlim() == (0.5, 6.5)
    assert [text.get_text() for text in loss.texts] == ["CE", "CE + KD", "KD"]
    assert [line.get_xdata()[0] for line in loss.lines[1:]] == [2.5, 4.5]


def test_a_run_without_phases_and_held_out_rows(figures):
    rows = [{"epoch": 1, "loss": 2.0, "train_clean": None, "train_adversarial": None, "lr": 0.1}]
    draw_curves(rows, epochs=1, phases=(), title="")
    loss, accuracy, _ = figures[0].axes
    assert not loss.texts and not accuracy.lines and accuracy.get_legend() is None


def test_a_narrow_phase_goes_without_its_name(figures):
    draw_curves(ROWS, epochs=350, phases=((0.0, "CE"), (3.0, "CE + KD"), (120.0, "KD")), title="")
    assert [text.get_text() for text in figures[0].axes[0].texts] == ["CE + KD", "KD"]


def run_with(tmp_path, **recipe):
    base = {"student": {"arch": "resnet18"}, "inner": {"kind": "pgd"}, "optim": {"epochs": 10}, **recipe}
    write_run(tmp_path, {"recipe": base}, {})
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


@pytest.mark.parametrize(
    ("recipe", "phases"),
    [
        ({"recipe": "darht", "phases": [0.2, 0.5]}, ((0.0, "CE"), (2.0, "CE + KD"), (5.0, "KD"))),
        ({"recipe": "darht", "loss": {"phases": [0.2, 0.5]}}, ((0.0, "CE"), (2.0, "CE + KD"), (5.0, "KD"))),
        ({"recipe": "at", "phases": [0.2, 0.5]}, ()),
    ],
)
def test_a_run_s_picture_knows_its_recipe(recipe, phases, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(curves, "draw_curves", lambda rows, **told: seen.update(told, rows=rows) or b"png")
    assert write_curves(run_with(tmp_path, **recipe)).read_bytes() == b"png"
    assert seen["phases"] == phases
    assert (seen["rows"], seen["epochs"]) == (ROWS, 10)
    assert seen["title"] == f"{tmp_path.name}: {recipe['recipe']} on resnet18, inner pgd"


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(CacheError, match="is not a run"):
        write_curves(tmp_path)
