"""The processes of a run meet before JAX connects them; who does not come is named in one line."""

import contextlib
import socket
import subprocess
import sys
import threading
import time

import pytest

from medalign_jax.core import rendezvous
from medalign_jax.core.errors import UserError
from tests import devices
from tests.conftest import ROOT

pytestmark = pytest.mark.slow


def outcomes(address, count, numbers, seconds=20.0, later=0.0):
    """What `meet` says to each of the processes, "" where all is well; the first comes later."""
    said = {}

    def come(place, number, count):
        if number == 0:
            time.sleep(later)
        try:
            rendezvous.meet(address, count, number, seconds)
            said[place] = ""
        except UserError as error:
            said[place] = str(error)

    threads = [
        threading.Thread(target=come, args=(place, *(n if isinstance(n, tuple) else (n, count))))
        for place, n in enumerate(numbers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [said[place] for place in range(len(numbers))]


@pytest.fixture
def address():
    return "127.0.0.1", devices.free_port()


def test_all_go_on_as_soon_as_all_are_there(address):
    begun = time.monotonic()
    assert outcomes(address, 3, (2, 0, 1), later=0.5) == ["", "", ""]
    assert time.monotonic() - begun < 10


def test_each_is_told_who_did_not_come(address):
    words = f"processes 1, 3 of 4 did not come to 127.0.0.1:{address[1]} in 1 s"
    said = outcomes(address, 4, (0, 2), seconds=1)
    assert said[0] == said[1] and said[0].startswith(words) and "reach that address" in said[0]


def test_one_that_is_missing_is_spoken_of_alone(address):
    (said,) = outcomes(address, 2, (0,), seconds=1)
    assert said.startswith("process 1 of 2 did not come") and "whether it runs and" in said


def test_without_the_first_the_others_say_so(address):
    (said,) = outcomes(address, 2, (1,), seconds=1)
    assert said.startswith(f"process 0 of 2 did not come to 127.0.0.1:{address[1]} in 1 s: start")


def test_two_of_the_same_number_are_refused(address):
    said = outcomes(address, 3, (1, 0, 1), later=0.5)
    assert all("two processes were started with --process_id=1" in text for text in said)


def test_two_numbers_of_processes_are_refused(address):
    said = outcomes(address, 3, (0, (2, 4)))
    assert said[0] == said[1]
    assert "process 2 was started with --num_processes=4, process 0 with 3" in said[0]


def test_who_was_killed_while_it_waited_is_waited_for_again(address):
    """Also where the last of the others comes before it is there again."""
    found = {}

    def come(number):
        found[number] = outcomes(address, 3, (number,))[0]

    threads = [threading.Thread(target=come, args=(number,)) for number in (0, 2, 1)]
    threads[0].start()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:  # process 0 may not listen yet
        with contextlib.suppress(OSError), socket.create_connection(address) as killed:
            killed.sendall(b'{"kind": "medalign", "number": 1, "count": 3}\n')
            time.sleep(0.3)
            break
    for thread in threads[1:]:
        thread.start()
        time.sleep(0.5)
    for thread in threads:
        thread.join(30)
    assert found == {0: "", 1: "", 2: ""}


def test_strangers_and_processes_that_start_again_are_not_an_obstacle(address):
    def strangers():
        time.sleep(0.3)
        with socket.create_connection(address) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with socket.create_connection(address) as killed:
            killed.sendall(b'{"kind": "medalign", "number": 1, "count": 3}\n')
            time.sleep(0.3)

    thread = threading.Thread(target=strangers)
    thread.start()
    found = []
    first = threading.Thread(target=lambda: found.extend(outcomes(address, 3, (0,))))
    first.start()
    thread.join(20)
    found += outcomes(address, 3, (1, 2))
    first.join(20)
    assert found == ["", "", ""]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"coordinator": "host:1"}, "add --num_processes, --process_id"),
        ({"process_id": 0, "num_processes": 2}, "add --coordinator"),
        ({"coordinator": "host", "process_id": 0, "num_processes": 2}, "is not HOST:PORT"),
        ({"coordinator": "host:70000", "process_id": 0, "num_processes": 2}, "is not HOST:PORT"),
        ({"coordinator": "host:1", "process_id": 2, "num_processes": 2}, "--process_id=2 of"),
        ({"coordinator": "host:1", "process_id": -1, "num_processes": 2}, "--process_id=-1 of"),
        ({"coordinator": "host:1", "process_id": 0, "num_processes": 0}, "--num_processes=0"),
        ({"distributed": True, "init_timeout": 0}, "--init_timeout is 0"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags, words):
    with pytest.raises(UserError, match=words):
        rendezvous.join(**flags)


def test_a_port_that_is_taken_is_named(address):
    taken = pytest.raises(UserError, match=f"cannot listen on port {address[1]}")
    with socket.create_server(("", address[1])), taken:
        rendezvous.meet(address, 2, 0, 1)


@pytest.mark.parametrize(
    "command",
    [
        ("medalign_jax.main", "--config=configs/acula.py:demo", "--workdir={place}"),
        ("medalign_jax.evaluate", "--encoder=x", "--manifest={place}/m.csv", "--out={place}"),
    ],
    ids=lambda command: command[0],
)
def test_a_command_ends_with_one_line_when_the_time_is_over(tmp_path, address, command):
    command = [part.format(place=tmp_path / "run") for part in command]
    process = devices.start(
        ["-m", *command, f"--coordinator=127.0.0.1:{address[1]}", "--num_processes=2",
         "--process_id=0", "--init_timeout=1"], devices=1,
    )  # fmt: skip
    said, _ = process.communicate(timeout=devices.WAIT)
    assert process.returncode == 1
    assert said.count("\n") == 1 and said.startswith("error: process 1 of 2 did not come"), said
    assert not (tmp_path / "run").exists()


def test_a_machine_that_knows_of_no_others_is_told_so(tmp_path):
    """--distributed on a laptop."""
    done = subprocess.run(
        [sys.executable, "-m", "medalign_jax.evaluate", "--distributed", "--encoder=x",
         "--manifest=y", f"--out={tmp_path}"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "JAX finds no other processes here" in done.stderr
    assert "--coordinator, --num_processes and --process_id" in done.stderr
