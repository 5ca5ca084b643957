"""`report.html`: one self-contained page about a run.

No network: styles, scripts, sounds and pictures are in the file, and its content security policy
lets nothing else run or load (the scripts by their hashes). All text that comes from data is
escaped, in HTML by the templates and in figures by `wording.label`.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
import importlib.resources
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from medalign_jax.core.files import write_text
from medalign_jax.evaluate.results import Result
from medalign_jax.evaluate.statistics import Interval
from medalign_jax.evaluate.tables import Table
from medalign_jax.page import figures, media
from medalign_jax.page.glossary import words_of
from medalign_jax.page.recordings import Example, Recording, Sound
from medalign_jax.page.recordings import Nearest as Nearest
from medalign_jax.page.templating import environment
from medalign_jax.page.wording import label, number, shorten

_ASSETS = importlib.resources.files("medalign_jax.page") / "assets"
_RESULT_HEAD = ("Task", "Data", "Kind", "Stage", "Metric", "#Value", "#95 % interval", "#Train",
                "#Test", "#Runs", "Notes")  # fmt: skip


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
      warnings: what casts doubt on the numbers, such as leaks.
      summary: a few sentences about what was done; each line is a paragraph.
      facts: name and value: method, encoder, teacher, data, device, git commit, ...
      scores: comparisons of stages and baselines.
      tables: scores side by side, below the charts.
      curves: training curves.
      maps: embedding maps before and after, or None.
      map_note: how the maps were made.
      sounds: recordings that points of the maps play.
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
    warnings: Sequence[str] = ()
    summary: str = ""
    facts: Sequence[tuple[str, str]] = ()
    scores: Sequence[figures.Scores] = ()
    tables: Sequence[Table] = ()
    curves: Sequence[figures.Curves] = ()
    maps: figures.Maps | None = None
    map_note: str = ""
    sounds: Sequence[Sound] = ()
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
    drawn = _Drawn()
    body = environment().get_template("report.html").render(
        page=data, data=drawn, sections=_sections(data), words=words_of(data.results),
        result_head=_RESULT_HEAD, result_rows=[_cells(result) for result in data.results],
        unusable_rows=[("" if u.row is None else u.row, u.audio_path, u.reason)
                       for u in data.unusable],
    )  # fmt: skip
    sounds = [media.audio_uri(sound.played, sound.sample_rate) for sound in data.sounds]
    names = [] if data.maps is None else [label(shorten(n, 160)) for n in data.maps.names]
    heard = {} if data.maps is None else data.maps.heard
    content = _json({"figures": drawn.figures, "sounds": sounds, "names": names, "heard": heard})
    scripts = [_asset("plotly-basic.min.js")] * bool(drawn.figures) + [_asset("page.js")]
    text = environment().get_template("frame.html").render(
        title=data.title, body=body, policy=_policy(scripts),
        style=_asset("style.css"), data=content,
        scripts=scripts,
    )  # fmt: skip
    # The name of a file may hold a lone surrogate, which no file can.
    return text.encode("utf-8", "replace").decode("utf-8")


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


class _Drawn:
    """The figures of a page, in the order in which the template places them."""

    def __init__(self) -> None:
        self.figures: list[Mapping[str, Any]] = []

    def add(self, figure: figures.Figure) -> int:
        """Keeps what the script draws; returns its number."""
        self.figures.append({"traces": figure.traces, "layout": figure.layout})
        return len(self.figures) - 1


def _sections(data: ReportData) -> dict[str, str]:
    """Key and name of the sections that have content, in their order."""
    all_sections = {
        "outcome": ("Results at a glance", data.scores or data.tables),
        "map": ("Map of the embeddings", data.maps),
        "confusion": ("Which classes are confused", data.confusions),
        "recordings": ("Recordings and their nearest reports", data.recordings),
        "examples": ("Questions and answers", data.examples),
        "training": ("Training", data.curves),
        "results": ("All results", data.results),
        "unusable": ("Rows left out", data.unusable),
        "words": ("What the words mean", data.results),
        "limits": ("Limits", data.limits),
    }
    return {key: name for key, (name, content) in all_sections.items() if content}


def _cells(result: Result) -> tuple[object, ...]:
    interval = "none"
    if result.ci_low is not None and result.ci_high is not None:
        interval = f"{number(result.ci_low)} to {number(result.ci_high)}"
    words = (result.task, result.dataset, result.kind, result.stage, result.metric)
    counts = (result.n_train, result.n_test, len(result.seeds))
    return (*words, number(result.value), interval, *counts, result.notes)


@functools.cache
def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8").strip()


def _json(content: Mapping[str, Any]) -> str:
    """For a script element: nothing in it may look like the end of one."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _policy(scripts: Sequence[str]) -> str:
    hashes = (hashlib.sha256(script.encode()).digest() for script in scripts)
    allowed = " ".join(f"'sha256-{base64.b64encode(each).decode()}'" for each in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; "
        "media-src data:; base-uri 'none'; form-action 'none'"
    )
