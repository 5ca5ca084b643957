"""Kills a run again and again at random moments; its exports have to be those of a run left alone.

    python -m tests.kills FOLDER --kills 10 --processes 2 -- \\
        --config=tests/runs/tiny_config.py --config.mesh.fsdp=2

Runs `medalign_jax.main` with what stands behind ``--`` once undisturbed (FOLDER/whole), then in
FOLDER/killed0, killed1, ..., each killed and started again until it reaches its end, until there
have been as many kills as were asked for. Of several processes one, by lot, gets SIGKILL, the
others a moment later, as launchers do. Compares every file below an ``export`` folder byte by byte,
and the results in evaluation.json. Exit status 1 if any differs.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests import devices


def start(workdir: Path, flags: list[str], count: int) -> list[subprocess.Popen]:
    """The processes of a run, each with a device of its own."""
    command = ["-m", "medalign_jax.main", f"--workdir={workdir}", *flags]
    if count == 1:
        return [devices.start(command, devices=1)]
    command += [f"--coordinator=127.0.0.1:{devices.free_port()}", f"--num_processes={count}"]
    return [devices.start([*command, f"--process_id={n}"], devices=1) for n in range(count)]


def finish(running: list[subprocess.Popen]) -> None:
    """Waits for the end of a run, which has to be a good one."""
    said = [process.communicate(timeout=devices.WAIT)[0] for process in running]
    assert all(process.returncode == 0 for process in running), "\n".join(said)[-4000:]


def kill(running: list[subprocess.Popen], after: float, draw: random.Random) -> bool:
    """SIGKILL after so many seconds; whether the run was still at work."""
    deadline = time.monotonic() + after
    while time.monotonic() < deadline:
        if all(process.poll() is not None for process in running):
            finish(running)
            return False
        time.sleep(0.02)
    for process in draw.sample(running, len(running)):
        process.kill()
        time.sleep(draw.uniform(0, 0.2))
    for process in running:
        said = process.communicate()[0]
        # Who sees another die before its own turn ends with an error of JAX's.
        assert process.returncode in (0, -signal.SIGKILL, -signal.SIGABRT, 1), said[-4000:]
    return any(process.returncode == -signal.SIGKILL for process in running)


def outcome(workdir: Path) -> dict[str, bytes]:
    """Exported files by their place in the workdir, and the results."""
    found = {
        str(path.relative_to(workdir)): path.read_bytes()
        for path in sorted(workdir.glob("**/export/*"))
        if path.is_file()
    }
    assert found, f"{workdir} has no export"
    if (results := workdir / "evaluation.json").is_file():
        found[results.name] = json.dumps(json.loads(results.read_text())["results"]).encode()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kills")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    end = sys.argv.index("--")
    arguments, flags = parser.parse_args(sys.argv[1:end]), sys.argv[end + 1 :]
    draw, whole = random.Random(arguments.seed), arguments.folder / "whole"
    finish(start(whole, flags, arguments.processes))  # it may have to compile
    warm = arguments.folder / "warm"
    begun = time.monotonic()
    finish(start(warm, flags, arguments.processes))
    seconds = time.monotonic() - begun
    print(f"undisturbed: {seconds:.1f} s", flush=True)
    others, done = [warm], 0
    while done < arguments.kills:
        others.append(arguments.folder / f"killed{len(others) - 1}")
        done += disturbed(others[-1], flags, arguments, draw, seconds, arguments.kills - done)
    expected = outcome(whole)
    bad = []
    for other in others:
        found = outcome(other)
        bad += [f"{other.name}: {name}" for name in sorted(expected.keys() | found.keys())
                if expected.get(name) != found.get(name)]  # fmt: skip
    print(f"{done} kills in {len(others) - 1} runs; {len(expected)} files of each, differing: "
          f"{', '.join(bad) or 'none'}")  # fmt: skip
    return 1 if bad else 0


def disturbed(workdir: Path, flags, arguments, draw: random.Random, seconds: float, most: int):
    """One run to its end, started again after at most so many kills; how many there were."""
    done = 0
    while done < most:
        after = draw.uniform(0.2, 1.0) * seconds
        if not kill(start(workdir, flags, arguments.processes), after, draw):
            print(f"{workdir.name} reached its end", flush=True)
            return done
        done += 1
        print(f"{workdir.name} killed after {after:.1f} s", flush=True)
    finish(start(workdir, flags, arguments.processes))
    return done


if __name__ == "__main__":
    sys.exit(main())
