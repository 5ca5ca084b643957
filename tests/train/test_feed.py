"""The feed: order, state, errors, and a thread that ends."""

import threading
import time

import jax
import numpy as np
import pytest

from medalign_jax.core.mesh import batch_sharding, make_mesh
from medalign_jax.train.feed import Feed, put_batch


class Counting:
    """Batches [k, k] with a number as the state; `fails_at` raises there."""

    def __init__(self, count: int, fails_at: int | None = None):
        self._count, self._fails_at, self._next = count, fails_at, 0

    def __iter__(self):
        return self

    def __next__(self):
        if self._next == self._fails_at:
            raise RuntimeError(f"recording {self._next} is unreadable")
        if self._next == self._count:
            raise StopIteration
        self._next += 1
        return {"x": np.full(2, self._next, np.float32), "name": np.array(["a", "b"])}

    def get_state(self):
        return {"batch": self._next}


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(devices=jax.devices()[:1])


def test_batches_come_in_order_with_their_own_state(mesh):
    feed = Feed(Counting(6), mesh, ("x",), ahead=4)
    seen = []
    for batch, state in feed:
        time.sleep(0.02)  # the thread reads ahead meanwhile
        seen.append((float(batch["x"][0]), state["batch"]))
    feed.close()
    assert seen == [(k, k) for k in range(1, 7)]


def test_only_the_named_arrays_reach_the_device(mesh):
    feed = Feed(Counting(1), mesh, ("x",))
    batch, _ = next(iter(feed))
    feed.close()
    assert list(batch) == ["x"] and isinstance(batch["x"], jax.Array)


def test_an_error_of_the_iterator_reaches_the_consumer_after_the_good_batches(mesh):
    feed = Feed(Counting(6, fails_at=2), mesh, ("x",))
    batches = iter(feed)
    assert [next(batches)[1]["batch"] for _ in range(2)] == [1, 2]
    with pytest.raises(RuntimeError, match="recording 2 is unreadable"):
        next(batches)
    feed.close()


def test_a_missing_array_reaches_the_consumer(mesh):
    feed = Feed(Counting(2), mesh, ("x", "text"))
    with pytest.raises(KeyError, match="text"):
        next(iter(feed))
    feed.close()


def test_closing_ends_the_thread_with_batches_unread(mesh):
    before = threading.active_count()
    feed = Feed(Counting(100), mesh, ("x",))
    next(iter(feed))
    feed.close()
    assert threading.active_count() == before


def test_waiting_is_counted(mesh):
    class Slow(Counting):
        def __next__(self):
            time.sleep(0.05)
            return super().__next__()

    feed = Feed(Slow(3), mesh, ("x",))
    assert len(list(feed)) == 3
    feed.close()
    assert feed.waited >= 0.14


def test_put_batch_lays_rows_out_over_the_mesh(mesh):
    placed = put_batch({"x": np.arange(6.0).reshape(3, 2)}, mesh)
    assert placed["x"].sharding == batch_sharding(mesh)
    np.testing.assert_array_equal(placed["x"], np.arange(6.0).reshape(3, 2))
