"""The embedding cache: nothing twice, nothing lost, nothing wrong in silence."""

import json
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest

from medalign_jax.data.recordings.wordings import Reports
from medalign_jax.models.language.bert import BertConfig
from medalign_jax.runs.texts import cached_texts
from medalign_jax.teachers.embedding_cache import CacheError, EmbeddingCache
from medalign_jax.teachers.reading import OverlongWarning
from medalign_jax.teachers.teacher import Reading, TeacherError
from medalign_jax.testing import random_teacher

CONFIG = BertConfig(vocab_size=50, width=16, depth=1, heads=2, mlp_width=32, max_positions=16)
TEXTS = [f"report number {i} of the series" for i in range(10)]


class Counting:
    """A teacher that notes what it is asked to embed."""

    def __init__(self, teacher):
        self._teacher = teacher
        self.asked = []

    def __getattr__(self, name):
        return getattr(self._teacher, name)

    def embed(self, texts, batch_size=32):
        self.asked += texts
        return self._teacher.embed(texts, batch_size)


@pytest.fixture(scope="module")
def plain():
    return random_teacher(CONFIG, reading=Reading(max_tokens=16))


@pytest.fixture
def teacher(plain):
    return Counting(plain)


def shards(folder):
    return sorted(folder.glob("*/*.safetensors"))


def test_computed_once_in_order_with_progress(tmp_path, teacher, plain):
    calls = []
    cache = EmbeddingCache(tmp_path, shard_texts=4)
    texts = [TEXTS[3], *TEXTS, TEXTS[3]]
    got = cache.embeddings(teacher, texts, progress=lambda *done: calls.append(done))
    np.testing.assert_allclose(got, plain.embed(texts), rtol=0, atol=1e-6)
    assert sorted(teacher.asked) == TEXTS  # each once
    assert calls == [(4, 10), (8, 10), (10, 10)] and len(shards(tmp_path)) == 3
    again = EmbeddingCache(tmp_path).embeddings(teacher, texts[::-1])
    np.testing.assert_array_equal(again, got[::-1])
    assert len(teacher.asked) == 10


def test_only_what_is_missing_is_computed(tmp_path, teacher):
    cache = EmbeddingCache(tmp_path)
    first = cache.embeddings(teacher, TEXTS[:6])
    both = cache.embeddings(teacher, TEXTS)
    assert teacher.asked == TEXTS
    np.testing.assert_array_equal(both[:6], first)


def test_another_reading_has_its_own_embeddings(tmp_path, plain):
    last = random_teacher(CONFIG, reading=Reading(max_tokens=16, pooling="last"))
    cache = EmbeddingCache(tmp_path)
    mean, other = (cache.embeddings(teacher, TEXTS[:2]) for teacher in (plain, last))
    assert np.abs(mean - other).max() > 1e-3
    np.testing.assert_array_equal(cache.embeddings(plain, TEXTS[:2]), mean)
    settings = [json.loads(path.read_text()) for path in tmp_path.glob("*/teacher.json")]
    assert {one["pooling"] for one in settings} == {"mean", "last"}


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_file_is_named(tmp_path, teacher, damage):
    cache = EmbeddingCache(tmp_path, shard_texts=5)
    cache.embeddings(teacher, TEXTS)
    path = shards(tmp_path)[1]
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    kept = {"flip": content, "cut": content[:-40], "empty": b""}[damage]
    path.write_bytes(bytes(kept))
    with pytest.raises(CacheError, match=path.name):
        cache.embeddings(teacher, TEXTS[:1])
    path.unlink()  # what the message advises
    cache.embeddings(teacher, TEXTS)
    assert len(teacher.asked) == 15


def test_reports_that_are_cut_are_said_once(tmp_path, teacher, capsys, recwarn):
    """Also where all of them are cached already; the cache itself does not warn, shard by shard."""
    long = " ".join(["murmur"] * 20)
    reports = Reports(((TEXTS[0], long), (long, long + " crackles")))
    words = "reports: 2 of 3 texts have more than max_tokens = 16 tokens and are cut there"
    for _ in range(2):
        cached_texts(teacher, [reports], tmp_path)
        assert capsys.readouterr().out.count(words) == 1
    assert not [w for w in recwarn if w.category is OverlongWarning]
    cached_texts(teacher, [Reports(((TEXTS[0],),))], tmp_path)
    assert "max_tokens" not in capsys.readouterr().out


def test_left_over_temporary_files_do_no_harm(tmp_path, teacher):
    cache = EmbeddingCache(tmp_path)
    cache.embeddings(teacher, TEXTS[:2])
    (shards(tmp_path)[0].parent / ".writing-killed").write_bytes(b"half a shard")
    cache.embeddings(teacher, TEXTS[:2])
    assert len(teacher.asked) == 2


def test_empty_text_is_named_by_its_own_index(tmp_path, teacher):
    with pytest.raises(TeacherError, match="text 3 is empty"):
        EmbeddingCache(tmp_path).embeddings(teacher, [TEXTS[0], TEXTS[0], TEXTS[0], " "])
    assert EmbeddingCache(tmp_path).embeddings(teacher, []).shape == (0, 16)
    assert not shards(tmp_path)


def test_embeddings_that_are_not_finite_are_not_cached(tmp_path, teacher):
    teacher.embed = lambda texts, batch_size: np.full((len(texts), 16), np.nan, np.float32)
    with pytest.raises(CacheError, match="not finite"):
        EmbeddingCache(tmp_path).embeddings(teacher, TEXTS)
    assert not shards(tmp_path)


class Fake:
    """A teacher without a model, for processes that are started and killed quickly."""

    width = 4096
    fingerprint = "f" * 64
    identity = "i" * 64
    settings = {"fake": True}  # noqa: RUF012

    def check_texts(self, texts):
        pass

    def embed(self, texts, batch_size=32):
        return np.stack([np.full(self.width, float(text), np.float32) for text in texts])


def fill_cache(folder, count):
    EmbeddingCache(folder, shard_texts=8).embeddings(Fake(), [str(i) for i in range(count)])


def start(*args):
    process = multiprocessing.get_context("spawn").Process(target=fill_cache, args=args)
    process.start()
    return process


def test_killed_and_crowded_writers_leave_a_sound_cache(tmp_path):
    writers = [start(tmp_path, 4000) for _ in range(2)]
    deadline = time.monotonic() + 120
    while len(shards(tmp_path)) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(writers[0].pid, signal.SIGKILL)
    for writer in writers:
        writer.join()
    assert writers[0].exitcode == -signal.SIGKILL and writers[1].exitcode == 0
    written = len(shards(tmp_path))
    got = EmbeddingCache(tmp_path).embeddings(Fake(), [str(i) for i in range(4000)])
    np.testing.assert_array_equal(got[:, 0], np.arange(4000, dtype=np.float32))
    assert (got == got[:, :1]).all() and len(shards(tmp_path)) == written
