"""What an evaluation leaves behind: `eval.json`, `eval.md`, `report.html`, and `eval.npz` with every image's fate."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from darht.core.files import sha256_bytes, write_atomic
from darht.core.markdown import escape
from darht.core.sealed import write_sealed
from darht.core.version import VERSION
from darht.trainer.evaluation.checks.calibration import Calibration, calibration, interval
from darht.trainer.evaluation.checks.masking import Masking
from darht.trainer.evaluation.measure import Measurement
from darht.trainer.evaluation.report.page import write_page
from darht.trainer.evaluation.score import NORMS, SCHEMA_VERSION, Score
from darht.trainer.evaluation.target import Target

FEW_CLASSES = 20  # up to so many the confusion matrix is written out


@dataclass(frozen=True)
class EvalReport:
    """An evaluation, measured and written.

    Attributes:
        record: what `eval.json` holds.
        scores: one for each attack, the worst case last.
        masking: the checks.
        path: of `eval.json`.
        page: of `report.html`.
    """

    record: dict[str, Any]
    scores: tuple[Score, ...]
    masking: Masking
    path: Path
    page: Path

    @property
    def note(self) -> str:
        """How the numbers may be read."""
        return str(self.record["note"])


def describe(attack: dict[str, Any]) -> str:
    """The attack of a score, in a few words."""
    if not attack:
        return ""
    if "over" in attack:
        return f"per image, over everything that ran ({len(attack['over']) - 1} attack steps)"
    parts = [f"{NORMS[attack['norm']]} {attack['eps']:g}/255"]
    if "steps" in attack:
        size = f" of {attack['step']:g}" if "step" in attack else ""
        parts.append(f"{attack['steps']} steps{size}")
    parts += [f"{attack[name]} {name}" for name in ("queries", "draws") if name in attack]
    if attack.get("restarts", 1) > 1:
        parts.append(f"{attack['restarts']} starts")
    if "version" in attack:
        parts.append(f"version {attack['version']}, by {attack['by']}")
    if "for_dlr" in attack:
        parts.append(f"the {attack['for_dlr']} stands in for DLR")
    left = ", ".join(f"{part} {count}" for part, count in attack.get("after", {}).items())
    return f"{', '.join(parts)}, on {attack['against']}{left and f'; left after {left}'}"


def write_report(
    folder: Path, stem: str, target: Target, m: Measurement, *, masking: Masking, facts: dict[str, Any]
) -> EvalReport:
    """Write `STEM.json`, `STEM.md`, `STEM.npz` and the page `report.html` (`report-last.html` for `eval-last`)."""
    sure = calibration(m.logits, m.setup.source.labels)
    record = {**_head(target, m, facts), **_body(stem, m, masking, sure, facts)}
    images = _per_image(m)
    write_atomic(folder / f"{stem}.npz", images)
    write_sealed(folder / f"{stem}.json", record, {f"{stem}.npz": sha256_bytes(images)})
    write_atomic(folder / f"{stem}.md", markdown(record).encode())
    page = folder / f"{stem.replace('eval', 'report', 1)}.html"
    write_page(page, record, m)
    return EvalReport(record, tuple(m.scores), masking, folder / f"{stem}.json", page)


def _head(target: Target, m: Measurement, facts: dict[str, Any]) -> dict[str, Any]:
    """What was measured on what."""
    source = m.setup.source
    data = {"source": source.name, "split": source.split, "rows": len(source.images), "sha256": source.sha256}
    parameters = sum(p.numel() for p in m.setup.model.parameters())
    model = {"name": target.name, "kind": target.kind, "parameters": parameters, "weights": target.fingerprint()}
    return {
        "schema_version": SCHEMA_VERSION,
        "darht": VERSION,
        **target.about,
        "model": model,
        "tier": facts["tier"],
        "threat": {"norm": m.setup.threat.norm, "eps": m.setup.threat.eps},
        "seed": m.setup.seed,
        "data": data,
    }


def _body(stem: str, m: Measurement, masking: Masking, sure: Calibration, facts: dict[str, Any]) -> dict[str, Any]:
    """The figures."""
    clean, worst = m.scores[0], m.scores[-1]
    return {
        "robust_accuracy": worst.record(),
        "clean_robust_mean": round((clean.accuracy + worst.accuracy) / 2, 4),
        "note": facts["note"],
        "warnings": facts["warnings"],
        "scores": [{**score.record(), "in_words": describe(score.attack)} for score in m.scores],
        "left_out": m.left_out,
        "folded": facts["folded"],
        "masking": masking.record(),
        "calibration": sure.record(),
        "corruptions": facts["corruptions"],
        "per_class": _per_class(m),
        "confusion": _confusion(m),
        "per_image": f"{stem}.npz",
    }


def _per_class(m: Measurement) -> list[dict[str, Any]]:
    rows = []
    for label, name in enumerate(m.setup.source.classes):
        of = m.setup.source.labels == label
        count = int(of.sum())
        clean, robust = (int((m.right[key][of] == 1).sum()) for key in ("clean", "worst case"))
        intervals = {"clean_interval95": interval(clean, count), "robust_interval95": interval(robust, count)}
        rows.append({"class": name, "count": count, "clean": clean, "robust": robust, **intervals})
    return rows


def _confusion(m: Measurement) -> dict[str, Any]:
    """Counts of (clean answer, adversarial answer): a matrix for few classes, and the most frequent changes."""
    C = len(m.setup.source.classes)
    pairs, counts = np.unique(np.stack([m.predictions, m.adversarial], 1), axis=0, return_counts=True)
    order = np.lexsort((pairs[:, 1], pairs[:, 0], -counts))
    changes = [(pairs[k], int(counts[k])) for k in order if pairs[k][0] != pairs[k][1]][:20]
    names = m.setup.source.classes
    result: dict[str, Any] = {
        "changes": [{"clean": names[a], "adversarial": names[b], "count": n} for (a, b), n in changes]
    }
    if C <= FEW_CLASSES:
        matrix = np.zeros((C, C), dtype=int)
        matrix[pairs[:, 0], pairs[:, 1]] = counts
        result["matrix"] = matrix.tolist()
    return result


def _per_image(m: Measurement) -> bytes:
    """Every image's label, answers, and fate under each attack: 1 right, 0 wrong, -1 not asked."""
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        label=m.setup.source.labels,
        clean=m.predictions.astype(np.int32),
        adversarial=m.adversarial.astype(np.int32),
        attacks=np.array(list(m.right)),
        right=np.stack(list(m.right.values())),
    )
    return buffer.getvalue()


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _span(ends: Sequence[float]) -> str:
    return f"{ends[0]:.1f} - {ends[1]:.1f}"


def markdown(record: dict[str, Any]) -> str:
    """The report for a terminal or a repository."""
    worst, threat = record["robust_accuracy"], record["threat"]
    low, high = worst["interval95"]
    clean = record["scores"][0]["accuracy"]
    lines = [
        f"# {escape(record['model']['name'])}",
        "",
        f"Robust accuracy **{worst['accuracy']:.1f} %** [{low:.1f}, {high:.1f}] at {NORMS[threat['norm']]} "
        f"{threat['eps']:g}/255: the worst case per image over everything that ran, on {worst['count']} test images of "
        f"{escape(record['data']['source'])}. Clean {clean:.1f} %, mean of both {record['clean_robust_mean']:.1f} %. "
        f"Tier {record['tier']}, seed {record['seed']}.",
        "",
        *([escape(record["note"]), ""] if record["note"] else []),
        *(f"**Warning:** {escape(text)}\n" for text in record["warnings"]),
        _row(["measured", "%", "95 % interval", "right of", "on", "attack"]),
        "|---|---:|---|---:|---|---|",
    ]
    for score in record["scores"]:
        span, of = _span(score["interval95"]), f"{score['correct']} of {score['count']}"
        name, on, attack = (escape(score[key]) for key in ("name", "on", "in_words"))
        lines.append(_row([name, f"{score['accuracy']:.1f}", span, of, on, attack]))
    lines += ["", *_checks(record), *_rest(record)]
    return "\n".join(lines) + "\n"


def _checks(record: dict[str, Any]) -> list[str]:
    masking = record["masking"]
    verdict = masking["verdict"] if masking["passed"] else "**failed: do not believe the numbers above**"
    lines = [
        f"## Gradient masking: {verdict}",
        "",
        f"Checks and curve are on the first {masking['images']} images that are right when clean, the sample. What "
        "warns, honest models do as well.",
        "",
        _row(["", "check", "rule", "figures"]),
        "|---|---|---|---|",
    ]
    for check in masking["checks"]:
        figures = ", ".join(f"{name} {value:.4g}" for name, value in check["figures"].items())
        lines.append(_row([check["status"], check["name"], check["rule"], figures]))
    if curve := masking["curve"]:
        lines += ["", _row(["epsilon", *(f"{p['eps']:g}" for p in curve)]), "|---|" + "---:|" * len(curve)]
        lines += [_row(["right of the sample, %", *(f"{100 * p['correct'] / p['count']:.1f}" for p in curve)])]
        lines += [_row(["95 % interval", *(_span(p["interval95"]) for p in curve)])]
    return [*lines, ""]


def _rest(record: dict[str, Any]) -> list[str]:
    lines = [f"Expected calibration error {record['calibration']['ece']:.2f} %."]
    if record["folded"]:
        folded = record["folded"]
        lines.append(
            f"Folded and unfolded student: {folded['differing']} of {folded['images']} answers differ, logits by at "
            f"most {folded['largest']:.1e} of the largest."
        )
    if record["corruptions"]:
        table = record["corruptions"]
        kinds, mean = len(table["accuracy"]), f"{table['mean_accuracy']:.1f} %, on {table['images']} images"
        lines += ["", f"Mean accuracy under {kinds} corruptions at 5 severities: {mean}, each under all of them. In "
                  "brackets: 95 % interval.", ""]  # fmt: skip
        lines += [_row(["corruption", *"12345"]), "|---|" + "---:|" * 5]
        for name, values in table["accuracy"].items():
            cells = zip(values, table["interval95"][name], strict=True)
            lines.append(_row([name, *(f"{value:.1f} [{_span(ends)}]" for value, ends in cells)]))
    if record["left_out"]:
        lines += [
            "",
            "Left out:",
            "",
            *(f"- {escape(name)}: {escape(why)}" for name, why in record["left_out"].items()),
        ]
    return lines
