"""How the processes of a run find each other.

    python -m medalign_jax.main ... --coordinator=host0:8476 --num_processes=2 --process_id=0

or, on TPU pods and under Slurm, where JAX finds all that itself, ``--distributed``.

With a coordinator they meet here before JAX connects them, so that who is missing has a name: JAX's
own service ends all processes with a stack trace when one does not come, and does not say which.
Process 0 listens at the coordinator's address, the others send it their numbers, and when all are
there, or the time is over, it reports that to them. JAX takes the same port afterwards.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import socket
import sys
import time
from collections.abc import Mapping
from typing import Any

from medalign_jax.core.errors import UserError

INIT_TIMEOUT = 300  # seconds
# What the flags mean, for commands of either kind.
HELP = {
    "distributed": "one of several processes that find each other (TPU pods, Slurm)",
    "coordinator": "HOST:PORT of process 0, where they do not: a port that is free there",
    "num_processes": "how many processes there are, with --coordinator",
    "process_id": "which of them this is, from 0 on, with --coordinator",
    "init_timeout": "seconds that processes wait for each other at the start",
}
# Seconds between the first process that leaves and the last. JAX ends those that come later; as all
# wait for each other before (`processes.ending_together`), they are at work for one that failed.
_LEAVING = 60
_ADDRESS = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[\w.-]+):(?P<port>\d{1,5})")
_RETRY = 0.2  # seconds between two tries to reach process 0
_GREETING = 2.0  # seconds in which whoever connects says who it is
_LONGEST = 4096  # bytes of a message
_KIND = "medalign"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `HELP`, in whose order `join` takes them."""
    for name, meaning in HELP.items():
        form: dict[str, Any] = {"action": "store_true"}
        if name != "distributed":
            form = {"default": INIT_TIMEOUT if name == "init_timeout" else None}
            form["type"] = str if name == "coordinator" else int
        parser.add_argument(f"--{name}", help=meaning, **form)


def join(
    distributed: bool = False,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    init_timeout: int = INIT_TIMEOUT,
) -> None:
    """Makes this process one of several, if the flags (`HELP`) say so; others than the first fall
    silent but for errors.

    Raises:
      UserError: flags that do not go together; a machine that does not name other processes; or,
        when the time is over, who did not come.
    """
    address = _address(coordinator, num_processes, process_id, init_timeout)
    if address is None and not distributed:
        return
    import jax

    # JAX's preemption service would take SIGTERM away; `train.stopping` is there for it.
    jax.config.update("jax_enable_preemption_service", False)
    if address is not None:
        meet(address, num_processes, process_id, init_timeout)
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            initialization_timeout=init_timeout,
            shutdown_timeout_seconds=_LEAVING,
        )
    except ValueError as error:
        if address is not None:
            raise
        reason = str(error).rstrip(".")
        raise UserError(
            f"--distributed: JAX finds no other processes here ({reason}). It does on TPU pods, "
            "under Slurm's srun, Open MPI's mpirun and Kubernetes; elsewhere give --coordinator, "
            "--num_processes and --process_id"
        ) from error
    if jax.process_index():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def _address(
    coordinator: str | None, count: int | None, number: int | None, timeout: int
) -> tuple[str, int] | None:
    """Host and port of process 0; None where nothing of the kind was given."""
    given = {"coordinator": coordinator, "num_processes": count, "process_id": number}
    lacking = [f"--{name}" for name, value in given.items() if value is None]
    if timeout < 1:
        raise UserError(f"--init_timeout is {timeout}; it has to be at least 1 second")
    if len(lacking) == len(given):
        return None
    if lacking:
        raise UserError(
            f"--coordinator, --num_processes and --process_id go together: add {', '.join(lacking)}"
        )
    match = _ADDRESS.fullmatch(coordinator)
    if match is None or not 0 < int(match["port"]) < 1 << 16:
        raise UserError(
            f"--coordinator={coordinator} is not HOST:PORT; name the host of process 0 and a free "
            "port of it, such as host0:8476"
        )
    if count < 1 or not 0 <= number < count:
        raise UserError(
            f"--process_id={number} of --num_processes={count}: processes are numbered from 0 to "
            "one less than how many there are"
        )
    return match["host"].strip("[]"), int(match["port"])


def meet(address: tuple[str, int], count: int, number: int, seconds: float) -> None:
    """Returns when all processes of a run are there.

    Args:
      address: host and port of process 0, which listens on all its interfaces.
      count: processes in the run.
      number: of this one.
      seconds: how long to wait.

    Raises:
      UserError: on all that are there: who did not come, or who has come with other settings.
    """
    deadline = time.monotonic() + seconds
    if number:
        _come(address, count, number, deadline, seconds)
    else:
        _receive(address, count, deadline, seconds)


def _come(
    address: tuple[str, int], count: int, number: int, deadline: float, seconds: float
) -> None:
    """Says that this process is there, and waits for process 0 to say that all are."""
    place = f"{address[0]}:{address[1]}"
    missing = f"process 0 of {count} did not come to {place} in {seconds:g} s: " + (
        "start it, and see that --coordinator names its host and a port that is open there"
    )
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(address, _left(deadline)) as to:
            _send(to, {"kind": _KIND, "number": number, "count": count})
            # Process 0 speaks at its own deadline, which is a little later if it came later.
            to.settimeout(seconds + 2 * _GREETING)
            answer = _heard(to)
            if answer is not None and answer.get("kind") == _KIND:
                if problem := answer.get("problem"):
                    raise UserError(problem)
                return
        time.sleep(_RETRY)
    raise UserError(missing)


def _receive(address: tuple[str, int], count: int, deadline: float, seconds: float) -> None:
    """Waits for the others, and reports to them when all are there or why there will be no run."""
    there: dict[int, socket.socket] = {}
    problem = ""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(_listener(address[1]))
        while not _complete(there, count) and not problem and time.monotonic() < deadline:
            listener.settimeout(_left(deadline))
            with contextlib.suppress(TimeoutError):
                come = stack.enter_context(listener.accept()[0])
                problem = _admit(come, there, count)
        missing = [n for n in range(1, count) if n not in there]
        if missing and not problem:
            names = ", ".join(map(str, missing))
            problem = (
                f"process{'es' * (len(missing) > 1)} {names} of {count} did not come to "
                f"{address[0]}:{address[1]} in {seconds:g} s: see whether "
                f"{'they run' if len(missing) > 1 else 'it runs'} and can reach that address"
            )
        for each in there.values():
            with contextlib.suppress(OSError):  # it has left: JAX will miss it
                _send(each, {"kind": _KIND, "problem": problem})
    if problem:
        raise UserError(problem)


def _complete(there: dict[int, socket.socket], count: int) -> bool:
    """Whether all are there. Who has left again, killed while it waited, is struck off."""
    if len(there) < count - 1:
        return False
    for number in [n for n, connection in there.items() if _has_left(connection)]:
        del there[number]
    return len(there) == count - 1


def _admit(come: socket.socket, there: dict[int, socket.socket], count: int) -> str:
    """Takes in who has connected, or says what is wrong with it; strangers are passed over."""
    come.settimeout(_GREETING)
    with contextlib.suppress(OSError):
        said = _heard(come)
        if said is None or said.get("kind") != _KIND:
            return ""
        number, problem = said.get("number"), ""
        if said.get("count") != count:
            problem = (
                f"process {number} was started with --num_processes={said.get('count')}, process 0 "
                f"with {count}: give all the same"
            )
        elif number not in range(1, count) or (number in there and not _has_left(there[number])):
            problem = f"two processes were started with --process_id={number}: give each its own"
        if problem:
            _send(come, {"kind": _KIND, "problem": problem})
            return problem
        there[number] = come
    return ""


def _has_left(other: socket.socket) -> bool:
    """Whether a connection was closed at its other end: a process that was started again."""
    other.settimeout(0)
    try:
        return other.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        other.settimeout(_GREETING)


def _listener(port: int) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, dualstack_ipv6=both)
    except OSError as error:
        raise UserError(
            f"process 0 cannot listen on port {port} of --coordinator ({error.strerror}): name "
            "another port to all processes"
        ) from error


def _left(deadline: float) -> float:
    return max(deadline - time.monotonic(), 0.01)


def _send(to: socket.socket, message: Mapping[str, object]) -> None:
    to.sendall(json.dumps(message).encode() + b"\n")


def _heard(come: socket.socket) -> dict | None:
    """One line of JSON; None for anything else."""
    line = b""
    while not line.endswith(b"\n") and len(line) < _LONGEST:
        part = come.recv(_LONGEST)
        if not part:
            return None
        line += part
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
