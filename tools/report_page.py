"""The page of the report: one HTML file that holds its figures, tables and pictures, and asks no network."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from darht.cache.format.mixture import describe_sources
from darht.core.stats import wilson
from darht.tools.report import CacheReport, Hard
from darht.tools.report_figures import (
    Figure,
    angle_figure,
    class_figure,
    map_figures,
    size_figures,
    transfer_figure,
)
from darht.tools.select import WEAK
from darht.tools.vectors import read_rows
from darht.trainer.evaluation.report import charts, page

Cell = str | tuple[str, float]
"""Text, or text and the number that it is sorted by."""


CANDIDATES = 24  # label candidates shown as pictures
Part = dict[str, Any]
"""What a template of this package shows: `kind` names it, the rest is what it takes; or a `pair` of such."""
Section = dict[str, Any]


def render(report: CacheReport) -> str:
    """The whole page."""
    from plotly.offline import get_plotlyjs

    spec = report.cache.spec.data
    facts = {
        "title": f"{spec.source} {spec.split}: what its cache shows",
        "plotly": Markup(get_plotlyjs()),
        "head": _head(report),
        "sections": [
            _teachers(report),
            _transfer(report),
            _subspaces(report),
            _maps(report),
            _hardest(report),
            _odd_rows(report),
            _build(report),
        ],
    }
    return draw("report.html", facts)


def draw(template: str, facts: dict[str, Any]) -> str:
    """One of the templates of inspection."""
    return page.render(template, facts, "darht.tools")


def _section(finding: str, *parts: Part | None) -> Section:
    return {"finding": finding, "parts": parts}


def _figure(figure: Figure, name: str, *, heading: bool = True) -> Part:
    data = Markup(figure.drawing.to_json().replace("</", "<\\/"))
    title = figure.finding if heading else ""
    return {"kind": "figure", "id": name, "heading": title, "finding": figure.finding, "reading": figure.reading,
            "drawing": data}  # fmt: skip


def table(columns: Sequence[str], rows: Sequence[Sequence[Cell]], note: str = "") -> Part:
    """A table that sorts by a click on a column's name."""
    return {"kind": "table", "columns": columns, "rows": rows, "note": note}


def _text(note: str = "", heading: str = "") -> Part:
    return {"kind": "text", "note": note, "heading": heading}


def _per_cent(value: float) -> Cell:
    return ("unknown", -1.0) if np.isnan(value) else (f"{value:.1f}", value)


def _head(report: CacheReport) -> Section:
    cache, spec = report.cache, report.cache.spec
    held, total = len(cache.manifest.holdout), sum(array.size for array in report.arrays)
    height, width = spec.view_shape[1:]
    facts = {
        "images": f"{spec.data.rows:,} of {width}x{height} pixels, {held:,} of them held out for selection",
        **{f"source {number}": text for number, text in enumerate(describe_sources(spec.data.sources))},
        "classes": f"{len(spec.data.classes)}: {', '.join(spec.data.classes[:12])}"
        + (" ..." if len(spec.data.classes) > 12 else ""),
        "views": f"{spec.views.count} of every image ({spec.views.kind})",
        "attacks": "; ".join(
            f"{name}: {about.kind} on {about.teacher}, {about.parameters['norm']} {about.parameters['eps']:g}/255"
            for name, about in spec.attacks.items()
        ),
        "size": f"{total / 1e6:.1f} MB, {total / spec.data.rows:,.0f} bytes an image",
        "root hash": cache.root_hash,
    }
    words = f"{len(spec.teachers)} teachers have answered {spec.data.rows:,} {spec.data.source} images"
    extra = (
        f", clean and under {len(spec.attacks)} attacks" if len(spec.attacks) > 1 else ", clean and under one attack"
    )
    return {"finding": words + extra, "facts": facts}


def _teachers(report: CacheReport) -> Section:
    rows: list[list[Cell]] = []
    N = report.cache.spec.data.labelled
    for t, one in enumerate(report.candidates):
        spec = report.cache.spec.teachers[one.name]
        low, high = wilson(round(one.robust * N / 100), N) if not np.isnan(one.robust) else (0.0, 1.0)
        spread = f"{100 * low:.1f} - {100 * high:.1f}"
        rows.append([
            one.name, _per_cent(one.clean), _per_cent(one.robust), spread, _per_cent(one.kept),
            _per_cent(float(report.worst[t])), (f"{one.entropy:.2f}", one.entropy), spec.role, spec.arch,
            spec.weights_sha256[:8],
        ])  # fmt: skip
    columns = ["teacher", "clean %", "own attack %", "95 %", "kept %", "all attacks %", "entropy", "role", "network"]
    note = (
        "Own attack: right when clean and on every example made on this teacher, of all images that have a label; 95 % "
        "Wilson interval. Kept: of those right when clean. All attacks: right when clean and on every stored example. "
        "Entropy: of its answers to adversarial images, in nats. A click on a column sorts."
    )
    known = [one for one in report.candidates if not np.isnan(one.robust)]
    best = max(known, key=lambda one: one.robust)
    weak = [one for one in known if one.kept < WEAK]
    finding = (
        f"{best.name} withstands its own attack best: {best.robust:.1f} % of all images, {best.clean:.1f} % when clean"
    )
    if weak:
        finding += f"; {', '.join(one.name for one in weak)} keeps less than {WEAK:g} % of its right answers"
    return _section(finding, table([*columns, "weights"], rows, note))


def _transfer(report: CacheReport) -> Section:
    figure, by_class = transfer_figure(report), class_figure(report)
    return _section(
        figure.finding,
        _figure(figure, "transfer", heading=False),
        None if by_class is None else _figure(by_class, "classes"),
    )


def _subspaces(report: CacheReport) -> Section:
    found, figure = report.geometry, angle_figure(report)
    rows: list[list[Cell]] = []
    for (a, b), mix in found.mixing.items():
        by_class = found.class_angles[a, b]
        classes = float(np.nanmean(by_class)) if not np.isnan(by_class).all() else float("nan")
        means = [float(found.angles[a, b].min()), float(found.angles[a, b].mean()), classes]
        shares = [100 * float(found.energy[a, b]), 100 * float(found.energy[b, a]), 100 * mix.share]
        rows.append([f"{found.attacks[a]}, {found.attacks[b]}", *map(_per_cent, means), *map(_per_cent, shares),
                     (f"{mix.p_value:.3f}", mix.p_value)])  # fmt: skip
    columns = ["pair", "smallest °", "mean °", "in a class °", "energy %", "and back %", "mixing %", "p"]
    note = (
        f"Energy: how much of the first attack's perturbations lies in the second's {found.k} directions, and back "
        f"(chance: {100 * found.k / found.dim:.2f} %). Mixing: how many of an example's nearest neighbours belong to "
        "the other attack; 50 % when nothing tells them apart. p: how often chance mixes as little (999 permutations)."
    )
    pairs = table(columns, rows, note) if rows else None
    alone: list[list[Cell]] = [
        [name, found.sources[a], (f"{found.effective_rank[a]:.0f}", float(found.effective_rank[a])),
         _per_cent(100 * float(found.energy[a, a])), _per_cent(float(found.angles[a, a].mean()))]
        for a, name in enumerate(found.attacks)
    ]  # fmt: skip
    own = table(["attack", "made on", "effective rank", "own energy %", "its halves °"], alone,
                f"Effective rank: over how many of the {found.dim:,} dimensions the energy is spread.")  # fmt: skip
    return _section(figure.finding, _figure(figure, "angles", heading=False), pairs, own, *_directions(report))


def _directions(report: CacheReport) -> tuple[Part, ...]:
    found = report.gaas
    if found is None:
        return (_text(f"Orthogonal directions were not counted: {report.uncounted}."),)
    rows: list[list[Cell]] = []
    for s, name in enumerate(found.teachers):
        mean, half = found.mean(s)
        shares = [_per_cent(100 * found.share(s, t)) if s != t else "" for t in range(len(found.teachers))]
        rows.append([name, (f"{mean:.1f} ± {half:.1f}", mean), *shares])
    most = max(range(len(found.teachers)), key=lambda s: found.mean(s)[0])
    count = range(len(found.teachers))
    shared = [100 * found.share(s, t) for s in count for t in count if s != t]
    finding = f"{found.teachers[most]} can be fooled in {found.mean(most)[0]:.1f} orthogonal directions at once"
    finding += _shared(shared)
    note = (
        f"Directions aligned with the gradient, {found.eps:g}/255 at every pixel, on {len(found.rows)} images that all "
        "teachers answer rightly; mean with 95 % interval. Then the per cent of them that fool each other teacher too."
    )
    columns = ["made on", "directions", *(f"{t} %" for t in found.teachers)]
    return _text(heading=finding), table(columns, rows, note)


def _shared(shares: list[float]) -> str:
    """The largest entry of the table below."""
    known = [share for share in shares if not np.isnan(share)]
    if not known:
        return ""
    if not max(known):
        return "; no teacher's directions fool another"
    return f"; at most {max(known):.1f} % of a teacher's directions fool another teacher"


def _maps(report: CacheReport) -> Section:
    parts = []
    for plane in report.maps:
        first, second = map_figures(report, plane)
        name = plane.method.lower()
        parts.append(_pair(_figure(first, f"{name}-attack"), _figure(second, f"{name}-outcome")))
    held = 100 * report.maps[0].held
    return _section(
        f"Two of {report.geometry.dim:,} dimensions hold {held:.1f} % of the perturbations' variance", *parts
    )


def _pair(*sides: Part) -> Part:
    return {"pair": sides}


def _hardest(report: CacheReport) -> Section:
    count, T, data = len(report.rows.fooled_all), len(report.matrix.teachers), report.cache.spec.data
    finding = (
        f"{count:,} of {data.labelled:,} images "
        + ("with labels " if data.labelled < data.rows else "")
        + "have one example that fools "
        + ("the teacher" if T == 1 else f"all {T} teachers")
        + ", and all of them are right when it is clean"
    )
    cards = [_card(report, hard) for hard in report.hardest]
    note = (
        "Left: the image; middle: the perturbation around grey, full contrast at epsilon; right: the adversarial image."
        " Below: every teacher's three most probable classes for it."
    )
    return _section(finding, {"kind": "cards", "cards": cards, "note": note})


def _card(report: CacheReport, hard: Hard) -> dict[str, Any]:
    classes = report.cache.spec.data.classes
    pictures = [("image", hard.image), ("perturbation", np.rint(255 * hard.delta).astype(np.uint8)),
                ("adversarial image", hard.adversarial)]  # fmt: skip
    lines = [
        {
            "teacher": teacher,
            "words": ", ".join(f"{classes[c]} {100 * p:.0f} %" for c, p in top),
            "right": top[0][0] == hard.label,
        }
        for teacher, top in hard.top.items()
    ]
    drawn = [(what, _uri(pixels)) for what, pixels in pictures]
    return {
        "row": hard.row,
        "label": classes[hard.label],
        "said": f", by {hard.attack}",
        "pictures": drawn,
        "lines": lines,
    }


def _uri(pixels: np.ndarray) -> str:
    """Pixels uint8 `[H, W, 3]` as a PNG in the page."""
    return charts.picture(np.moveaxis(pixels, 2, 0))


def _odd_rows(report: CacheReport) -> Section:
    rows, classes = report.rows, report.cache.spec.data.classes
    lone = {name: sum(one.teacher == name for one in rows.only_one) for name in report.matrix.teachers}
    finding = (
        f"{len(rows.only_one):,} images stand with one teacher alone, and {len(rows.label_candidates):,} "
        f"{'label is' if len(rows.label_candidates) == 1 else 'labels are'} doubted by all teachers"
    )
    share = 100 / report.cache.spec.data.labelled
    alone = table(
        ["teacher", "images that it alone gets right", "% of all"],
        [[name, (f"{count:,}", count), (f"{share * count:.1f}", share * count)] for name, count in lone.items()],
        "Right when clean and on every stored example, where no other teacher is.",
    )
    wrong: list[list[Cell]] = [
        [(str(one.row), one.row), classes[one.label], classes[one.suggested], (f"{one.margin:.2f}", one.margin)]
        for one in rows.label_candidates[:50]
    ]
    labels = table(["row", "label", "all teachers say", "lead in probability"], wrong) if wrong else None
    return _section(finding, alone, labels, _candidates(report) if wrong else None)


def _candidates(report: CacheReport) -> Part:
    cache, classes = report.cache, report.cache.spec.data.classes
    shown = report.rows.label_candidates[:CANDIDATES]
    images = read_rows(cache, "image", np.array([one.row for one in shown], dtype=np.int64))
    cards = [
        {
            "row": one.row,
            "label": classes[one.label],
            "said": f"; all teachers say {classes[one.suggested]}",
            "pictures": [("image", charts.picture(image))],
            "lines": [],
        }
        for one, image in zip(shown, images, strict=True)
    ]
    note = (
        "Candidates: the label may be wrong, or all teachers. Look before leaving rows out; darht-inspect rows says "
        "how far these teachers can be trusted."
    )
    return {"kind": "cards", "cards": cards, "note": note}


def _build(report: CacheReport) -> Section:
    sizes, seconds = size_figures(report)
    drawn = [_figure(figure, name) for figure, name in ((sizes, "sizes"), (seconds, "seconds")) if figure]
    rows: list[list[Cell]] = [
        [array.name, array.dtype, " x ".join(map(str, array.shape)), (f"{array.size / 1e6:.2f}", array.size),
         ("unknown", -1.0) if np.isnan(array.seconds) else (f"{array.seconds:.1f}", array.seconds)]
        for array in report.arrays
    ]  # fmt: skip
    indexes: list[list[Cell]] = [
        [name, one.kind, (f"{one.dims[0]}", one.dims[0]), (f"{one.dims[1]}", one.dims[1]),
         (f"{one.recall:.3f}", one.recall), (f"{one.kept:.3f}", one.kept)]
        for name, one in report.indexes.card.indexes.items()
    ]  # fmt: skip
    note = (
        "The indexes behind this page. Recall@10: of exact search in the projected vectors; kept@10: of that search in "
        "all dimensions."
    )
    return _section(
        f"{len(report.arrays)} arrays were built once; any number of students are trained from them",
        _pair(*drawn),
        table(["array", "type", "shape", "MB", "seconds"], rows),
        table(["index", "kind", "dimensions", "projected to", "recall@10", "kept@10"], indexes, note),
    )
