"""Several processes: the first works for all, one that fails takes the others along, all end."""

import json
from pathlib import Path

import pytest

from medalign_jax.core import processes
from medalign_jax.core.errors import UserError
from medalign_jax.core.locks import held
from tests import devices

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("run_together.py")


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """What each of two processes said and saw; one of them has worked long after the other."""
    folder, port = tmp_path_factory.mktemp("together"), devices.free_port()
    with held(folder / "held"):
        running = [devices.start([SCRIPT, folder, port, n], devices=1) for n in (0, 1)]
        output = [process.communicate(timeout=devices.WAIT)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], "\n".join(output)
    return [json.loads((folder / f"{n}.json").read_text()) for n in (0, 1)]


def test_what_another_run_holds_is_refused_by_all(ended):
    first, second = (each["said"][0] for each in ended)
    assert "held is in use by another process" in first
    assert second == "process 0 has failed; see what it says"
    assert not any("held" in each["seen"] for each in ended)


def test_the_first_works_for_all(ended):
    assert [each["said"][1] for each in ended] == ["", ""]
    assert [each["seen"] for each in ended] == [["alone"], []]


@pytest.mark.parametrize("block", [2, 3], ids=["by_first", "at_work_in"])
def test_where_the_first_fails_all_do(ended, block):
    words = ["the first has failed", "process 0 has failed; see what it says"]
    assert [each["said"][block] for each in ended] == words


def test_the_others_wait_for_the_first_at_the_end(ended):
    assert [each["said"][4] for each in ended] == ["", ""]


def test_one_process_alone_waits_for_nobody(tmp_path):
    seen = []
    with processes.at_work_in(tmp_path / "run"):
        processes.by_first(lambda: seen.append(1))
    assert seen == [1]
    with pytest.raises(UserError, match="its own"), processes.at_work_in(tmp_path / "run"):
        raise UserError("its own")
