"""The pieces that the figures of the report page are made of: text, scales and axes as SVG."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Sequence

import numpy as np

WIDTH = 400


def escape(text: object) -> str:
    """Text from data made safe for HTML content and attributes, whatever it holds."""
    return html.escape(str(text).encode("utf-8", "replace").decode("utf-8"), quote=True)


def number(value: float) -> str:
    """Three decimals for small numbers, three figures for others."""
    if value == 0 or 0.001 <= abs(value) < 10:
        return f"{value:.3f}"
    return f"{value:.3g}"


def figure(svg: str, title: str, caption: str = "", legend: str = "") -> str:
    """A figure with heading, optional legend and caption; the three are HTML already."""
    below = f"<p>{caption}</p>" if caption else ""
    return f"<figure><figcaption><h3>{title}</h3>{below}</figcaption>{legend}{svg}</figure>"


@dataclasses.dataclass(frozen=True)
class Box:
    """Maps data to the drawing area between (left, top) and (right, bottom)."""

    left: float
    top: float
    right: float
    bottom: float
    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def x(self, value: float) -> float:
        low, high = self.x_range
        return self.left + (value - low) / (high - low) * (self.right - self.left)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return self.bottom - (value - low) / (high - low) * (self.bottom - self.top)


def svg_element(parts: Sequence[str], height: float, alt: str) -> str:
    """An svg element 400 wide, with its description for those who do not see it."""
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(alt)}">'
        f"{''.join(parts)}</svg>"
    )


def shorten(text: str, length: int) -> str:
    """At most `length` characters, the last one an ellipsis where some are missing."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) between low and high."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def data_range(values: np.ndarray, pad: float) -> tuple[float, float]:
    """Least and greatest value, moved apart by `pad` of their distance; never equal."""
    if not len(values):
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):
        margin = abs(low) * 0.1 or 1.0
        return low - margin, high + margin
    return low - pad * (high - low), high + pad * (high - low)


def _tick_text(value: float) -> str:
    if abs(value) >= 10_000 or 0 < abs(value) < 0.001:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.4g}"


def x_axis(box: Box, label: str) -> str:
    """Line, ticks and name below the drawing area."""
    parts = [f'<path class="axis" d="M{box.left} {box.bottom}H{box.right}"/>']
    for value in ticks(*box.x_range, 6):
        x = box.x(value)
        parts.append(f'<path class="axis" d="M{x:.1f} {box.bottom}v4"/>')
        anchor = "end" if x > box.right - 8 else "start" if x < box.left + 4 else "mid"
        parts.append(
            f'<text class="{anchor} soft" x="{x:.1f}" y="{box.bottom + 17}">'
            f"{_tick_text(value)}</text>"
        )
    middle = (box.left + box.right) / 2
    parts.append(
        f'<text class="mid soft" x="{middle:.1f}" y="{box.bottom + 35}">{escape(label)}</text>'
    )
    return "".join(parts)


def y_axis(box: Box, log: bool) -> str:
    """Grid lines and numbers; `log` says that the range is in powers of ten."""
    values = ticks(*box.y_range)
    parts = []
    for value in values:
        y = box.y(value)
        text = _tick_text(10**value if log else value)
        parts.append(f'<path class="grid" d="M{box.left} {y:.1f}H{box.right}"/>')
        parts.append(f'<text class="end soft" x="{box.left - 7}" y="{y + 4:.1f}">{text}</text>')
    return "".join(parts)
