"""Charts as inline SVG: they scale, print, follow the page's colours, and show their figures when pointed at."""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any
from unicodedata import east_asian_width

import numpy as np
from PIL import Image

_W, _H = 520, 308
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 20, 14, 48
FEWEST_IN_BIN = 5  # images that the calibration line goes through a bin for
_DARKEST = 0.53  # opacity of a cell up to which the page's ink on it keeps a contrast of 4.5, light or dark


def _frame(body: str, width: int = _W, height: int = _H, label: str = "", kind: str = "shrinks") -> str:
    """An SVG; `shrinks` has larger letters on narrow screens, `scrolls` keeps its size there, `small` fits as it is."""
    most = round(1.15 * width)  # pixels that a chart may grow to, so that its letters stay the page's size
    about = f'class="{kind}" role="img" aria-label="{escape(label)}" style="max-width:{most}px;--own:{width}px"'
    return f'<svg viewBox="0 0 {width} {height}" {about} xmlns="http://www.w3.org/2000/svg">{body}</svg>'


def _y(per_cent: float) -> float:
    return _TOP + (_H - _TOP - _BOTTOM) * (1 - per_cent / 100)


def _axes(x_label: str) -> str:
    lines = []
    for tick in range(0, 101, 20):
        y = _y(tick)
        lines.append(f'<line class="grid" x1="{_LEFT}" y1="{y:.1f}" x2="{_W - _RIGHT}" y2="{y:.1f}"/>')
        lines.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick}</text>')
    middle = (_LEFT + _W - _RIGHT) / 2
    lines.append(f'<text x="{middle:.1f}" y="{_H - 6}" text-anchor="middle">{escape(x_label)}</text>')
    return "".join(lines)


def curve(points: Sequence[tuple[float, float, float, float]], mark: float) -> str:
    """Accuracy over epsilon: (epsilon, per cent, low, high) with a band, and the evaluation's own radius marked.

    The axis counts the radii, not their size: they double, and the small ones matter most.
    """
    if not points:
        return ""
    wide = _W - _RIGHT - _LEFT - 30
    xs = [_LEFT + 15 + wide * (k / max(1, len(points) - 1)) for k in range(len(points))]
    upper = [f"{x:.1f},{_y(p[3]):.1f}" for x, p in zip(xs, points, strict=True)]
    lower = [f"{x:.1f},{_y(p[2]):.1f}" for x, p in zip(xs, points, strict=True)]
    line = " ".join(f"{x:.1f},{_y(p[1]):.1f}" for x, p in zip(xs, points, strict=True))
    body = [_axes("epsilon, pixel levels of 255 (% of the sample right)")]
    for x, (eps, value, low, high) in zip(xs, points, strict=True):
        if eps == mark:
            body.append(f'<line class="mark" x1="{x:.1f}" y1="{_TOP}" x2="{x:.1f}" y2="{_y(0):.1f}"/>')
        body.append(f'<text x="{x:.1f}" y="{_H - 28}" text-anchor="middle">{eps:g}</text>')
        tip = f"epsilon {eps:g}: {value:.1f} % [{low:.1f}, {high:.1f}]"
        body.append(f'<circle class="dot" cx="{x:.1f}" cy="{_y(value):.1f}" r="4.5"><title>{tip}</title></circle>')
    band = f'<polygon class="band" points="{" ".join(upper + lower[::-1])}"/><polyline class="line" points="{line}"/>'
    return _frame(body[0] + band + "".join(body[1:]), label="accuracy over epsilon")


def class_bars(rows: Sequence[Mapping[str, Any]]) -> str:
    """Clean and robust accuracy of each class, as `eval.json` has them: a bar within a bar, or `no images`."""
    height, name_width = 24, 132
    wide = _W - name_width - 96
    body = []
    for k, row in enumerate(rows):
        y, name = k * height + 4, row["class"]
        body.append(f'<text x="{name_width - 8}" y="{y + 13}" text-anchor="end">{escape(_short(name))}</text>')
        said, tip = "no images", f"{name}: no images"
        if row["count"]:
            clean, robust = (100 * row[key] / row["count"] for key in ("clean", "robust"))
            said = f"{robust:.0f} % ({clean:.0f} %)"
            tip = f"{name}, {row['count']} images: " + ", ".join(
                f"{key} {value:.1f} % [{row[f'{key}_interval95'][0]:.1f}, {row[f'{key}_interval95'][1]:.1f}]"
                for key, value in (("clean", clean), ("robust", robust))
            )
            body.append(
                f'<rect class="soft" x="{name_width}" y="{y}" width="{wide * clean / 100:.1f}" height="17" rx="2"/>'
                f'<rect class="bar" x="{name_width}" y="{y + 4}" width="{wide * robust / 100:.1f}" height="9" rx="2"/>'
            )
        body.append(
            f'<text x="{_W - 2}" y="{y + 13}" text-anchor="end">{said}</text>'
            f'<rect class="hit" x="0" y="{y}" width="{_W}" height="{height}"><title>{escape(tip)}</title></rect>'
        )
    return _frame("".join(body), _W, len(rows) * height + 6, "accuracy per class")


def reliability(bins: Sequence[tuple[float, float, int]]) -> str:
    """Accuracy over confidence: (confidence, accuracy, images), each in [0, 1], beside the diagonal.

    The line leaves out bins of few images, whose dots say little.
    """
    total = sum(count for _, _, count in bins)
    wide = _W - _RIGHT - _LEFT
    body = [_axes("confidence, % (area of a dot: images)")]
    body.append(f'<line class="mark" x1="{_LEFT}" y1="{_y(0)}" x2="{_W - _RIGHT}" y2="{_y(100)}"/>')
    points = [(_LEFT + wide * c, _y(100 * a)) for c, a, _ in bins]
    told = [f"{x:.1f},{y:.1f}" for (x, y), (_, _, count) in zip(points, bins, strict=True) if count >= FEWEST_IN_BIN]
    body.append(f'<polyline class="line" points="{" ".join(told)}"/>')
    for (x, y), (sure, right, count) in zip(points, bins, strict=True):
        tip = f"{count} images: confidence {100 * sure:.1f} %, right {100 * right:.1f} %"
        at = f'cx="{x:.1f}" cy="{y:.1f}"'
        body.append(f'<circle class="dot see" {at} r="{18 * (count / total) ** 0.5:.2f}"/>')
        body.append(f'<circle class="hit" {at} r="8"><title>{tip}</title></circle>')
    for tick in range(0, 101, 20):
        x = _LEFT + wide * tick / 100
        body.append(f'<text x="{x:.1f}" y="{_H - 28}" text-anchor="middle">{tick}</text>')
    return _frame("".join(body), label="reliability diagram")


def compared(clean: float, worst: float, interval: tuple[float, float]) -> str:
    """One model's clean accuracy (pale), worst case (dark) and its interval (line), on the scale of `compared_axis`."""
    grid = "".join(f'<line class="grid" x1="{_x(k)}" y1="0" x2="{_x(k)}" y2="26"/>' for k in range(0, 101, 20))
    low, high = (_x(end) for end in interval)
    bars = (
        f'<rect class="soft" x="{_x(0)}" y="5" width="{_x(clean) - _x(0):.1f}" height="16" rx="2">'
        f"<title>clean {clean:.1f} %</title></rect>"
        f'<rect class="bar" x="{_x(0)}" y="9" width="{_x(worst) - _x(0):.1f}" height="8" rx="2">'
        f"<title>worst case {worst:.1f} % [{interval[0]:.1f}, {interval[1]:.1f}]</title></rect>"
        f'<path class="ink" d="M{low:.1f} 13H{high:.1f}M{low:.1f} 8V18M{high:.1f} 8V18"/>'
    )
    return _frame(grid + bars, _W, 26, f"clean {clean:.1f} %, worst case {worst:.1f} %")


def compared_axis() -> str:
    """The scale under the bars of `compared`."""
    texts = [f'<text x="{_x(k)}" y="16" text-anchor="middle">{k} %</text>' for k in range(0, 101, 20)]
    return _frame("".join(texts), _W, 22, "per cent of the images")


def _x(per_cent: float) -> float:
    return round(30 + (_W - 60) * per_cent / 100, 1)


def matrix(values: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """Counts as a heat map: a row for each clean answer, a column for each adversarial one."""
    size, longest = 34, max(len(_short(name)) for name in names)
    left, top = 20 + 7 * longest, 16 + 6 * longest
    count, most = len(names), max(1, *(max(row) for row in values))
    body = []
    for j, name in enumerate(map(_short, names)):
        x, y = left + j * size + size / 2, top + j * size + size / 2 + 4
        body.append(
            f'<text transform="translate({x + 4:.0f} {top - 6}) rotate(-55)">{escape(name)}</text>'
            f'<text x="{left - 6}" y="{y:.0f}" text-anchor="end">{escape(name)}</text>'
        )
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            x, y = left + j * size, top + i * size
            shade = (value / most) ** 0.6
            kind = "same" if i == j else "other"
            tip = f"clean answer {names[i]}, under attack {names[j]}: {value} images"
            text = f'<text x="{x + size / 2}" y="{y + size / 2 + 4}" text-anchor="middle">{value}</text>'
            body.append(
                f'<g><rect class="{kind}" x="{x}" y="{y}" width="{size - 2}" height="{size - 2}" rx="3" '
                f'fill-opacity="{0.06 + (_DARKEST - 0.06) * shade if value else 0.03:.3f}"/>{text if value else ""}'
                f"<title>{escape(tip)}</title></g>"
            )
    width, height = left + count * size + 40, top + count * size + 4
    return _frame("".join(body), width, height, "adversarial against clean answers", "scrolls")


def surface(values: Sequence[Sequence[float]], eps: float) -> str:
    """The mean margin over steps along the gradient (upwards) and along a random direction (to the right)."""
    grid = np.asarray(values)
    low, high = float(grid.min()), float(grid.max())
    n, size, left, bottom = len(grid), 28, 46, 40
    body = []
    for i in range(n):
        for j in range(n):
            value = grid[n - 1 - i, j]
            share = 0.0 if high <= low else (value - low) / (high - low)
            up, right = (eps * (2 * k / (n - 1) - 1) for k in (n - 1 - i, j))
            tip = f"gradient {up:+.1f}, random {right:+.1f} levels: margin {value:.3g}"
            body.append(
                f'<rect class="other" x="{left + j * size}" y="{8 + i * size}" width="{size}" height="{size}" '
                f'fill-opacity="{0.05 + 0.95 * share:.3f}"><title>{tip}</title></rect>'
            )
    side = n * size
    for text, y in ((f"+{eps:g}", 20), ("0", 8 + side / 2 + 4), (f"\u2212{eps:g}", 4 + side)):
        body.append(f'<text x="{left - 6}" y="{y:.0f}" text-anchor="end">{text}</text>')
    body.append(f'<text x="{left + side / 2:.0f}" y="{side + 26}" text-anchor="middle">random direction</text>')
    body.append(
        f'<text transform="translate(12 {8 + side / 2:.0f}) rotate(-90)" text-anchor="middle">along the gradient</text>'
    )
    return _frame("".join(body), left + side + 10, side + bottom, "loss surface", "small")


def picture(pixels: np.ndarray) -> str:
    """An image uint8 `[3, H, W]` as a data address."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _short(name: str) -> str:
    """A name in the room of eleven letters of usual width; W and its like take nearly two."""
    sizes = [1.7 if c in "MWmw@%" or east_asian_width(c) in "WF" else 1.0 for c in name]
    if sum(sizes) <= 11:
        return name
    return name[: int((np.cumsum(sizes) <= 10).sum())] + "\u2026"
