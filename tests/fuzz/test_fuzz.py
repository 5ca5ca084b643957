"""Damaged files from elsewhere: values or a `UserError`, in bounded time and memory."""

import os

import pytest

from tests.fuzz.mutations import mutated
from tests.fuzz.run import Job, fuzz, fuzz_all
from tests.fuzz.targets import READERS, SEEDS

pytestmark = pytest.mark.slow

MUTATIONS = int(os.environ.get("FUZZ_MUTATIONS", "10000"))


def test_mutations_are_seeded_and_damage():
    whole = bytes(range(256)) * 4
    made = [mutated(whole, 3, number) for number in range(300)]
    assert made == [mutated(whole, 3, number) for number in range(300)]
    assert sum(one == whole for one in made) < 30
    assert len({len(one) for one in made}) > 20


def test_every_reader_has_files_to_damage():
    assert set(READERS) == set(SEEDS)


def test_readers_of_damaged_files_return_or_say_what_is_wrong():
    assert fuzz_all(MUTATIONS, seed=0) == []


def test_a_reader_that_fails_is_found(tmp_path):
    """A reader that raises, and one that takes its process with it."""
    whole = tmp_path / "whole" / "a.bin"
    whole.parent.mkdir()
    whole.write_bytes(b"whole" * 20)
    found = fuzz([Job("_broken", str(whole), 12)], seed=0)
    kinds = {finding["finding"].split(":")[0] for finding in found}
    assert "ZeroDivisionError" in kinds
    assert any("the process ended with" in finding["finding"] for finding in found)
