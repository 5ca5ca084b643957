"""One process at a time: the second is told who holds it, and the dead hold nothing."""

import os
import signal
import subprocess
import sys

import pytest

from medalign_jax.core.locks import LockedError, held, lock_file

HOLDS = """
import sys, time
from pathlib import Path
from medalign_jax.core.locks import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(folder) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_the_second_is_told_who_holds_it_and_the_dead_hold_nothing(tmp_path):
    process = holder(tmp_path)
    try:
        words = rf"{tmp_path} is in use by another process \(process {process.pid} on .*, since 2"
        with pytest.raises(LockedError, match=words), held(tmp_path):
            pass
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    assert lock_file(tmp_path, True).exists()  # stale: nobody holds it
    with held(tmp_path):
        assert f'"process": {os.getpid()}' in lock_file(tmp_path, True).read_text()
    assert not any(tmp_path.iterdir())


def test_a_file_has_its_lock_beside_it(tmp_path):
    out = tmp_path / "table.parquet"
    with held(out, folder=False):
        assert lock_file(out, False).name == ".table.parquet.lock"
        told = pytest.raises(LockedError, match=f"process {os.getpid()}.*name another")
        with told, held(out, folder=False, advice="name another --out"):
            pass
        with held(tmp_path / "other.parquet", folder=False):
            pass
    assert not any(tmp_path.iterdir())


def test_a_start_that_fails_leaves_no_folder(tmp_path):
    with pytest.raises(ZeroDivisionError), held(tmp_path / "new"):
        raise ZeroDivisionError
    assert not (tmp_path / "new").exists()


def test_a_place_where_no_file_can_be_is_an_error_and_no_wait(tmp_path):
    lock_file(tmp_path, True).symlink_to(tmp_path / "gone" / "lock")
    with pytest.raises(FileNotFoundError), held(tmp_path):
        pass


def test_one_of_many_gets_it(tmp_path):
    """Lock files come and go; never do two hold one."""
    code = """
import sys, time
from pathlib import Path
from medalign_jax.core.locks import LockedError, held
got = 0
for _ in range(300):
    try:
        with held(Path(sys.argv[1]) / "place"):
            (Path(sys.argv[1]) / "mine").mkdir()  # fails where another is here
            (Path(sys.argv[1]) / "mine").rmdir()
            got += 1
    except LockedError:
        time.sleep(0.0005)
assert got
"""
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stderr=subprocess.PIPE)
        for _ in range(3)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors.decode()
