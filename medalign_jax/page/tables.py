"""Tables of the report page."""

from __future__ import annotations

from collections.abc import Sequence

from medalign_jax.evaluate.tables import Table
from medalign_jax.page.svg import escape


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
      caption: what it shows.
      head: names of the columns; "#" in front marks one of numbers, to be set to the right.
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
