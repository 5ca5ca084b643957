"""Mutates files and reads them; what a reader must not do is written down.

    python -m tests.fuzz.run --mutations 1000000

Each file is damaged with seeded mutations and read in a process of its own kind, bounded in time
and memory. A reader may return or raise `UserError`; any other exception, a signal, too much time
or memory is a finding, with the number that makes it again.
"""

from __future__ import annotations

import argparse
import dataclasses
import faulthandler
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.fuzz.mutations import mutated
from tests.fuzz.targets import BROKEN, READERS, SHARE, write_seeds

ROOT = Path(__file__).resolve().parent.parent.parent
SECONDS = 10  # of CPU time, of one file
MEMORY = 2 << 30  # bytes of address space beyond what a process has at its start
MOST_FINDINGS = 20  # of a target; then it is enough


class TooSlow(BaseException):
    """Not to be caught by an `except Exception` on the way."""


def _too_slow(*_: object) -> None:
    raise TooSlow


@dataclasses.dataclass(frozen=True)
class Job:
    """Mutations of one whole file.

    Attributes:
      target: of `READERS`.
      path: the whole file; what lies beside it is there when it is read.
      count: how many mutations.
    """

    target: str
    path: str
    count: int


def read_mutations(job: Job, first: int, seed: int) -> None:
    """Reads mutations first to count - 1 of a file; prints a line of JSON for each and finding."""
    whole = Path(job.path)
    reader, content = ({**READERS, **BROKEN})[job.target], whole.read_bytes()
    folder = Path(tempfile.mkdtemp(dir=_memory_folder()))
    shutil.copytree(whole.parent, folder, dirs_exist_ok=True)
    damaged = folder / whole.name
    reader(whole)  # imports what it needs, before memory is bounded
    _bound_memory()
    try:
        for number in range(first, job.count):
            print(json.dumps({"at": number}), flush=True)
            damaged.write_bytes(mutated(content, seed, number))
            _read_one(reader, damaged, number)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _bound_memory() -> None:
    with open("/proc/self/statm", encoding="ascii") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))


def _read_one(reader: Callable[[Path], None], damaged: Path, number: int) -> None:
    from medalign_jax.core.errors import UserError

    faulthandler.dump_traceback_later(6 * SECONDS, exit=True)  # waits, or Python is not reached
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        reader(damaged)
    except UserError:
        pass
    except (Exception, TooSlow) as error:
        signal.setitimer(signal.ITIMER_PROF, 0)
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {str(error)[:200]}"
        place = f"{Path(where.filename).name}:{where.lineno}"
        print(json.dumps({"finding": text, "at": number, "where": place}), flush=True)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        faulthandler.cancel_dump_traceback_later()


def _memory_folder() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def fuzz(jobs: Sequence[Job], seed: int) -> list[dict]:
    """Findings; a process that dies is one, and the next goes on behind it."""
    found, number, first = [], 0, 0
    while number < len(jobs):
        work = json.dumps([[dataclasses.asdict(job) for job in jobs[number:]], first, seed])
        done = subprocess.run(
            [sys.executable, "-m", "tests.fuzz.run", "--worker"],
            cwd=ROOT, input=work, capture_output=True, text=True, check=False,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )  # fmt: skip
        for line in map(json.loads, filter(_is_line, done.stdout.splitlines())):
            if "job" in line:
                number, first = (number + 1, 0) if line["job"] else (number, first)
            elif "finding" in line:
                found.append(_told(jobs[number], line))
            first = line.get("at", first - 1) + 1
        if not done.returncode:
            return found
        said = done.stderr.strip().splitlines()[-1:] or [""]
        died = f"the process ended with {done.returncode}: {said[0][:200]}"
        found.append(_told(jobs[number], {"finding": died, "at": first - 1, "where": ""}))
        if sum(f["target"] == jobs[number].target for f in found) >= MOST_FINDINGS:
            number, first = number + 1, 0
    return found


def _is_line(text: str) -> bool:
    return text.startswith("{")


def _told(job: Job, line: dict) -> dict:
    return line | {"target": job.target, "file": Path(job.path).name}


def fuzz_all(mutations: int, seed: int, targets: Sequence[str] = tuple(READERS)) -> list[dict]:
    """Findings of so many mutations, shared out over the files of all targets."""
    with tempfile.TemporaryDirectory() as name:
        files = {t: f for t, f in write_seeds(Path(name)).items() if t in targets}
        shares = {t: SHARE.get(t, 1.0) for t in files}
        jobs = [
            Job(t, str(path), math.ceil(mutations * shares[t] / sum(shares.values()) / len(paths)))
            for t, paths in files.items()
            for path in paths
        ]
        return fuzz(jobs, seed)


def _work() -> None:
    jobs, first, seed = json.loads(sys.stdin.read())
    signal.signal(signal.SIGPROF, _too_slow)
    for number, job in enumerate(jobs):
        print(json.dumps({"job": number}), flush=True)
        read_mutations(Job(**job), first if number == 0 else 0, seed)


def main() -> int:
    """Command line; returns 1 if there is a finding."""
    if sys.argv[1:2] == ["--worker"]:
        _work()
        return 0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutations", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", nargs="+", choices=READERS, default=tuple(READERS))
    arguments = parser.parse_args()
    found = fuzz_all(arguments.mutations, arguments.seed, tuple(arguments.targets))
    for finding in found:
        print(json.dumps(finding))
    print(f"{len(found)} findings")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
