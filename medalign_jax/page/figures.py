"""Figures of the report page as inline SVG: no library, no script, no network.

Every figure is drawn in a 400-wide box that scales with the page, takes its colours from the
page's style sheet (so it follows light and dark mode), and says in words what it shows. Classes
and series differ by shape or dash as well as by colour.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from medalign_jax.page.svg import (
    WIDTH,
    Box,
    data_range,
    escape,
    figure,
    number,
    shorten,
    svg_element,
    x_axis,
    y_axis,
)

COLOURS = 8
_DASHES = ("", "6 3", "2 3", "8 3 2 3")
_MAX_POINTS = 2000
_BUCKETS = 250


@dataclasses.dataclass(frozen=True)
class Series:
    """One line: (n,) x and (n,) y; a value that is not finite leaves a gap."""

    name: str
    x: np.ndarray
    y: np.ndarray


@dataclasses.dataclass(frozen=True)
class Curves:
    """Lines in one frame."""

    title: str
    series: tuple[Series, ...]
    x_label: str = "step"
    y_label: str = ""
    log_y: bool = False


@dataclasses.dataclass(frozen=True)
class Bar:
    """A value with its interval; `role` picks the look: before, after, reference."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    role: str = "reference"


@dataclasses.dataclass(frozen=True)
class Bars:
    """Values to compare; they start at `origin`, the value of knowing nothing."""

    title: str
    bars: tuple[Bar, ...]
    metric: str
    origin: float = 0.0
    origin_name: str = ""
    caption: str = ""


@dataclasses.dataclass(frozen=True)
class MapPanel:
    """Points (n, 2) with one label each, and the share of variance on each axis."""

    title: str
    points: np.ndarray
    labels: Sequence[str]
    explained: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True)
class Confusion:
    """Counts (C, C): rows are the true classes, columns the predicted ones."""

    title: str
    classes: tuple[str, ...]
    counts: np.ndarray
    caption: str = ""


# ---------------------------------------------------------------------------------- lines


def line_chart(chart: Curves) -> str:
    """Draws curves; long ones keep the extremes of each stretch, so no spike is lost."""
    lines = [(s, *_thinned(s, chart.log_y)) for s in chart.series]
    lines = [line for line in lines if np.isfinite(line[2]).any()]
    title = escape(chart.title)
    if not lines:
        return figure('<p class="empty">No values were logged.</p>', title)
    x_all = np.concatenate([x for _, x, _ in lines])
    y_all = np.concatenate([y for _, _, y in lines])
    x_range = data_range(x_all, pad=0)
    y_range = data_range(y_all[np.isfinite(y_all)], pad=0.06)
    box = Box(56, 12, WIDTH - 14, 210, x_range, y_range)
    parts = [y_axis(box, chart.log_y), x_axis(box, chart.x_label)]
    for i, (_, x, y) in enumerate(lines):
        parts.append(
            f'<path class="line s{i % COLOURS}" stroke-dasharray="{_dash(i)}" '
            f'd="{_path(box, x, y)}"/>'
        )
    words = "; ".join(
        f"{s.name} from {number(s.y[k[0]])} to {number(s.y[k[-1]])}"
        for s, _, _ in lines
        if len(k := np.flatnonzero(np.isfinite(s.y)))
    )
    alt = f"{chart.title} over {chart.x_label}: {words}"
    return figure(svg_element(parts, 252, alt), title, escape(chart.y_label), _line_legend(lines))


def _dash(i: int) -> str:
    """Dashes change with every line, and again when the colours start anew."""
    return _DASHES[(i + i // COLOURS) % len(_DASHES)]


def _line_legend(lines) -> str:
    items = "".join(
        f'<li><svg viewBox="0 0 26 8" aria-hidden="true"><path class="line s{i % COLOURS}" '
        f'stroke-dasharray="{_dash(i)}" d="M0 4H26"/></svg>{escape(s.name)}</li>'
        for i, (s, _, _) in enumerate(lines)
    )
    return f'<ul class="legend">{items}</ul>'


def _thinned(series: Series, log: bool) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(series.x, np.float64), np.asarray(series.y, np.float64)
    if log:
        y = np.log10(np.where(y > 0, y, np.nan))
    if len(x) <= 2 * _BUCKETS:
        return x, y
    keep = []
    for rows in np.array_split(np.arange(len(x)), _BUCKETS):
        finite = rows[np.isfinite(y[rows])]
        if len(finite):
            keep += sorted({int(finite[y[finite].argmin()]), int(finite[y[finite].argmax()])})
        else:
            keep.append(int(rows[0]))
    keep = sorted({0, *keep, len(x) - 1})
    return x[keep], y[keep]


def _path(box: Box, x: np.ndarray, y: np.ndarray) -> str:
    commands, pen = [], "M"
    for a, b in zip(x, y, strict=True):
        if not math.isfinite(b):
            pen = "M"
            continue
        commands.append(f"{pen}{box.x(a):.1f} {box.y(b):.1f}")
        pen = "L"
    if len(commands) == 1:  # a dot, which a round line cap makes visible
        commands.append("h0")
    return "".join(commands)


# ----------------------------------------------------------------------------------- bars


def interval_bars(chart: Bars) -> str:
    """Draws one bar per row with its interval as a whisker and its numbers in words."""
    values = [v for b in chart.bars for v in (b.value, b.low, b.high) if v is not None]
    low, high = data_range(np.array([*values, chart.origin]), pad=0.04)
    row, top = 44, 4
    bottom = top + row * len(chart.bars)
    box = Box(8, top, WIDTH - 8, bottom, (low, high), (0, 1))
    origin = box.x(chart.origin)
    parts = [x_axis(box, chart.metric)]
    for i, bar in enumerate(chart.bars):
        parts.append(_bar_row(bar, box, origin, top + i * row))
    name = f"{chart.origin_name} {number(chart.origin)}".strip()
    words = "; ".join(f"{b.name} {_with_interval(b)}" for b in chart.bars)
    caption = escape(chart.caption) + (f" Bars start at {escape(name)}." if name else "")
    alt = f"{chart.title}, {chart.metric}: {words}"
    return figure(svg_element(parts, bottom + 42, alt), escape(chart.title), caption.strip())


def _bar_row(bar: Bar, box: Box, origin: float, y: float) -> str:
    end = box.x(bar.value)
    left, width = min(origin, end), abs(end - origin)
    role = bar.role if bar.role in ("before", "after") else "reference"
    text = (
        f'<text x="{box.left}" y="{y + 14}" class="row">{escape(shorten(bar.name, 34))}</text>'
        f'<text x="{box.right}" y="{y + 14}" class="end row value">{_with_interval(bar)}</text>'
        f'<path class="origin" d="M{origin:.1f} {y + 18}v19"/>'
    )
    rect = (
        f'<rect class="bar {role}" x="{left:.1f}" y="{y + 20}" width="{width:.1f}" height="15" '
        f'rx="2"><title>{escape(bar.name)} {_with_interval(bar)}</title></rect>'
    )
    if bar.low is None or bar.high is None:
        return text + rect
    a, b, m = box.x(bar.low), box.x(bar.high), y + 27.5
    line = f"M{a:.1f} {m}H{b:.1f}M{a:.1f} {m - 5}v10M{b:.1f} {m - 5}v10"
    return text + rect + f'<path class="halo" d="{line}"/><path class="whisker" d="{line}"/>'


def _with_interval(bar: Bar) -> str:
    if bar.low is None or bar.high is None:
        return number(bar.value)
    return f"{number(bar.value)}  [{number(bar.low)}, {number(bar.high)}]"


# -------------------------------------------------------------------------------- scatter


def scatter_map(panel: MapPanel, classes: Sequence[str]) -> str:
    """Draws a map of points; `classes` fixes colour and shape, the same in every panel."""
    points = np.asarray(panel.points, np.float64)
    labels = np.asarray([str(label) for label in panel.labels])
    if points.shape != (len(labels), 2) or not np.all(np.isfinite(points)):
        raise ValueError(f"map {panel.title!r}: {points.shape} points for {len(labels)} labels")
    shown = np.arange(len(points))[:: max(1, math.ceil(len(points) / _MAX_POINTS))]
    box = Box(8, 8, WIDTH - 8, 320, data_range(points[:, 0], 0.05), data_range(points[:, 1], 0.05))
    parts = ['<rect class="frame" x="8" y="8" width="384" height="312" rx="6"/>']
    for k, name in enumerate(classes):
        marks = [
            _marker(k, box.x(points[i, 0]), box.y(points[i, 1]))
            for i in shown
            if labels[i] == str(name)
        ]
        parts.append(f'<g class="mark f{k % COLOURS}">{"".join(marks)}</g>')
    parts.append(_places(box, points, labels, classes))
    caption = f"{len(points)} recordings"
    if len(shown) < len(points):
        caption += f", {len(shown)} drawn"
    if panel.explained is not None:
        caption += ", two axes with {:.0%} and {:.0%} of the variance".format(*panel.explained)
    alt = f"{panel.title}: {caption}, coloured by class ({', '.join(map(str, classes))})"
    return figure(svg_element(parts, 328, alt), escape(panel.title), escape(caption))


def _places(box: Box, points: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> str:
    """Names at the medians of the classes, moved down where one would cover another."""
    medians = {str(c): np.median(points[labels == str(c)], axis=0) for c in classes
               if np.any(labels == str(c))}  # fmt: skip
    placed: list[tuple[float, float, float]] = []
    parts = []
    for name, (px, py) in sorted(medians.items(), key=lambda item: -item[1][1]):
        text = shorten(name, 22)
        half = 3.8 * len(text)
        x = min(max(box.x(px), box.left + half + 4), box.right - half - 4)
        y = box.y(py) + 4
        for other_x, other_y, other_half in placed:
            if abs(x - other_x) < half + other_half and y < other_y + 16:
                y = other_y + 16
        placed.append((x, y, half))
        parts.append(f'<text class="mid place" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>')
    return "".join(parts)


def map_legend(classes: Sequence[str]) -> str:
    """The colours and shapes of `scatter_map`."""
    items = "".join(
        f'<li><svg viewBox="0 0 12 12" class="key" aria-hidden="true">'
        f'<g class="mark f{k % COLOURS}">{_marker(k, 6, 6, 4.5)}</g></svg>{escape(name)}</li>'
        for k, name in enumerate(classes)
    )
    return f'<ul class="legend">{items}</ul>'


def _marker(k: int, x: float, y: float, r: float = 3.4) -> str:
    """Shapes change with every class, and again when the colours start anew."""
    shape = (k + k // COLOURS) % 5
    if shape == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r}"/>'
    s = r * 0.9
    outlines = {
        1: f"M{x - s:.1f} {y - s:.1f}h{2 * s:.1f}v{2 * s:.1f}h{-2 * s:.1f}z",
        2: f"M{x:.1f} {y - r * 1.15:.1f}l{r * 1.1:.1f} {2 * r:.1f}h{-2.2 * r:.1f}z",
        3: f"M{x:.1f} {y - r * 1.3:.1f}l{r * 1.3:.1f} {r * 1.3:.1f} {-r * 1.3:.1f} "
        f"{r * 1.3:.1f} {-r * 1.3:.1f} {-r * 1.3:.1f}z",
        4: f"M{x:.1f} {y + r * 1.15:.1f}l{r * 1.1:.1f} {-2 * r:.1f}h{-2.2 * r:.1f}z",
    }
    return f'<path d="{outlines[shape]}"/>'


# ------------------------------------------------------------------------------ confusion


def confusion_matrix(matrix: Confusion) -> str:
    """Draws counts, shaded by the share of each true class (row)."""
    counts = np.asarray(matrix.counts)
    n = len(matrix.classes)
    if counts.shape != (n, n) or not n:
        raise ValueError(f"confusion {matrix.title!r}: {counts.shape} counts for {n} classes")
    left = 92
    size = (WIDTH - left - 2) / n
    across = [_words(str(name), max(3, int(size / 6.2))) for name in matrix.classes]
    top = 40 + 13 * max(map(len, across), default=1)
    height = min(size, 60)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    middle = left + n * size / 2
    parts = [
        f'<text class="mid soft" x="{middle:.1f}" y="12">predicted</text>',
        f'<text class="end soft" x="{left - 8}" y="{top - 8}">true</text>',
    ]
    for i, name in enumerate(map(str, matrix.classes)):
        x, y = left + (i + 0.5) * size, top + (i + 0.5) * height + 4
        parts.append(_label(name, across[i], x, top - 8, "mid", bottom=True))
        parts.append(_label(name, _words(name, 13), left - 8, y, "end"))
        for j in range(n):
            cell = left + j * size, top + i * height, size, height
            parts.append(_cell(cell, int(counts[i, j]), share[i, j], n))
    words = "; ".join(
        f"{name}: {counts[i, i]} of {counts[i].sum()} right"
        for i, name in enumerate(matrix.classes)
    )
    svg = svg_element(parts, top + n * height + 6, f"{matrix.title}. {words}")
    return figure(svg, escape(matrix.title), escape(matrix.caption))


def _words(text: str, length: int, lines: int = 3) -> list[str]:
    """Breaks text between words into lines of at most `length` characters."""
    broken: list[str] = []
    for word in text.split():
        if broken and len(broken[-1]) + 1 + len(word) <= length:
            broken[-1] += " " + word
        else:
            broken.append(word)
    if len(broken) > lines:
        broken = [*broken[: lines - 1], " ".join(broken[lines - 1 :])]
    return [shorten(line, length) for line in broken]


def _label(name: str, lines: list[str], x: float, y: float, anchor: str, bottom=False) -> str:
    """A few lines of small text centred on y, or ending there; the whole name as tooltip."""
    first = y - 13 * (len(lines) - 1) * (1 if bottom else 0.5)
    spans = "".join(
        f'<tspan x="{x:.1f}" y="{first + 13 * k:.1f}">{escape(line)}</tspan>'
        for k, line in enumerate(lines)
    )
    return f'<text class="{anchor} small">{spans}<title>{escape(name)}</title></text>'


def _cell(cell, count: int, share: float, n: int) -> str:
    x, y, width, height = cell
    strong = " on" if share > 0.5 else ""
    two_lines = n <= 6
    middle = x + width / 2
    text = (
        f'<text class="mid{strong}" x="{middle:.1f}" '
        f'y="{y + height / 2 + (0 if two_lines else 4):.1f}">{count}</text>'
    )
    if two_lines:
        text += (
            f'<text class="mid small{strong}" x="{middle:.1f}" y="{y + height / 2 + 15:.1f}">'
            f"{share:.0%}</text>"
        )
    return (
        f'<rect class="heat" x="{x + 1:.1f}" y="{y + 1:.1f}" width="{width - 2:.1f}" '
        f'height="{height - 2:.1f}" rx="3" fill-opacity="{0.06 + 0.94 * share:.3f}"/>{text}'
    )
