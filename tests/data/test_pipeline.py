"""Batches: every record once per epoch, the same for any number of processes and workers."""

import json

import numpy as np
import pytest

from medalign_jax.audio import clip
from medalign_jax.audio.io import AudioError
from medalign_jax.core.batches import AudioBatch, mismatches
from medalign_jax.data import open_dataset
from medalign_jax.data.pipeline import BatchSpec, PipelineError, make_iterator
from tests.data import manifests

RECORDS = 22
SPEC = BatchSpec(batch_size=4, samples=4100, seed=5)  # recordings have 4000 to 4210 samples


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recordings")
    rows = manifests.rows_of(folder, RECORDS)
    return open_dataset(manifests.write_csv(folder / "m.csv", rows))


def extras(index, rng):
    """Stands for a row of text embeddings, one wording of several drawn."""
    return {"text": np.float32([index, rng.random()]), "wording": np.int32(rng.integers(9))}


def spec(**changes):
    return BatchSpec(**{**vars(SPEC), **changes})


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_same(a, b):
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name].dtype == other[name].dtype
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_what_a_batch_holds(data):
    batch = next(make_iterator(data, SPEC, extras))
    assert mismatches(batch, AudioBatch) == []
    assert {name: (a.shape, a.dtype.name) for name, a in batch.items()} == {
        "waveform": ((4, 4100), "float32"), "length": ((4,), "int32"), "index": ((4,), "int32"),
        "text": ((4, 2), "float32"), "wording": ((4,), "int32"),
    }  # fmt: skip
    for waveform, length, index in zip(
        batch["waveform"], batch["length"], batch["index"], strict=True
    ):
        whole = data.waveform(index)
        assert length == min(len(whole), 4100)
        if len(whole) <= 4100:
            np.testing.assert_array_equal(waveform[:length], whole)
            assert not waveform[length:].any()
        else:
            assert any(np.array_equal(waveform, whole[s : s + 4100])
                       for s in range(len(whole) - 4099))  # fmt: skip
    np.testing.assert_array_equal(batch["text"][:, 0], batch["index"])


@pytest.mark.parametrize("pad", ["zero", "repeat", "tile"])
def test_padding_rules(data, pad):
    batch = next(make_iterator(data, spec(pad=pad, samples=9000, shuffle=False, epochs=1)))
    for i in range(4):
        np.testing.assert_array_equal(batch["waveform"][i], clip.fit(data.waveform(i), 9000, pad))
        assert batch["length"][i] == len(data.waveform(i))


def test_every_record_once_per_epoch(data):
    some = data.select(range(20))
    batches = list(make_iterator(some, spec(epochs=3)))
    assert len(batches) == 15
    orders = np.concatenate([b["index"] for b in batches]).reshape(3, 20)
    for order in orders:
        assert sorted(order) == list(range(20))
    assert len({tuple(order) for order in orders}) == 3  # a new order each epoch


def test_last_partial_batch(data):
    shuffled = list(make_iterator(data, spec(epochs=2)))
    assert len(shuffled) == 2 * 5
    for epoch in (shuffled[:5], shuffled[5:]):
        seen = np.concatenate([b["index"] for b in epoch])
        assert len(set(seen)) == 20 and min(seen) >= 0  # two of the 22 dropped
    in_order = list(make_iterator(data, spec(epochs=1, shuffle=False), extras))
    index = np.concatenate([b["index"] for b in in_order])
    assert index.tolist() == [*range(22), -1, -1]
    for name in ("waveform", "length", "text", "wording"):
        assert not in_order[-1][name][2:].any()
        assert in_order[-1]["text"][:2].any()


def test_seeds_decide(data):
    first = take(make_iterator(data, SPEC, extras), 11)
    assert_same(first, take(make_iterator(data, SPEC, extras), 11))
    other = take(make_iterator(data, spec(seed=6), extras), 11)
    orders = [[b["index"].tolist() for b in batches] for batches in (first, other)]
    assert orders[0] != orders[1]
    assert orders[0][5:10] != orders[1][:5]  # seed 5's second epoch is not seed 6's first


def test_crops_and_extras_are_drawn_anew_each_epoch(data):
    long = data.select(range(14, 22))  # longer than a clip
    by_record = {}
    for batch in make_iterator(long, spec(epochs=6), extras):
        for index, waveform, text in zip(
            batch["index"], batch["waveform"], batch["text"], strict=True
        ):
            by_record.setdefault(int(index), []).append((waveform[:8].tobytes(), text[1]))
    for draws in by_record.values():
        assert len(draws) == 6
        assert len({crop for crop, _ in draws}) > 3
        assert len({text for _, text in draws}) == 6
    for batch in make_iterator(long, spec(epochs=2, random_crop=False)):
        for index, waveform in zip(batch["index"], batch["waveform"], strict=True):
            np.testing.assert_array_equal(waveform, long.waveform(index)[:4100])


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Two recordings of each of eleven subjects."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = manifests.rows_of(folder, RECORDS, split="train")
    for i, row in enumerate(rows):
        row["subject_id"] = f"subject {i // 2}"
    return open_dataset(manifests.write_csv(folder / "m.csv", rows))


def test_batches_of_different_subjects(pairs):
    settings = spec(batch_size=8, one_per_subject=True, epochs=40)
    batches = list(make_iterator(pairs, settings))
    assert len(batches) == 40 * (RECORDS // 8)
    subjects = np.array([row.subject_id for row in pairs.rows])
    assert all(len(set(subjects[batch["index"]])) == 8 for batch in batches)
    # By chance a recording comes 29 times on average, and none is forgotten.
    assert set(np.concatenate([batch["index"] for batch in batches])) == set(range(RECORDS))
    assert_same(batches, list(make_iterator(pairs, settings)))
    resumed = make_iterator(pairs, settings)
    resumed.set_state({**resumed.get_state(), "batch": 30})
    assert_same(take(resumed, 5), batches[30:35])


def test_batches_of_more_subjects_than_there_are(pairs):
    with pytest.raises(PipelineError, match="11 subjects fill no batch of 12"):
        make_iterator(pairs, spec(batch_size=12, one_per_subject=True))


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_batch_of_one(data, shuffle, processes):
    one = spec(epochs=2, shuffle=shuffle)
    whole = list(make_iterator(data, one, extras))
    rows = np.split(np.arange(one.batch_size), processes)
    parts = [range(r[0], r[-1] + 1) for r in rows]
    shares = [list(make_iterator(data, one, extras, part)) for part in parts]
    for number, batch in enumerate(whole):
        for name, array in batch.items():
            union = np.concatenate([share[number][name] for share in shares])
            np.testing.assert_array_equal(union, array)
    assert all(len(share) == len(whole) for share in shares)


@pytest.mark.parametrize("taken", [0, 3, 5, 7])  # an epoch has 5 batches
def test_resuming_is_exact(data, taken):
    whole = list(make_iterator(data, spec(epochs=3), extras))
    stopped = make_iterator(data, spec(epochs=3), extras)
    take(stopped, taken)
    state = json.loads(json.dumps(stopped.get_state()))
    resumed = make_iterator(data, spec(epochs=3), extras)
    resumed.set_state(state)
    assert resumed.get_state() == state
    assert_same(list(resumed), whole[taken:])
    stopped.set_state(state)  # also in an iterator that has run
    assert_same(list(stopped), whole[taken:])


def test_workers_change_nothing_and_resume(data):
    whole = list(make_iterator(data, spec(epochs=3), extras))
    working = make_iterator(data, spec(epochs=3, workers=2), extras)
    before = take(working, 4)
    state = working.get_state()
    working.close()
    resumed = make_iterator(data, spec(epochs=3, workers=2), extras)
    resumed.set_state(state)
    assert_same(before + list(resumed), whole)  # over two epoch boundaries
    resumed.close()
    threads = make_iterator(data, spec(epochs=3), extras)  # other readers, same state
    threads.set_state(state)
    assert_same(list(threads), whole[4:])


def test_state_serves_another_number_of_processes(data):
    whole = take(make_iterator(data, SPEC), 8)
    one = make_iterator(data, SPEC)
    take(one, 3)
    half = make_iterator(data, SPEC, None, range(2, 4))
    half.set_state(one.get_state())
    for batch, expected in zip(take(half, 5), whole[3:], strict=True):
        np.testing.assert_array_equal(batch["waveform"], expected["waveform"][2:])


def test_a_state_of_something_else_is_refused(data):
    state = make_iterator(data, SPEC).get_state()
    other = make_iterator(data.select(range(10)), spec(seed=8))
    with pytest.raises(PipelineError, match="records is 22 in the state and 10 here; seed is 5"):
        other.set_state(state)
    with pytest.raises(PipelineError, match="batch is None"):
        make_iterator(data, SPEC).set_state({**state, "batch": None})


def test_an_end_is_an_end(data):
    iterator = make_iterator(data, spec(epochs=1))
    assert len(list(iterator)) == 5
    with pytest.raises(StopIteration):
        next(iterator)
    iterator.set_state({**iterator.get_state(), "batch": 4})
    assert len(list(iterator)) == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_file_is_never_passed_over(tmp_path, workers):
    rows = manifests.rows_of(tmp_path, 8)
    data = open_dataset(manifests.write_csv(tmp_path / "m.csv", rows), cache_bytes=0)
    (tmp_path / "audio/6.wav").unlink()
    iterator = make_iterator(data, spec(shuffle=False, epochs=1, workers=workers))
    next(iterator)
    for _ in range(2):
        with pytest.raises(AudioError, match=r"6\.wav"):
            next(iterator)
    manifests.write_wav(tmp_path / "audio/6.wav", 6)
    assert next(iterator)["index"].tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"pad": "mirror"}, "unknown pad 'mirror'"),
        ({"epochs": 0}, "epochs is 0"),
        ({"workers": -1}, "workers is -1"),
        ({"batch_size": 40}, "22 recordings fill no batch of 40"),
    ],
)
def test_specifications_that_cannot_be(data, changes, words):
    with pytest.raises(PipelineError, match=words):
        make_iterator(data, spec(**changes))


def test_shares_that_cannot_be(data):
    for rows in (range(0), range(2, 5), range(-1, 2)):
        with pytest.raises(PipelineError, match="not rows of batches of 4"):
            make_iterator(data, SPEC, None, rows)
    with pytest.raises(PipelineError, match="may not name an array index"):
        next(make_iterator(data, SPEC, lambda index, rng: {"index": np.zeros(1)}))


def test_prepared_and_manifest_give_the_same_batches(data, tmp_path):
    from medalign_jax.data.recordings.prepare import write_records
    from medalign_jax.data.recordings.records import Recipe

    write_records(data, Recipe(16_000, 120.0, ()), tmp_path / "m.csv", tmp_path / "p")
    prepared = open_dataset(tmp_path / "p")
    assert_same(take(make_iterator(prepared, SPEC), 8), take(make_iterator(data, SPEC), 8))
    working = make_iterator(prepared, spec(workers=1))
    assert_same(take(working, 3), take(make_iterator(data, SPEC), 3))
    working.close()
