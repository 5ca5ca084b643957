"""Numbers and names as the page writes them."""

from __future__ import annotations

_METRICS = {"auroc": "AUROC", "mae": "mean absolute error"}


def number(value: float) -> str:
    """Three decimals for small numbers, three figures for others."""
    if value == 0 or 0.001 <= abs(value) < 10:
        return f"{value:.3f}"
    return f"{value:.3g}"


def metric_name(metric: str) -> str:
    """A metric's name for people."""
    return _METRICS.get(metric, metric.replace("_", " "))


def shorten(text: str, length: int) -> str:
    """At most `length` characters, the last one an ellipsis where some are missing."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def shorten_middle(text: str, length: int) -> str:
    """At most `length` characters: names that differ at their ends stay different."""
    if len(text) <= length:
        return text
    tail = (length - 1) // 2
    return f"{text[: length - 1 - tail].rstrip()}…{text[-tail:].lstrip()}"


def label(text: object) -> str:
    """Text from data for a figure: Plotly reads a few tags in its labels, so none may be left."""
    return str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
