"""Published data sets, as they come, become a manifest.

    medalign convert \\
        --format=bmd_hs --root=BMD-HS-Dataset --out=DIR/metadata.csv

Nothing is copied: the manifest names the recordings where they lie.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from medalign_jax.core import commands
from medalign_jax.core.registry import Registry
from medalign_jax.datasets import bmd_hs, circor, icbhi
from medalign_jax.datasets.published import REPORTS, Converted, LayoutError, Options, write

FORMATS: Registry[Callable[[Path, Options], Converted]] = Registry(
    "medalign_jax.data_sets",
    {"bmd_hs": bmd_hs.convert, "circor": circor.convert, "icbhi": icbhi.convert},
    Callable,
)


def convert(form: str, root: str | Path, out: str | Path, options: Options) -> Converted:
    """Reads a published layout and writes its manifest, whole or not at all.

    Args:
      form: of `FORMATS`.
      root: the folder that holds the published tables.
      out: the CSV to write.
      options: see `Options`.

    Raises:
      LayoutError: the folder is not there, or not in its published layout.
    """
    root = Path(root)
    if not root.is_dir():
        raise LayoutError(f"there is no folder '{root}'")
    converted = FORMATS[form](root, options)
    write(converted, out)
    return converted


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = commands.ArgumentParser(
        prog="medalign convert",
        description="Published data sets, as they come, become a manifest.",
    )
    parser.add_argument("--format", choices=FORMATS, required=True, help="the data set")
    parser.add_argument("--root", required=True, help="folder that holds its tables")
    parser.add_argument("--out", required=True, help="manifest to write, e.g. DIR/metadata.csv")
    parser.add_argument("--folds", type=int, default=5, help="for cross-validation, by subject")
    parser.add_argument("--seed", type=int, default=0, help="of folds and validation subjects")
    parser.add_argument(
        "--reports", choices=REPORTS, default="full", help="whether reports name the diseases"
    )
    arguments = parser.parse_args(argv)
    return commands.ended(lambda: run(arguments), given=arguments)


def run(arguments: argparse.Namespace) -> None:
    """Writes the manifest and says what was noticed.

    Raises:
      UserError: see `convert`.
    """
    options = Options(arguments.folds, arguments.seed, arguments.reports)
    converted = convert(arguments.format, arguments.root, arguments.out, options)
    for note in converted.notes:
        print(f"note: {note}")
    subjects = len({row["subject_id"] for row in converted.rows})
    print(f"'{arguments.out}': {len(converted.rows)} recordings of {subjects} subjects")
