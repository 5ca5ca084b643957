"""`report.html`: one self-contained page about a run.

No script, no network: figures are inline SVG, sounds and pictures are data URIs, and the page's
own content security policy forbids everything else. All text that comes from data is escaped.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

from medalign_jax.core.files import write_text
from medalign_jax.evaluate.results import Result
from medalign_jax.evaluate.statistics import Interval
from medalign_jax.evaluate.tables import Table
from medalign_jax.page import figures
from medalign_jax.page.recordings import Example, Recording, example_card, recording_card
from medalign_jax.page.recordings import Nearest as Nearest
from medalign_jax.page.style import STYLE
from medalign_jax.page.svg import escape, number
from medalign_jax.page.tables import html_table, table_of_scores

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:"


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
      title: what was run, in a few words.
      headline: the outcome in one or two plain sentences, see `comparison_sentence`; each line
        is a paragraph.
      summary: a few sentences about what was done; each line is a paragraph.
      facts: name and value: method, encoder, teacher, data, device, git commit, ...
      bars: comparisons of stages and baselines.
      tables: scores side by side, below the bars.
      curves: training curves.
      maps: embedding maps before and after.
      map_note: how the maps were made.
      confusions: confusion matrices.
      recordings: a few recordings to play.
      examples: questions about recordings, and what each stage answered.
      example_note: how the examples were chosen.
      results: all results, as in `evaluation.json`.
      unusable: rows that were left out.
      limits: what a reader must not conclude.
    """

    title: str
    headline: str
    summary: str = ""
    facts: Sequence[tuple[str, str]] = ()
    bars: Sequence[figures.Bars] = ()
    tables: Sequence[Table] = ()
    curves: Sequence[figures.Curves] = ()
    maps: Sequence[figures.MapPanel] = ()
    map_note: str = ""
    confusions: Sequence[figures.Confusion] = ()
    recordings: Sequence[Recording] = ()
    examples: Sequence[Example] = ()
    example_note: str = ""
    results: Sequence[Result] = ()
    unusable: Sequence[UnusableRow] = ()
    limits: Sequence[str] = ()


def write_report(path: str | os.PathLike, data: ReportData) -> None:
    """Writes the page in one step.

    Raises:
      ValueError: arrays of a figure or recording that do not fit together or are not finite.
    """
    write_text(path, render(data))


def render(data: ReportData) -> str:
    """The page as HTML text."""
    sections = [
        ("outcome", "Before and after", _bars(data) + "".join(map(table_of_scores, data.tables))),
        ("map", "Map of the embeddings", _maps(data)),
        ("confusion", "Which classes are confused", _confusions(data)),
        ("recordings", "Recordings and their nearest reports", _recordings(data)),
        ("examples", "Questions and answers", _examples(data)),
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
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(data.title)}</title><style>{STYLE}</style></head><body>"
        f'<header><p class="over">medalign_jax</p><h1>{escape(data.title)}</h1>'
        f"{_lines('headline', data.headline)}{_lines('summary', data.summary)}{_facts(data)}"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav></header>'
        f"<main>{body}</main><footer><p>For research; not a medical device.</p></footer>"
        "</body></html>\n"
    )


def comparison_sentence(
    what: str,
    before: Interval,
    after: Interval,
    difference: Interval,
    reference: Interval | None = None,
    *,
    higher_is_better: bool = True,
) -> str:
    """Says in plain words whether a score changed, with numbers and intervals.

    A change is called one only where its paired interval leaves out zero.

    Args:
      what: the score, for example "AUROC of the linear probe on heart_sounds".
      before: score before.
      after: score after.
      difference: paired interval of after minus before.
      reference: score of the same encoder fine-tuned with the labels, if there is one. It is not
        a bound: reports may say more than labels do.
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
    if reference is None:
        return text
    return f"{text} Fine-tuned with the labels it is {number(reference.value)}."


# ------------------------------------------------------------------------------- sections


def _lines(look: str, text: str) -> str:
    return "".join(f'<p class="{look}">{escape(line)}</p>' for line in text.split("\n") if line)


def _grid(parts: Sequence[str], note: str = "") -> str:
    lead = f"<p>{escape(note)}</p>" if note else ""
    single = " single" if len(parts) == 1 else ""
    return f'{lead}<div class="grid{single}">{"".join(parts)}</div>' if parts else ""


def _bars(data: ReportData) -> str:
    return _grid(
        [figures.interval_bars(chart) for chart in data.bars],
        "Whiskers and brackets are 95 % intervals over subjects; recordings without a subject "
        "count as one each.",
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
        [recording_card(recording) for recording in data.recordings],
        "Played with the loudest sample at 0.9 of full scale. Low-pitched sounds need headphones. "
        "Numbers beside the reports are cosines of differences from the training means.",
    )


def _examples(data: ReportData) -> str:
    return _grid([example_card(example) for example in data.examples], data.example_note)


def _results(data: ReportData) -> str:
    if not data.results:
        return ""
    head = ["Task", "Data", "Kind", "Stage", "Metric", "#Value", "#95 % interval", "#Train",
            "#Test", "#Runs", "Notes"]  # fmt: skip
    return html_table(
        "One row for each number in evaluation.json", head, map(_result, data.results)
    )


def _result(result: Result) -> str:
    interval = "none"
    if result.ci_low is not None and result.ci_high is not None:
        interval = f"{number(result.ci_low)} to {number(result.ci_high)}"
    words = [result.dataset, result.kind, result.stage, result.metric]
    words = [escape(word).replace("_", "_<wbr>") for word in words]
    numbers = [number(result.value), interval, result.n_train, result.n_test, len(result.seeds)]
    return (
        f'<tr><th scope="row">{escape(result.task)}</th>'
        + "".join(f"<td>{word}</td>" for word in words)
        + "".join(f'<td class="num">{escape(value)}</td>' for value in numbers)
        + f'<td class="wrap notes">{escape(result.notes)}</td></tr>'
    )


def _unusable(data: ReportData) -> str:
    if not data.unusable:
        return ""
    rows = [
        f'<tr><th scope="row" class="num">{"" if u.row is None else escape(u.row)}</th>'
        f'<td class="wrap">{escape(u.audio_path)}</td><td class="wrap">{escape(u.reason)}</td></tr>'
        for u in data.unusable
    ]
    count = f"{len(rows)} row{'s' if len(rows) != 1 else ''} of the data could not be used"
    return html_table(count, ["#Row", "File", "Reason"], rows)


def _limits(data: ReportData) -> str:
    items = "".join(f"<li>{escape(limit)}</li>" for limit in data.limits)
    return f'<ul class="limits">{items}</ul>' if items else ""


def _facts(data: ReportData) -> str:
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in data.facts
    )
    return f'<dl class="facts">{items}</dl>' if items else ""
