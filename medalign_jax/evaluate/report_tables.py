"""Tables of the report page."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from medalign_jax.evaluate.report_svg import escape


@dataclasses.dataclass(frozen=True)
class Table:
    """Texts in rows and columns: names in the first column, scores in the others.

    Attributes:
      caption: What it shows.
      head: (C,) names of the columns.
      rows: (C,) texts each.
    """

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.head):
                raise ValueError(
                    f"table {self.caption!r}: {len(row)} cells for {len(self.head)} columns"
                )


def table_of_scores(table: Table) -> str:
    """The table as HTML."""
    rows = [
        f'<tr><th scope="row" class="name">{escape(name)}</th>'
        + "".join(f'<td class="num">{escape(cell)}</td>' for cell in cells)
        + "</tr>"
        for name, *cells in table.rows
    ]
    first, *others = table.head
    return html_table(table.caption, [first, *(f"#{name}" for name in others)], rows)


def html_table(caption: str, head: Sequence[str], rows: Sequence[str]) -> str:
    """A table that scrolls sideways on a narrow screen and can be reached by keyboard.

    Args:
      caption: What it shows.
      head: Names of the columns; "#" in front marks one of numbers, to be set to the right.
      rows: HTML of the rows.
    """
    columns = "".join(
        f'<th scope="col"{_class(name)}>{escape(name.removeprefix("#"))}</th>' for name in head
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}">'
        f"<table><caption><span>{escape(caption)}</span></caption><thead><tr>{columns}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _class(name: str) -> str:
    return ' class="num"' if name.startswith("#") else ""
