"""`report.html`: one self-contained page about a run.

No script, no network: figures are inline SVG, sounds and pictures are data URIs, and the page's
own content security policy forbids everything else. All text that comes from data is escaped.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

import numpy as np

from medalign_jax.evaluate import report_figures as figures
from medalign_jax.evaluate import report_media as media
from medalign_jax.evaluate.report_style import STYLE
from medalign_jax.evaluate.report_svg import escape, number
from medalign_jax.evaluate.results import Result, write_atomically
from medalign_jax.evaluate.statistics import Interval

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:"
_PLAYED_SECONDS = 20


@dataclasses.dataclass(frozen=True)
class Nearest:
    """A report near a recording: its text, the cosine, and whether it is the recording's own."""

    text: str
    similarity: float
    own: bool = False


@dataclasses.dataclass(frozen=True)
class Recording:
    """A recording to listen to.

    Attributes:
      name: File name or id.
      waveform: (samples,) float.
      sample_rate: Hz.
      label: True class, or "".
      predicted: Class that the model names, or "".
      report: Its own report, or "".
      features: (frames, bands) log-mel, or None.
      nearest: Nearest reports, best first.
    """

    name: str
    waveform: np.ndarray
    sample_rate: int
    label: str = ""
    predicted: str = ""
    report: str = ""
    features: np.ndarray | None = None
    nearest: tuple[Nearest, ...] = ()


@dataclasses.dataclass(frozen=True)
class UnusableRow:
    """A row of the manifest that was left out, and why."""

    row: int | None
    audio_path: str
    reason: str


@dataclasses.dataclass(frozen=True)
class ReportData:
    """Everything on the page; a section without content is left out.

    Attributes:
      title: What was run, in a few words.
      headline: The outcome in one or two plain sentences, see `comparison_sentence`.
      summary: A few sentences about what was done.
      facts: Name and value: method, encoder, teacher, data, device, git commit, ...
      bars: Comparisons before, after and ceiling.
      curves: Training curves.
      maps: Embedding maps before and after.
      map_note: How the maps were made.
      confusions: Confusion matrices.
      recordings: A few recordings to play.
      results: All results, as in `evaluation.json`.
      unusable: Rows that were left out.
      limits: What a reader must not conclude.
    """

    title: str
    headline: str
    summary: str = ""
    facts: Sequence[tuple[str, str]] = ()
    bars: Sequence[figures.Bars] = ()
    curves: Sequence[figures.Curves] = ()
    maps: Sequence[figures.MapPanel] = ()
    map_note: str = ""
    confusions: Sequence[figures.Confusion] = ()
    recordings: Sequence[Recording] = ()
    results: Sequence[Result] = ()
    unusable: Sequence[UnusableRow] = ()
    limits: Sequence[str] = ()


def write_report(path: str | os.PathLike, data: ReportData) -> None:
    """Writes the page in one step.

    Raises:
      ValueError: arrays of a figure or recording that do not fit together or are not finite.
    """
    write_atomically(path, render(data))


def render(data: ReportData) -> str:
    """The page as HTML text."""
    sections = [
        ("outcome", "Before and after", _bars(data)),
        ("map", "Map of the embeddings", _maps(data)),
        ("confusion", "Which classes are confused", _confusions(data)),
        ("recordings", "Recordings and their nearest reports", _recordings(data)),
        ("training", "Training", _curves(data)),
        ("results", "All results", _results(data)),
        ("unusable", "Rows left out", _unusable(data)),
        ("limits", "Limits", _limits(data)),
    ]
    sections = [section for section in sections if section[2]]
    links = "".join(f'<li><a href="#{key}">{name}</a></li>' for key, name, _ in sections)
    body = "".join(
        f'<section id="{key}" aria-labelledby="{key}-title"><h2 id="{key}-title">{name}</h2>'
        f"{content}</section>"
        for key, name, content in sections
    )
    summary = f'<p class="summary">{escape(data.summary)}</p>' if data.summary else ""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(data.title)}</title><style>{STYLE}</style></head><body>"
        f'<header><p class="over">medalign_jax</p><h1>{escape(data.title)}</h1>'
        f'<p class="headline">{escape(data.headline)}</p>{summary}{_facts(data)}'
        f'<nav aria-label="Sections"><ul>{links}</ul></nav></header>'
        f"<main>{body}</main><footer><p>For research; not a medical device.</p></footer>"
        "</body></html>\n"
    )


def comparison_sentence(
    what: str,
    before: Interval,
    after: Interval,
    difference: Interval,
    ceiling: Interval | None = None,
    *,
    higher_is_better: bool = True,
) -> str:
    """Says in plain words whether a score changed, with numbers and intervals.

    A change is called one only where its paired interval leaves out zero.

    Args:
      what: The score, for example "AUROC of the 10-labels-a-class probe on heart_sounds".
      before: Score before.
      after: Score after.
      difference: Paired interval of after minus before.
      ceiling: Score of the reference at the upper end, if there is one.
      higher_is_better: False for errors.
    """
    sign = 1 if higher_is_better else -1
    low, high = sorted((sign * difference.low, sign * difference.high))
    if low > 0:
        verdict = "rose" if higher_is_better else "fell (better)"
    elif high < 0:
        verdict = "fell" if higher_is_better else "rose (worse)"
    else:
        verdict = "did not change clearly"
    level = f"{difference.level:.0%}".replace("%", " %")
    text = (
        f"{what[:1].upper()}{what[1:]} {verdict}: from {number(before.value)} to "
        f"{number(after.value)}, a difference of {difference.value:+.3f} (paired {level} "
        f"interval {difference.low:+.3f} to {difference.high:+.3f})."
    )
    if ceiling is None:
        return text
    text += f" The ceiling is {number(ceiling.value)}"
    room = sign * (ceiling.value - before.value)
    if room <= 0:
        return f"{text}, which the starting point already reaches."
    gained = sign * difference.value / room
    if gained <= 0:
        return f"{text}; none of the way to it was gained."
    return f"{text}; {100 * gained:.0f} % of the way to it was gained."


# ------------------------------------------------------------------------------- sections


def _grid(parts: Sequence[str], note: str = "") -> str:
    lead = f"<p>{escape(note)}</p>" if note else ""
    single = " single" if len(parts) == 1 else ""
    return f'{lead}<div class="grid{single}">{"".join(parts)}</div>' if parts else ""


def _bars(data: ReportData) -> str:
    return _grid(
        [figures.interval_bars(chart) for chart in data.bars],
        "Whiskers and brackets are 95 % bootstrap intervals over subjects; recordings without a "
        "subject count as one each.",
    )


def _curves(data: ReportData) -> str:
    return _grid([figures.line_chart(chart) for chart in data.curves])


def _maps(data: ReportData) -> str:
    if not data.maps:
        return ""
    classes = sorted({str(label) for panel in data.maps for label in panel.labels})
    panels = [figures.scatter_map(panel, classes) for panel in data.maps]
    note = f"<p>{escape(data.map_note)}</p>" if data.map_note else ""
    return note + figures.map_legend(classes) + _grid(panels)


def _confusions(data: ReportData) -> str:
    return _grid([figures.confusion_matrix(matrix) for matrix in data.confusions])


def _recordings(data: ReportData) -> str:
    return _grid(
        [_recording(recording) for recording in data.recordings],
        "Played with the loudest sample at 0.9 of full scale. Low-pitched sounds need headphones. "
        "Numbers beside the reports are cosine similarities.",
    )


def _recording(recording: Recording) -> str:
    seconds = len(recording.waveform) / recording.sample_rate
    played = recording.waveform[: _PLAYED_SECONDS * recording.sample_rate]
    length = f"{seconds:.1f} s"
    if len(played) < len(recording.waveform):
        length += f", first {_PLAYED_SECONDS} s shown"
    name = escape(recording.name)
    parts = [
        f'<header><h3>{name}</h3>{_chips(recording)}<span class="chip">{length}</span></header>',
        media.waveform_svg(played, f"Waveform of {recording.name}, {length}"),
    ]
    if recording.features is not None:
        parts.append(
            f'<img class="mel" src="{media.spectrogram_uri(recording.features)}" alt="Log-mel '
            f'spectrogram of {name}: time to the right, pitch upwards">'
        )
    uri = media.audio_uri(played, recording.sample_rate)
    parts.append(f'<audio controls preload="none" aria-label="{name}" src="{uri}"></audio>')
    if recording.report:
        parts.append(f'<div><p class="label">Its report</p><p>{escape(recording.report)}</p></div>')
    if recording.nearest:
        items = "".join(_nearest(n) for n in recording.nearest)
        parts.append(
            f'<div><p class="label">Nearest reports</p><ol class="nearest">{items}</ol></div>'
        )
    return f'<article class="card recording">{"".join(parts)}</article>'


def _chips(recording: Recording) -> str:
    label = f'<span class="chip">{escape(recording.label)}</span>' if recording.label else ""
    if not recording.predicted:
        return label
    right = recording.predicted == recording.label
    look, word = ("right", "✓ named") if right else ("wrong", "✗ named")
    return f'{label}<span class="chip {look}">{word} {escape(recording.predicted)}</span>'


def _nearest(nearest: Nearest) -> str:
    mark = ' <span class="own-mark">its own</span>' if nearest.own else ""
    text = f'<span class="own">{escape(nearest.text)}</span>' if nearest.own else None
    return (
        f'<li><span class="sim">{nearest.similarity:.3f}</span>'
        f"<span>{text or escape(nearest.text)}{mark}</span></li>"
    )


def _table(caption: str, head: Sequence[str], rows: Sequence[str]) -> str:
    """A table that scrolls sideways on a narrow screen and can be reached by keyboard."""
    columns = "".join(
        f'<th scope="col"{_class(name)}>{escape(name.lstrip("#"))}</th>' for name in head
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}">'
        f"<table><caption>{escape(caption)}</caption><thead><tr>{columns}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _class(name: str) -> str:
    return ' class="num"' if name.startswith("#") else ""


def _results(data: ReportData) -> str:
    if not data.results:
        return ""
    head = ["Task", "Data", "Kind", "Stage", "Metric", "#Value", "#95 % interval", "#Train",
            "#Test", "#Runs", "Notes"]  # fmt: skip
    return _table("One row for each number in evaluation.json", head, map(_result, data.results))


def _result(result: Result) -> str:
    interval = "none"
    if result.ci_low is not None and result.ci_high is not None:
        interval = f"{number(result.ci_low)} to {number(result.ci_high)}"
    words = [result.dataset, result.kind, result.stage, result.metric]
    numbers = [number(result.value), interval, result.n_train, result.n_test, len(result.seeds)]
    return (
        f'<tr><th scope="row">{escape(result.task)}</th>'
        + "".join(f"<td>{escape(word)}</td>" for word in words)
        + "".join(f'<td class="num">{escape(value)}</td>' for value in numbers)
        + f'<td class="wrap">{escape(result.notes)}</td></tr>'
    )


def _unusable(data: ReportData) -> str:
    if not data.unusable:
        return ""
    rows = [
        f'<tr><th scope="row" class="num">{"" if u.row is None else escape(u.row)}</th>'
        f'<td class="wrap">{escape(u.audio_path)}</td><td class="wrap">{escape(u.reason)}</td></tr>'
        for u in data.unusable
    ]
    count = f"{len(rows)} row{'s' if len(rows) != 1 else ''} of the manifest could not be used"
    return _table(count, ["#Row", "File", "Reason"], rows)


def _limits(data: ReportData) -> str:
    items = "".join(f"<li>{escape(limit)}</li>" for limit in data.limits)
    return f'<ul class="limits">{items}</ul>' if items else ""


def _facts(data: ReportData) -> str:
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in data.facts
    )
    return f'<dl class="facts">{items}</dl>' if items else ""
