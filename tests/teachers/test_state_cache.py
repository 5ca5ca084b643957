"""The cache of teacher states: what goes in comes out, once, from the right teacher, whole."""

import dataclasses
import hashlib
import json
import multiprocessing
import os
import pickle
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from medalign_jax.teachers import state_cache
from medalign_jax.teachers.state_cache import (
    Fingerprint,
    StateCacheError,
    StateCacheWriter,
    batch_keys,
    example_key,
    open_state_cache,
)

LAST = Fingerprint(teacher="t" * 64, tokenizer="k" * 64, layers=(2, 5), width=6)
TOP = dataclasses.replace(LAST, form="top_k", top_k=3, vocabulary=50)
BF16 = ml_dtypes.bfloat16


def key(number):
    return example_key(np.arange(number + 2), np.arange(1, number + 2))


def example(number, fingerprint=LAST, dtype=np.float32):
    """Arrays of an example with `number` + 1 response positions."""
    rng = np.random.default_rng(number)
    r, w, k = number + 1, fingerprint.width, fingerprint.top_k
    draw = lambda *shape: rng.standard_normal(shape).astype(dtype)  # noqa: E731
    arrays = {"states": draw(len(fingerprint.layers), r, w)}
    if fingerprint.form == "last":
        return arrays | {"last": draw(r, w)}
    ids = np.stack([rng.permutation(fingerprint.vocabulary)[:k] for _ in range(r)])
    return arrays | {"ids": ids, "log_probs": -np.abs(draw(r, k)), "rest": -np.abs(draw(r))}


def fill(folder, numbers, fingerprint=LAST, **settings):
    with StateCacheWriter(folder, fingerprint, **settings) as writer:
        return [writer.add(key(n), example(n, fingerprint)) for n in numbers]


def shards(folder):
    return sorted(folder.glob("states-*.array_record"))


@pytest.mark.parametrize("fingerprint", [LAST, TOP], ids=["last", "top_k"])
def test_round_trip_padded(tmp_path, fingerprint):
    fill(tmp_path, range(7), fingerprint, shard_examples=3)
    assert len(shards(tmp_path)) == 3
    cache = open_state_cache(tmp_path, fingerprint)
    assert len(cache) == 7 and key(6) in cache and key(7) not in cache
    for number in (6, 0, 3):
        given, found = example(number, fingerprint), cache.read(key(number), 9)
        assert set(found) == set(given)
        r = number + 1
        for name, array in found.items():
            exact = {"ids": np.int32, "log_probs": np.float32, "rest": np.float32}
            expected = given[name] if name in exact else given[name].astype(BF16)
            places = np.moveaxis(array, 1, 0) if name == "states" else array
            assert len(places) == 9 and not places[r:].any(), name
            back = np.moveaxis(places[:r], 0, 1) if name == "states" else places[:r]
            np.testing.assert_array_equal(back, expected)
            assert array.dtype == exact.get(name, BF16)


def test_rounding_is_that_of_bfloat16(tmp_path):
    rng = np.random.default_rng(0)
    states = (rng.standard_normal((2, 500, 6)) * 10.0 ** rng.uniform(-6, 6, (2, 500, 6))).astype(
        "f4"
    )
    plain = rng.standard_normal((500, 6)).astype(BF16)
    with StateCacheWriter(tmp_path, LAST) as writer:
        writer.add(key(0), {"states": jnp.asarray(states), "last": jnp.asarray(plain)})
    found = open_state_cache(tmp_path, LAST).read(key(0), 500)
    np.testing.assert_array_equal(found["last"], plain)  # nothing left to round
    error = np.abs(found["states"].astype(np.float64) - states) / np.abs(states)
    assert 2.0**-9 < error.max() <= 2.0**-8


def test_a_batch_has_zeros_in_rows_without_an_example(tmp_path):
    fill(tmp_path, range(3), TOP)
    cache = open_state_cache(tmp_path, TOP)
    batch = cache.batch([key(2), None, key(0)], 4)
    assert {name: array.shape for name, array in batch.items()} == {
        "states": (3, 2, 4, 6), "ids": (3, 4, 3), "log_probs": (3, 4, 3), "rest": (3, 4),
    }  # fmt: skip
    for name, array in batch.items():
        np.testing.assert_array_equal(array[0], cache.read(key(2), 4)[name])
        assert not array[1].any()


def test_no_layer_but_the_last(tmp_path):
    top_only = dataclasses.replace(LAST, layers=())
    fill(tmp_path, [1], top_only)
    found = open_state_cache(tmp_path, top_only).read(key(1), 2)
    assert found["states"].shape == (0, 2, 6) and found["last"].all()


def test_keys_see_tokens_and_positions_but_no_padding():
    rows = {
        "teacher_ids": np.array([[5, 6, 7, 0], [5, 6, 7, 9], [5, 6, 7, 8], [5, 6, 7, 0], [0] * 4]),
        "teacher_mask": np.array([[1, 1, 1, 0]] * 2 + [[1] * 4] + [[1, 1, 1, 0]] + [[0] * 4], bool),
        "teacher_at": np.array([[1, 2, 0], [1, 2, 5], [1, 2, 0], [0, 1, 0], [0, 0, 0]]),
        "response_mask": np.array([[1, 1, 0]] * 4 + [[0] * 3], bool),
    }
    first, second, third, fourth, none = batch_keys(rows)
    assert first == second == example_key(np.array([5, 6, 7]), np.array([1, 2]))
    assert len({first, third, fourth}) == 3 and none is None
    # The definition, so that a cache outlives this code.
    numbers = np.array([3, 2, 5, 6, 7, 1, 2], "<u4")
    assert first == hashlib.sha256(numbers.tobytes()).digest()
    assert example_key(np.array([1, 2]), np.array([3])) != example_key(
        np.array([1]), np.array([2, 3])
    )


def test_nothing_twice(tmp_path):
    assert fill(tmp_path, [0, 1, 0]) == [True, True, False]
    assert fill(tmp_path, [1, 2]) == [False, True]
    with StateCacheWriter(tmp_path, LAST) as writer:
        assert len(writer) == 3 and key(2) in writer
        assert writer.missing([key(4), key(0), None, key(3), key(4)]) == [key(4), key(3)]
    cache = open_state_cache(tmp_path, LAST)
    assert len(cache) == 3 and cache.missing([None, key(1), key(9)]) == [key(9)]


def test_an_example_in_two_files_is_refused(tmp_path):
    fill(tmp_path / "a", [0, 1])
    fill(tmp_path / "b", [1, 2])
    (other,) = shards(tmp_path / "b")
    other.rename(tmp_path / "a" / other.name)
    with pytest.raises(StateCacheError, match=f"{key(1).hex()[:16]} is in .* and in ") as caught:
        open_state_cache(tmp_path / "a", LAST)
    assert all(str(path) in str(caught.value) for path in shards(tmp_path / "a"))


def test_a_kill_costs_the_unfinished_file_only(tmp_path):
    writer = StateCacheWriter(tmp_path, LAST, shard_examples=2)
    for number in range(3):
        writer.add(key(number), example(number))
    assert len(open_state_cache(tmp_path, LAST)) == 2  # readers see whole files only
    os.close(writer._lock)  # as when the process is killed; the third example lies in a stub
    (left,) = tmp_path.glob(".writing-0-*")
    with StateCacheWriter(tmp_path, LAST) as again:
        assert not left.exists()
        assert again.missing(map(key, range(4))) == [key(2), key(3)]
        for number in (2, 3):
            again.add(key(number), example(number))
    cache = open_state_cache(tmp_path, LAST)
    assert len(cache) == 4 and not list(tmp_path.glob(".writing-*"))


def test_an_error_in_between_keeps_what_was_computed(tmp_path):
    with pytest.raises(RuntimeError, match="teacher"), StateCacheWriter(tmp_path, LAST) as writer:
        writer.add(key(0), example(0))
        raise RuntimeError("the teacher failed")
    assert key(0) in open_state_cache(tmp_path, LAST)
    with pytest.raises(StateCacheError, match="closed"):
        writer.add(key(1), example(1))


def test_one_writer_of_a_number_at_a_time(tmp_path):
    with StateCacheWriter(tmp_path, LAST) as first:
        with pytest.raises(StateCacheError, match="as writer 0"):
            StateCacheWriter(tmp_path, LAST)
        with StateCacheWriter(tmp_path, LAST, writer=1) as second:
            first.add(key(0), example(0))
            second.add(key(1), example(1))
    assert len(open_state_cache(tmp_path, LAST)) == 2
    fill(tmp_path, [2])


def test_another_teachers_cache_is_refused_with_what_differs(tmp_path):
    fill(tmp_path, [0])
    other = dataclasses.replace(LAST, teacher="u" * 64, layers=(2, 6))
    for opened in (open_state_cache, StateCacheWriter):
        with pytest.raises(StateCacheError) as caught:
            opened(tmp_path, other)
        text = str(caught.value)
        assert f"layers is [2, 5] there and [2, 6] now; teacher is '{'t' * 64}' there" in text
        assert "width" not in text and str(tmp_path) in text
    with pytest.raises(StateCacheError, match="form is 'last' there and 'top_k' now; top_k is 0"):
        open_state_cache(tmp_path, TOP)
    description = tmp_path / "teacher.json"
    content = json.loads(description.read_text())
    assert content == LAST.as_dict()
    description.write_text(json.dumps(content | {"format": 0}))
    with pytest.raises(StateCacheError, match="format is 0 there and 1 now"):
        StateCacheWriter(tmp_path, LAST)
    description.write_text("{")
    with pytest.raises(StateCacheError, match=r"teacher\.json cannot be read"):
        open_state_cache(tmp_path, LAST)
    description.unlink()
    with pytest.raises(StateCacheError, match="not a cache of teacher states"):
        open_state_cache(tmp_path, LAST)
    with pytest.raises(StateCacheError, match="says whose"):
        StateCacheWriter(tmp_path, LAST)


@pytest.mark.parametrize("damage", ["cut", "half", "empty", "junk"])
def test_a_damaged_file_is_named_on_opening(tmp_path, damage):
    fill(tmp_path, range(4), shard_examples=2)
    path = shards(tmp_path)[1]
    content = path.read_bytes()
    size = len(content)
    kept = {"cut": content[:-8], "half": content[: size // 2], "empty": b"", "junk": b"x" * size}
    path.write_bytes(kept[damage])
    for opened in (open_state_cache, StateCacheWriter):
        with pytest.raises(StateCacheError, match=f"damaged teacher cache: .*{path.name}"):
            opened(tmp_path, LAST)
    path.unlink()  # what the message advises
    with StateCacheWriter(tmp_path, LAST) as writer:
        missing = writer.missing(map(key, range(4)))
        assert len(missing) == 2
        for number in range(4):
            writer.add(key(number), example(number))
    assert len(open_state_cache(tmp_path, LAST)) == 4


def test_a_changed_bit_is_noticed_on_reading(tmp_path):
    fill(tmp_path, range(2))
    (path,) = shards(tmp_path)
    content = bytearray(path.read_bytes())
    place = content.index(example(1)["last"].astype(BF16).tobytes())
    content[place + 5] ^= 1
    path.write_bytes(bytes(content))
    cache = open_state_cache(tmp_path, LAST)
    cache.read(key(0), 1)
    with pytest.raises(StateCacheError, match=rf"{path.name} \(record 1: "):
        cache.read(key(1), 2)


def test_a_file_of_other_sizes_is_named(tmp_path):
    narrow = dataclasses.replace(LAST, width=4)
    fill(tmp_path / "a", [0])
    fill(tmp_path / "b", [1], narrow)
    (stray,) = shards(tmp_path / "b")
    stray.rename(tmp_path / "a" / stray.name)
    with pytest.raises(StateCacheError, match=f"{stray.name} .record 0 is not that of example"):
        open_state_cache(tmp_path / "a", LAST).read(key(1), 2)


def test_a_disk_that_cannot_be_written(tmp_path, monkeypatch):
    writer = StateCacheWriter(tmp_path, LAST, shard_examples=2)
    writer.add(key(0), example(0))

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StateCacheError, match="No space left"):
        writer.add(key(1), example(1))
    monkeypatch.undo()
    assert writer.missing([key(0), key(1)]) == [key(0), key(1)]
    assert not list(tmp_path.glob(".writing-*"))
    writer.close()
    (tmp_path / "file").write_text("")
    with pytest.raises(StateCacheError, match="cannot be written to"):
        StateCacheWriter(tmp_path / "file", LAST)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"last": None}, "expected states, last"),
        ({"states": np.zeros((2, 0, 6)), "last": np.zeros((0, 6))}, "at least one position"),
        ({"states": np.zeros((3, 2, 6))}, r"states is \(3, 2, 6\), not \(2, 2, 6\)"),
        ({"last": np.zeros((3, 6))}, r"last is \(3, 6\), not \(2, 6\)"),
        ({"last": np.full((2, 6), np.nan)}, "last has numbers that are not finite"),
        ({"last": np.full((2, 6), 3.4e38)}, "last has numbers that are not finite"),
        ({"last": np.zeros((2, 6), int)}, "last is int64, not bfloat16"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path, changes, message):
    arrays = {n: a for n, a in (example(1) | changes).items() if a is not None}
    with StateCacheWriter(tmp_path, LAST) as writer:
        with pytest.raises(StateCacheError, match=message) as caught:
            writer.add(key(1), arrays)
        assert key(1).hex()[:16] in str(caught.value) and key(1) not in writer
    assert not shards(tmp_path)


def test_ids_outside_of_the_vocabulary_are_refused(tmp_path):
    arrays = example(1, TOP)
    with StateCacheWriter(tmp_path, TOP) as writer:
        for wrong in (-1, 50):
            arrays["ids"][1, 2] = wrong
            with pytest.raises(StateCacheError, match=r"outside of 0\.\.49"):
                writer.add(key(1), arrays)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"form": "all"}, "form 'all'"),
        ({"top_k": 2}, "top_k 2"),
        ({"form": "top_k", "top_k": 51, "vocabulary": 50}, "top_k 51 of a vocabulary of 50"),
        ({"form": "top_k"}, "top_k 0"),
        ({"layers": (-1, 3)}, "layers"),
        ({"layers": (3, 3)}, "layers"),
    ],
)
def test_senseless_fingerprints_are_refused(changes, message):
    with pytest.raises(StateCacheError, match=message):
        dataclasses.replace(LAST, **changes)


def test_examples_that_are_not_there_or_too_long(tmp_path):
    fill(tmp_path, [4])
    cache = open_state_cache(tmp_path, LAST)
    with pytest.raises(StateCacheError, match=f"{key(3).hex()[:16]} is not in the teacher cache"):
        cache.read(key(3), 9)
    with pytest.raises(StateCacheError, match="has 5 response positions; 4 asked for"):
        cache.read(key(4), 4)


def test_threads_and_processes_share_it(tmp_path, monkeypatch):
    monkeypatch.setattr(state_cache, "OPEN_FILES", 2)  # fewer than there are
    fill(tmp_path, range(12), shard_examples=2)
    cache = pickle.loads(pickle.dumps(open_state_cache(tmp_path, LAST)))

    def right(number):
        found = cache.read(key(number), 12)["last"][: number + 1]
        return bool((found == example(number)["last"].astype(BF16)).all())

    order = np.random.default_rng(0).integers(0, 12, 300)
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(right, order))
    links = [f"/proc/self/fd/{n}" for n in os.listdir("/proc/self/fd")]
    opened = {os.readlink(link) for link in links if os.path.exists(link)}
    assert 1 <= len([path for path in opened if str(tmp_path) in path]) <= 2


def fill_slowly(folder, count):
    fingerprint = dataclasses.replace(LAST, width=512)
    with StateCacheWriter(folder, fingerprint, shard_examples=4) as writer:
        for number in range(count):
            states = np.full((2, 1, 512), number, np.float32)
            writer.add(key(number), {"states": states, "last": states[0]})


def test_a_killed_writer_leaves_a_sound_cache(tmp_path):
    target = multiprocessing.get_context("spawn").Process(target=fill_slowly, args=(tmp_path, 4000))
    target.start()
    deadline = time.monotonic() + 120
    while len(shards(tmp_path)) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(target.pid, signal.SIGKILL)
    target.join()
    assert target.exitcode == -signal.SIGKILL
    before = len(shards(tmp_path))
    assert 3 <= before < 200
    count = 4 * before + 5
    fill_slowly(tmp_path, count)
    cache = open_state_cache(tmp_path, dataclasses.replace(LAST, width=512))
    assert len(cache) == count and not list(tmp_path.glob(".writing-*"))
    for number in range(count):
        assert (cache.read(key(number), 1)["states"].astype(np.float32) == BF16(number)).all()
