"""Run by test_together.py: what two processes do one after another, and how they end.

Usage: run_together.py FOLDER PORT NUMBER; FOLDER/held is in use, FOLDER/NUMBER.json is written.
"""

import json
import sys
import time
from pathlib import Path

import jax

from medalign_jax.core import processes, rendezvous
from medalign_jax.core.errors import UserError

SECONDS = 6  # that the first works on alone


def told(block) -> str:
    """The error of a block, "" if there is none."""
    try:
        block()
    except UserError as error:
        return str(error)
    return ""


def fail_first() -> None:
    if jax.process_index() == 0:
        raise UserError("the first has failed")


def work_in(folder: Path, step) -> None:
    with processes.at_work_in(folder):
        step()


def stay_longer() -> None:
    if jax.process_index() == 0:
        time.sleep(SECONDS)


if __name__ == "__main__":
    folder, port, number = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    rendezvous._LEAVING = 1  # JAX would end the first long before it is done
    rendezvous.join(False, f"127.0.0.1:{port}", 2, number)
    seen = []
    said = [
        told(lambda: work_in(folder / "held", lambda: seen.append("held"))),
        told(lambda: processes.by_first(lambda: seen.append("alone"))),
        told(lambda: processes.by_first(fail_first)),
        told(lambda: work_in(folder / "run", fail_first)),
        told(lambda: work_in(folder / "run", stay_longer)),
    ]
    (folder / f"{number}.json").write_text(json.dumps({"said": said, "seen": seen}))
