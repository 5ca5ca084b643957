"""Figures of the report page, described for Plotly, which draws them in the browser.

A figure is data: traces and a layout as plotly.js documents them
(https://plotly.com/javascript/reference), and in words what it shows. A colour is written "$name"
and means the page's own of that name, so that figures follow light and dark mode. Classes and
series differ by shape or dash as well as by colour. Text of data passes through `wording.label`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from medalign_jax.page.wording import label, number, shorten, shorten_middle

COLOURS = 8
SYMBOLS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x")
_DASHES = ("solid", "dash", "dot", "dashdot")
_MAX_POINTS = 2000
_BUCKETS = 250
_ROW = 46  # height of a score, pixels
_ROLES = {"before": "$before", "after": "$accent"}


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure as the page needs it.

    Attributes:
      title: heading.
      alt: what it shows, in words, for those who do not see it.
      traces: Plotly's.
      layout: Plotly's.
      height: pixels.
      caption: below the heading.
    """

    title: str
    alt: str
    traces: Sequence[Mapping[str, Any]]
    layout: Mapping[str, Any]
    height: int
    caption: str = ""


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
class Score:
    """A value with its interval; `role` picks the look: before, after, reference."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    role: str = "reference"

    @property
    def words(self) -> str:
        """The value, and its interval if it has one."""
        if self.low is None or self.high is None:
            return number(self.value)
        return f"{number(self.value)} [{number(self.low)}, {number(self.high)}]"


@dataclasses.dataclass(frozen=True)
class Scores:
    """Values to compare.

    Attributes:
      title: heading.
      scores: top to bottom.
      metric: name of what is on the axis.
      better: "higher" or "lower".
      chance: the value of knowing nothing, or of no difference; None where there is none.
      chance_name: what that is.
      caption: below the heading.
    """

    title: str
    scores: tuple[Score, ...]
    metric: str
    better: str = "higher"
    chance: float | None = None
    chance_name: str = "chance"
    caption: str = ""


@dataclasses.dataclass(frozen=True)
class MapPanel:
    """Where an encoder puts the recordings: (n, 2) points, shares of variance on the two axes."""

    title: str
    points: np.ndarray
    explained: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True)
class Maps:
    """Maps of the same recordings, one per encoder.

    Attributes:
      panels: of (n, 2) points each.
      labels: (n,) classes.
      names: (n,) what is shown of a recording beside its class, or ().
      heard: point -> its number among the page's sounds.
    """

    panels: Sequence[MapPanel]
    labels: Sequence[str]
    names: Sequence[str] = ()
    heard: Mapping[int, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        n = len(self.labels)
        if len(self.names) not in (0, n):
            raise ValueError(f"maps of {n} recordings with {len(self.names)} names")
        for panel in self.panels:
            shape = np.shape(panel.points)
            if shape != (n, 2) or not np.all(np.isfinite(panel.points)):
                raise ValueError(f"map {panel.title!r}: {shape} points for {n} labels")


@dataclasses.dataclass(frozen=True)
class Confusion:
    """Counts (C, C): rows are the true classes, columns the predicted ones."""

    title: str
    classes: tuple[str, ...]
    counts: np.ndarray
    caption: str = ""

    def __post_init__(self) -> None:
        n = len(self.classes)
        if np.shape(self.counts) != (n, n) or not n:
            shape = np.shape(self.counts)
            raise ValueError(f"confusion {self.title!r}: {shape} counts for {n} classes")

    @property
    def shares(self) -> np.ndarray:
        """(C, C) of each true class."""
        return self.counts / np.maximum(np.sum(self.counts, axis=1, keepdims=True), 1)


# ---------------------------------------------------------------------------------- lines


def line_chart(chart: Curves) -> Figure | None:
    """Curves; long ones keep the extremes of each stretch, so no spike is lost. None without any
    finite value."""
    lines = [(s, *_thinned(s, chart.log_y)) for s in chart.series]
    lines = [line for line in lines if np.isfinite(line[2]).any()]
    if not lines:
        return None
    traces = [
        {
            "type": "scatter",
            # A single value is a dot: a line needs two.
            "mode": "lines" if np.isfinite(y).sum() > 1 else "markers",
            "name": label(s.name),
            "x": x.tolist(),
            "y": [value if math.isfinite(value) else None for value in y.tolist()],
            "line": {"color": f"$c{i % COLOURS}", "dash": _dash(i), "width": 2},
            "marker": {"color": f"$c{i % COLOURS}"},
            "hovertemplate": f"%{{y:.4g}} at {label(chart.x_label)} %{{x}}<extra>"
            f"{label(s.name)}</extra>",
        }
        for i, (s, x, y) in enumerate(lines)
    ]
    words = "; ".join(
        f"{s.name} from {number(s.y[k[0]])} to {number(s.y[k[-1]])}"
        for s, _, _ in lines
        if len(k := np.flatnonzero(np.isfinite(s.y)))
    )
    layout = _layout(
        xaxis=_axis(title={"text": label(chart.x_label)}, fixedrange=True),
        yaxis=_axis(type="log" if chart.log_y else "linear", fixedrange=True, automargin=True),
        margin={"l": 8, "r": 12, "t": 8, "b": 8},
        showlegend=True,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
    )
    alt = f"{chart.title} over {chart.x_label}: {words}"
    return Figure(chart.title, alt, traces, layout, 280, chart.y_label)


def _dash(i: int) -> str:
    """Dashes change with every line, and again when the colours start anew."""
    return _DASHES[(i + i // COLOURS) % len(_DASHES)]


def _thinned(series: Series, log: bool) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(series.x, np.float64), np.asarray(series.y, np.float64)
    if log:
        y = np.where(y > 0, y, np.nan)
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


# --------------------------------------------------------------------------------- scores


def scores_chart(chart: Scores) -> Figure:
    """One row per score: a dot with its interval as a whisker, its name and numbers above."""
    count = len(chart.scores)
    traces = [_dot(score, count - 1 - i) for i, score in enumerate(chart.scores)]
    layout = _layout(
        xaxis=_axis(
            title={"text": f"{label(chart.metric)} ({chart.better} is better)"}, fixedrange=True
        ),
        yaxis={"visible": False, "range": [-0.6, count - 0.15], "fixedrange": True},
        margin={"l": 8, "r": 8, "t": 2, "b": 44},
        annotations=[
            text
            for i, score in enumerate(chart.scores)
            for text in (
                _beside(shorten_middle(score.name, 36), count - 1 - i, 0, "left", "$ink"),
                _beside(score.words, count - 1 - i, 1, "right", "$soft"),
            )
        ],
        showlegend=False,
    )
    caption = chart.caption
    if chart.chance is not None:
        line = {"color": "$soft", "width": 1, "dash": "dot"}
        x = chart.chance
        layout["shapes"] = [
            {"type": "line", "x0": x, "x1": x, "yref": "paper", "y0": 0, "y1": 1, "line": line}
        ]
        traces.append(_kept_in_view(x))
        caption = f"{caption} Dotted line: {chart.chance_name}, {number(x)}.".strip()
    words = "; ".join(f"{score.name} {score.words}" for score in chart.scores)
    alt = f"{chart.title}, {chart.metric}, {chart.better} is better: {words}"
    return Figure(chart.title, alt, traces, layout, 48 + _ROW * count, caption)


def _dot(score: Score, y: int) -> dict[str, Any]:
    colour = _ROLES.get(score.role, "$soft")
    trace: dict[str, Any] = {
        "type": "scatter",
        "mode": "markers",
        "x": [score.value],
        "y": [y],
        "name": label(score.name),
        "marker": {
            "color": colour if score.role in _ROLES else "$card",
            "size": 11,
            "line": {"color": colour, "width": 2},
        },
        "text": [f"{label(score.name)}: {label(score.words)}"],
        "hovertemplate": "%{text}<extra></extra>",
    }
    if score.low is not None and score.high is not None:
        trace["error_x"] = {
            "type": "data",
            "symmetric": False,
            "array": [score.high - score.value],
            "arrayminus": [score.value - score.low],
            "color": colour,
            "thickness": 2,
            "width": 5,
        }
    return trace


def _beside(text: str, y: int, x: int, anchor: str, colour: str) -> dict[str, Any]:
    return {
        "xref": "paper",
        "x": x,
        "y": y,
        "yshift": 17,
        "xanchor": anchor,
        "text": label(text),
        "showarrow": False,
        "font": {"color": colour, "size": 12},
    }


def _kept_in_view(x: float) -> dict[str, Any]:
    """A shape does not widen the axis; a point does."""
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [x],
        "y": [0],
        "marker": {"opacity": 0},
        "hoverinfo": "skip",
    }


# ------------------------------------------------------------------------------------ map


def scatter_maps(maps: Maps) -> list[Figure]:
    """Points of recordings, with the same colour and shape of a class in every panel.

    `customdata` of the classes' points is their number n. Of the last two traces one rings those
    that can be heard; the other is empty: the page puts the chosen point there.
    """
    labels = np.asarray([str(each) for each in maps.labels])
    every = max(1, math.ceil(len(labels) / _MAX_POINTS))
    shown = np.array(sorted({*range(0, len(labels), every), *maps.heard}), int)
    return [_map(maps, panel, labels, shown) for panel in maps.panels]


def _map(maps: Maps, panel: MapPanel, labels: np.ndarray, shown: np.ndarray) -> Figure:
    points, classes = np.asarray(panel.points, np.float64), sorted(set(labels))
    text = "<br>%{text}" if len(maps.names) else ""
    traces = [
        _points(points, rows, shorten(name, 40))
        | {
            "marker": {
                "color": f"$c{k % COLOURS}",
                # Shapes change with every class, and again when the colours start anew.
                "symbol": SYMBOLS[(k + k // COLOURS) % len(SYMBOLS)],
                "size": 7,
                "opacity": 0.8,
                "line": {"color": "$card", "width": 0.5},
            },
            "customdata": rows.tolist(),
            "hovertemplate": f"<b>{label(name)}</b>{text}<extra></extra>",
        }
        for k, name in enumerate(classes)
        for rows in [shown[labels[shown] == name]]
    ]
    rings = _points(points, np.array(sorted(maps.heard), int), "can be heard")
    traces.append(rings | _ring(11, 1.5) | {"showlegend": bool(maps.heard)})
    traces.append(_points(points, shown[:0], "chosen") | _ring(22, 3) | {"showlegend": False})
    bare = {"showgrid": False, "zeroline": False, "showticklabels": False, "showline": True,
            "mirror": True, "linecolor": "$rule"}  # fmt: skip
    layout = _layout(
        xaxis=bare,
        # One unit is as long upwards as to the right: distances can be compared.
        yaxis=bare | {"scaleanchor": "x", "scaleratio": 1},
        margin={"l": 4, "r": 4, "t": 4, "b": 4},
        showlegend=True,
        legend={"orientation": "h", "y": -0.02, "yanchor": "top", "x": 0},
        hovermode="closest",
    )
    caption = f"{len(points)} recordings"
    if len(shown) < len(points):
        caption += f", {len(shown)} drawn"
    if panel.explained is not None:
        caption += ", two axes with {:.0%} and {:.0%} of the variance".format(*panel.explained)
    alt = f"{panel.title}: {caption}, coloured by class ({', '.join(classes)})"
    return Figure(panel.title, alt, traces, layout, 420, caption)


def _points(points: np.ndarray, rows: np.ndarray, name: str) -> dict[str, Any]:
    x, y = np.round(points[rows], 4).T.tolist()
    return {"type": "scatter", "mode": "markers", "name": label(name), "x": x, "y": y}


def _ring(size: int, width: float) -> dict[str, Any]:
    line = {"width": width}
    marker = {"symbol": "circle-open", "size": size, "color": "$ink", "line": line}
    return {"marker": marker, "hoverinfo": "skip"}


# --------------------------------------------------------------------------------- shared


def _layout(**given: Any) -> dict[str, Any]:
    return {
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": "$ink", "size": 12},
        "hoverlabel": {"bgcolor": "$card", "bordercolor": "$rule", "font": {"color": "$ink"},
                       "align": "left"},
        "dragmode": False,
    } | given  # fmt: skip


def _axis(**given: Any) -> dict[str, Any]:
    return {
        "gridcolor": "$rule",
        "zeroline": False,
        "linecolor": "$soft",
        "tickfont": {"color": "$soft"},
        "automargin": True,
    } | given
