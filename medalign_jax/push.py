"""``medalign push --checkpoint=WORKDIR --repo=ORG/NAME``: an export, with its card, to the Hub.

The repository is private unless --public is given, and the training reports stay here unless
--reports is: they may say who was recorded. Read the model card first (export/README.md) and state
the licence of the data in it. Log in before with ``hf auth login``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from medalign_jax.core import commands
from medalign_jax.core.errors import UserError
from medalign_jax.core.seals import check_seal
from medalign_jax.search.common_space import REPORTS_FILE
from medalign_jax.weights.hub import push

CARD = "README.md"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    arguments = _parser().parse_args(argv)
    return commands.ended(lambda: _run(arguments), given=arguments)


def _run(arguments: argparse.Namespace) -> None:
    folder, names = exported(Path(arguments.checkpoint), arguments.reports)
    size = sum((folder / name).stat().st_size for name in names) / 1e6
    what = "public" if arguments.public else "private"
    print(f"{folder}: {', '.join(names)} ({size:.1f} MB) to {arguments.repo} ({what})", flush=True)
    if not arguments.reports and (folder / REPORTS_FILE).is_file():
        print(f"{REPORTS_FILE} stays here (--reports sends it)", flush=True)
    if not arguments.dry_run:
        print(push(folder, names, arguments.repo, not arguments.public))


def exported(checkpoint: Path, reports: bool) -> tuple[Path, list[str]]:
    """The folder of an export and the names of its files that may go.

    Args:
      checkpoint: workdir, or its export folder.
      reports: whether the training reports may.

    Raises:
      UserError: there is no export, or none that can be described: it has no model card.
    """
    folder = next((f for f in (checkpoint, checkpoint / "export") if any(f.glob("*.json"))), None)
    if checkpoint.joinpath("export").is_dir():
        folder = checkpoint / "export"
    if folder is None or not any(folder.glob("*.safetensors")):
        raise UserError(f"{checkpoint} holds no export; give the workdir of a finished run")
    if not (folder / CARD).is_file():
        raise UserError(
            f"{folder} has no model card ({CARD}): what is not described is not shared. AcuLa runs "
            "that are evaluated write one; of other exports write it"
        )
    check_seal(folder)
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    return folder, [name for name in names if reports or name != REPORTS_FILE]


def _parser() -> argparse.ArgumentParser:
    parser = commands.ArgumentParser(
        prog="medalign push", description="An export of a run, with its model card, to the Hub."
    )
    parser.add_argument(
        "--checkpoint", required=True, help="workdir of a run, or its export folder"
    )
    parser.add_argument("--repo", required=True, help="ORG/NAME, made if it is not there")
    parser.add_argument("--public", action="store_true", help="for everybody to see; else private")
    parser.add_argument("--reports", action="store_true", help="send the training reports as well")
    parser.add_argument("--dry_run", action="store_true", help="say what would be sent")
    return parser


if __name__ == "__main__":
    sys.exit(main())
