"""The report as one page that needs nothing beside itself."""

from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from darht.core.files import write_atomic
from darht.trainer.evaluation.checks.masking import SURFACE_IMAGES
from darht.trainer.evaluation.measure import SHOWN, Example, Measurement
from darht.trainer.evaluation.report import charts

_HERE = "darht.trainer.evaluation.report"


def write_page(path: Path, record: dict[str, Any], m: Measurement) -> None:
    """Write the page of an evaluation: `record` is what `eval.json` holds, `m` has the pictures."""
    facts: dict[str, Any] = {"r": record, "families": _families(record), "gallery": _gallery(m), **_charts(record)}
    facts["fewest"] = charts.FEWEST_IN_BIN
    facts["surface_images"] = min(SURFACE_IMAGES, record["masking"]["images"])
    write_atomic(path, render("report.html", facts).encode())


def render(template: str, facts: dict[str, Any], package: str = _HERE) -> str:
    """A template of a package's folder `templates` with everything escaped that is not markup.

    `base.html`, which holds the style sheet of all pages, is found from every package.
    """
    loaders = [PackageLoader(name, "templates") for name in dict.fromkeys((package, _HERE))]
    environment = Environment(loader=ChoiceLoader(loaders), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True)  # fmt: skip
    environment.filters["pct"] = lambda value: f"{value:.1f}"
    return environment.get_template(template).render(facts)


_HEADINGS = {
    "": "",
    "white-box": "white-box",
    "transfer": "transfer from the teachers",
    "adaptive": "adaptive: knows the feature map and the teachers",
    "black-box": "black-box",
    "check": "of the masking checks",
    "worst": "",
}


def _families(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The scores under their headings, the worst case last; names without the prefix that the heading says already."""
    groups: dict[str, list[dict[str, Any]]] = {family: [] for family in _HEADINGS}
    for score in record["scores"]:
        family = "worst" if score["name"] == "worst case" else score["family"]
        groups[family].append({**score, "short": score["name"].removeprefix(f"{family}:")})
    return [{"heading": _HEADINGS[family], "scores": scores} for family, scores in groups.items() if scores]


def _charts(record: dict[str, Any]) -> dict[str, Markup]:
    masking, bins = record["masking"], record["calibration"]["bins"]
    curve = []
    for point in masking["curve"]:
        curve.append((point["eps"], 100 * point["correct"] / point["count"], *point["interval95"]))
    drawn = {
        "curve": charts.curve(curve, record["threat"]["eps"]),
        "classes": charts.class_bars(record["per_class"]),
        "reliability": charts.reliability([(b["confidence"], b["accuracy"], b["count"]) for b in bins]),
        "surface": charts.surface(masking["surface"], record["threat"]["eps"]),
        "matrix": "",
    }
    if "matrix" in record["confusion"]:
        drawn["matrix"] = charts.matrix(record["confusion"]["matrix"], [row["class"] for row in record["per_class"]])
    return {name: Markup(svg) for name, svg in drawn.items()}  # charts escape what they are given


def _gallery(m: Measurement) -> list[dict[str, Any]]:
    """The images whose adversarial answers are surest of themselves."""
    hardest = sorted(m.examples.values(), key=lambda example: (-example.confidence, example.row))[:SHOWN]
    return [_shown(m, example) for example in hardest]


def _shown(m: Measurement, example: Example) -> dict[str, Any]:
    clean, names = m.setup.source.images[np.array([example.row])][0], m.setup.source.classes
    largest = float(np.abs(example.delta).max())
    amplified = 127.5 + example.delta * (127.5 / max(largest, 1e-6))
    attacked = np.clip(clean.astype(np.float32) + example.delta, 0, 255)
    shifted = np.exp(m.logits[example.row].astype(np.float64) - m.logits[example.row].max())
    sure = float((shifted / shifted.sum()).max())
    return {
        "row": example.row,
        "attack": example.attack,
        "clean": charts.picture(clean),
        "delta": charts.picture(np.clip(amplified, 0, 255).round().astype(np.uint8)),
        "adversarial": charts.picture(attacked.round().astype(np.uint8)),
        "factor": 127.5 / max(largest, 1e-6),
        "label": names[int(m.setup.source.labels[example.row])],
        "was": names[int(m.predictions[example.row])],
        "was_sure": 100 * sure,
        "now": names[example.prediction],
        "now_sure": 100 * example.confidence,
    }
