"""The figures of the report, drawn by plotly; each with the sentence that states what it shows."""

from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go

from darht.tools.pictures import COLOURS
from darht.tools.report import OUTCOMES, CacheReport, Map

_HALVES = [{"color": c, "dash": d} for c in ("#888888", "#444444", "#806000") for d in ("dot", "dash", "dashdot")]
_OUTCOME_COLOURS = ("#c8c8c8", "#8fb8d8", "#e69f00", "#b2182b")
_MOST_CELLS = 1200  # of the map by class: more cannot be read


@dataclass(frozen=True)
class Figure:
    """A sentence with the finding, the drawing, and a line on how to read it."""

    finding: str
    drawing: Any
    reading: str


def _styled(drawing: Any, height: int, **layout: Any) -> Any:
    """What all figures share: no title (the page has the sentence), room for labels, sizes that follow the window."""
    drawing.update_layout(
        template="plotly_white",
        height=height,
        autosize=True,
        margin={"l": 10, "r": 10, "t": 30, "b": 10},
        font={"family": "system-ui, sans-serif", "size": 12},
        legend={"orientation": "h", "yanchor": "top", "y": -80 / height, "x": 0},
        **layout,
    )
    drawing.update_xaxes(automargin=True)
    drawing.update_yaxes(automargin=True)
    return drawing


def transfer_figure(report: CacheReport) -> Figure:
    """The transferability matrix."""
    matrix = report.matrix
    values, T = matrix.accuracy, len(matrix.teachers)
    words = [
        [
            f"{escape(attack)}, made on {source}<br>asked of {teacher}<br>"
            f"{values[a, t]:.1f} % still right ({_interval(matrix.interval(a, t))})<br>"
            f"{matrix.right[a, t]:,} of {matrix.counted[a, t]:,} rows"
            for t, teacher in enumerate(matrix.teachers)
        ]
        for a, (attack, source) in enumerate(zip(matrix.attacks, matrix.sources, strict=True))
    ]
    heat = go.Heatmap(
        z=values,
        x=list(matrix.teachers),
        y=[f"{attack} " for attack in matrix.attacks],
        texttemplate="%{z:.1f}",
        hovertext=words,
        hoverinfo="text",
        zmin=0,
        zmax=100,
        colorscale="Viridis",
        colorbar={"title": {"text": "%"}, "thickness": 12},
    )
    drawing = _styled(go.Figure(heat), 170 + 44 * len(matrix.attacks))
    drawing.update_xaxes(title="teacher that is asked", type="category")
    drawing.update_yaxes(title="attack", autorange="reversed", type="category")
    reading = (
        "Accuracy in per cent on the rows that both teachers answer rightly when clean. Where the attack was made on "
        "the teacher that is asked, it is white-box accuracy. Dark cells are examples that fool."
    )
    return Figure(_transfer_finding(report) if T > 1 else "One teacher: there is nothing to transfer", drawing, reading)


def _transfer_finding(report: CacheReport) -> str:
    names, rates = report.matrix.teachers, report.rates
    known = {source: names.index(source) for source in report.matrix.sources}
    pairs = [(rates[s, t], source, names[t]) for source, s in known.items() for t in range(len(names)) if t != s]
    low, high = min(pairs), max(pairs)
    mean = np.mean([rate for rate, _, _ in pairs])
    return (
        f"Examples fool another teacher in {100 * mean:.1f} % of cases: most often those made on {high[1]} fool "
        f"{high[2]} ({100 * high[0]:.1f} %), least often those made on {low[1]} fool {low[2]} ({100 * low[0]:.1f} %)"
    )


def _interval(ends: tuple[float, float]) -> str:
    return f"95 %: {ends[0]:.1f} to {ends[1]:.1f}"


def class_figure(report: CacheReport) -> Figure | None:
    """Transfer by class; None where there is nothing between teachers, or too much to draw."""
    matrix, classes = report.matrix, report.cache.spec.data.classes
    pairs = [
        (a, t)
        for a, source in enumerate(matrix.sources)
        for t, teacher in enumerate(matrix.teachers)
        if teacher != source
    ]
    if not pairs or len(pairs) * len(classes) > _MOST_CELLS:
        return None
    values = np.array([100 - matrix.accuracy_by_class[a, t] for a, t in pairs])
    names = [f"{matrix.attacks[a]} on {matrix.teachers[t]} " for a, t in pairs]
    words = [
        [
            f"{name}<br>{escape(classes[c])}: {values[i, c]:.1f} % of {matrix.counted_by_class[a, t, c]:,} rows fooled"
            for c in range(len(classes))
        ]
        for i, ((a, t), name) in enumerate(zip(pairs, names, strict=True))
    ]
    heat = go.Heatmap(
        z=values,
        x=[escape(name) for name in classes],
        y=names,
        hovertext=words,
        hoverinfo="text",
        colorscale="OrRd",
        zmin=0,
        colorbar={"title": {"text": "%"}, "thickness": 12},
    )
    drawing = _styled(go.Figure(heat), 180 + 26 * len(pairs))
    drawing.update_xaxes(title="class", type="category", tickangle=-45)
    drawing.update_yaxes(autorange="reversed", type="category")
    counted = np.array([matrix.counted_by_class[a, t] for a, t in pairs]).sum(0)
    if not counted.any():
        return None
    fooled = counted - np.array([matrix.right_by_class[a, t] for a, t in pairs]).sum(0)
    shares = np.where(counted > 0, fooled / np.maximum(counted, 1), np.nan)
    most, least = int(np.nanargmax(shares)), int(np.nanargmin(shares))
    finding = (
        f"Examples of {classes[most]} transfer most often ({100 * shares[most]:.1f} %), those of {classes[least]} "
        f"least ({100 * shares[least]:.1f} %)"
    )
    return Figure(
        finding,
        drawing,
        "Per cent fooled, of the rows that both teachers answer rightly when clean; white where there is none.",
    )


def angle_figure(report: CacheReport) -> Figure:
    """Principal angles of every pair of attacks, beside those between halves of one attack."""
    found, drawing = report.geometry, go.Figure()
    number = list(range(1, found.k + 1))
    for i, (a, b) in enumerate(found.mixing):
        name = f"{found.attacks[a]}, {found.attacks[b]}"
        drawing.add_scatter(
            x=number, y=found.angles[a, b], mode="lines+markers", name=name, line={"color": COLOURS[i % len(COLOURS)]},
            hovertemplate=f"{name}<br>angle %{{x}}: %{{y:.1f}} degrees<extra></extra>",
        )  # fmt: skip
    for a, attack in enumerate(found.attacks):
        name = f"{attack}: its halves"
        drawing.add_scatter(
            x=number, y=found.angles[a, a], mode="lines", name=name, line=_HALVES[a % len(_HALVES)],
            hovertemplate=f"{name}<br>angle %{{x}}: %{{y:.1f}} degrees<extra></extra>",
        )  # fmt: skip
    _styled(drawing, 420 + 14 * len(found.mixing), hovermode="closest")
    drawing.update_xaxes(title="principal angle, smallest first")
    drawing.update_yaxes(title="angle in degrees", range=[0, 92])
    reading = (
        f"Each attack's subspace is spanned by the {found.k} directions that hold most energy of {found.rows:,} "
        "perturbations. 0 degrees: a shared direction; 90: none. Lines without markers: two halves of one attack's own "
        "rows, what sampling alone makes of an angle."
    )
    return Figure(_angle_finding(report), drawing, reading)


def _angle_finding(report: CacheReport) -> str:
    found = report.geometry
    own = np.mean([found.angles[a, a].mean() for a in range(len(found.attacks))])
    if not found.mixing:
        rank = found.effective_rank[0]
        return (
            f"The perturbations of {found.attacks[0]} have an effective rank of {rank:.0f} of {found.dim:,} dimensions"
        )
    means = {pair: float(found.angles[pair].mean()) for pair in found.mixing}
    far, near = max(means, key=lambda pair: means[pair]), min(means, key=lambda pair: means[pair])

    def named(pair: tuple[int, int]) -> str:
        return f"{found.attacks[pair[0]]} and {found.attacks[pair[1]]}"

    if far == near:
        return f"{named(far)} work {means[far]:.1f} degrees apart on average; halves of one attack {own:.1f}"
    return (
        f"{named(far)} work in the most different directions ({means[far]:.1f} degrees apart on average), "
        f"{named(near)} in the most similar ({means[near]:.1f}); halves of one attack differ by {own:.1f}"
    )


def map_figures(report: CacheReport, plane: Map) -> tuple[Figure, Figure]:
    """The map coloured by attack, and by success."""
    attacks, labels = report.geometry.attacks, report.cache.read("label")
    classes = report.cache.spec.data.classes
    words = np.array([
        f"row {row}: {escape(classes[labels[row]])}<br>{attacks[a]}: {OUTCOMES[o]}"
        for row, a, o in zip(plane.row, plane.attack, plane.outcome, strict=True)
    ])  # fmt: skip
    by_attack = _cloud(plane, words, plane.attack, attacks, COLOURS)
    by_outcome = _cloud(plane, words, plane.outcome, OUTCOMES, _OUTCOME_COLOURS)
    finding, first = _spread(plane, attacks), f"{plane.method}: one point is one perturbation."
    if not np.isnan(plane.held):
        first += f" The plane holds {100 * plane.held:.1f} % of the variance: what is close here may be far apart."
    else:
        first += " Points with the same neighbours lie together; distances between groups mean little."
    share = 100 * np.mean(plane.outcome == len(OUTCOMES) - 1)
    able = np.mean(plane.outcome > 0)
    second = (
        f"{share / max(able, 1e-9):.1f} % of the perturbations of rows that their own teacher answers rightly fool "
        f"another teacher too (sample of {len(plane.row):,})"
    )
    return Figure(finding, by_attack, first), Figure(second, by_outcome, f"{plane.method}: the same points by success.")


def _spread(plane: Map, attacks: tuple[str, ...]) -> str:
    """Which attack takes most room in the plane, by the root mean square distance to its own middle."""
    sizes = [float(np.sqrt(plane.xy[plane.attack == a].var(0).sum())) for a in range(len(attacks))]
    wide, narrow = int(np.argmax(sizes)), int(np.argmin(sizes))
    if wide == narrow:
        return f"The perturbations of {attacks[wide]} in two dimensions"
    ratio = sizes[wide] / max(sizes[narrow], 1e-9)
    return f"{attacks[wide]} spreads {ratio:.1f} times as far in the plane as {attacks[narrow]}"


def _cloud(plane: Map, words: Any, group: Any, names: tuple[str, ...], colours: tuple[str, ...]) -> Any:
    drawing = go.Figure()
    for number, name in enumerate(names):
        chosen = group == number
        drawing.add_scatter(
            x=plane.xy[chosen, 0],
            y=plane.xy[chosen, 1],
            mode="markers",
            name=name,
            text=words[chosen],
            hovertemplate="%{text}<extra></extra>",
            marker={"size": 5, "opacity": 0.75, "color": colours[number % len(colours)]},
        )
    _styled(drawing, 460)
    unit = "(perturbation = 1)" if plane.method == "PCA" else "(no unit)"
    drawing.update_xaxes(title=f"{plane.method} 1 {unit}")
    drawing.update_yaxes(title=f"{plane.method} 2 {unit}")
    return drawing


def size_figures(report: CacheReport) -> tuple[Figure, Figure | None]:
    """Megabytes and seconds of every array; no seconds where they were not recorded."""
    arrays = [array for array in report.arrays if array.size > 1e-3 * max(one.size for one in report.arrays)]
    names, total = [array.name for array in arrays], sum(array.size for array in report.arrays)
    kinds = {name: layout.kind for name, layout in report.cache.arrays.items()}
    share = 100 * sum(array.size for array in arrays if kinds[array.name] == "delta") / max(total, 1)
    sizes = _bars(names, [array.size / 1e6 for array in arrays], "MB on disk", COLOURS[0])
    finding = f"The cache takes {total / 1e6:.1f} MB, {share:.0f} % of it perturbations"
    first = Figure(finding, sizes, "Arrays of less than a thousandth of the largest are left out.")
    seconds = np.array([array.seconds for array in arrays])
    if np.isnan(seconds).any():
        return first, None
    slow = int(seconds.argmax())
    about = ", ".join(f"{key} {value}" for key, value in report.environment.items())
    finding = f"It took {seconds.sum():.0f} s of work, most of it {names[slow]} ({seconds[slow]:.0f} s)"
    return first, Figure(finding, _bars(names, seconds.tolist(), "seconds", COLOURS[1]), f"Built with {about}.")


def _bars(names: list[str], values: list[float], unit: str, colour: str) -> Any:
    hover = f"%{{y}}<br>%{{x:.2f}} {unit}<extra></extra>"
    bars = go.Bar(y=names, x=values, orientation="h", marker={"color": colour}, hovertemplate=hover)
    drawing = _styled(go.Figure(bars), 130 + 20 * len(names))
    drawing.update_xaxes(title=unit)
    drawing.update_yaxes(autorange="reversed", type="category")
    return drawing
