"""Batches of questions: fixed shapes per bucket, every example once, exact resumption."""

import itertools
import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import soundfile

from medalign_jax.audio import io as audio_io
from medalign_jax.audio.io import AudioError
from medalign_jax.core.batches import QuestionBatch, mismatches
from medalign_jax.data.pipeline import PipelineError
from medalign_jax.data.questions.batches import (
    QuestionBatchSpec,
    bucket_shapes,
    growing_edges,
    make_question_iterator,
)
from medalign_jax.data.questions.prompts import SequenceBuilder, Sequences
from medalign_jax.data.questions.question import Checks, Question, QuestionsError
from medalign_jax.data.questions.source import QuestionData, clip_samples, open_questions
from medalign_jax.datasets.emotions import read_emotions
from medalign_jax.text.chat import ChatTokenizer
from tests.data import manifests
from tests.text import chat_tokenizers as toy

COUNT = 23
SPEC = QuestionBatchSpec(batch_size=4, edges=(49, 53, 64), seed=5, sample_multiple=1000)
ARRAYS = {"waveform", "samples", "student_ids", "student_mask", "teacher_ids", "teacher_mask",
          "response_ids", "response_mask", "student_at", "teacher_at", "index"}  # fmt: skip


@pytest.fixture(scope="module")
def builder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    student = ChatTokenizer(toy.write_tokenizer(folder / "s", template=toy.PLAIN_TEMPLATE))
    teacher = ChatTokenizer(toy.write_teacher(folder / "t"))
    return SequenceBuilder(student, teacher, lambda samples: samples // 400, 200)


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Clips of 1600 samples and more, answers of several lengths; some ask about two clips."""
    folder = tmp_path_factory.mktemp("recordings")
    found = []
    for n in range(COUNT):
        path = manifests.write_wav(folder / f"{n}.wav", n, 1600 + 90 * n)
        audio = (str(path), found[-1].audio[0]) if n % 7 == 6 else (str(path),)
        found.append(
            Question(f"q{n}", audio, "Which?", (), "so " * (1 + n % 5) + "it is.",
                     description="A tone. " * (1 + n % 3))
        )  # fmt: skip
    return found


@pytest.fixture(scope="module")
def data(questions, builder):
    return open_questions(questions, builder)


def spec(**changes):
    return replace(SPEC, **changes)


def assert_same(a, b):
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name].dtype == other[name].dtype
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_what_a_batch_holds(data, questions):
    for batch in make_question_iterator(data, spec(epochs=1)):
        assert mismatches(batch, QuestionBatch) == []
        assert set(batch) == ARRAYS
        assert batch["waveform"].dtype == np.float32 and batch["waveform"].shape[:2] == (4, 2)
        for row, index in enumerate(batch["index"]):
            sequences, question = data.sequences[index], questions[index]
            for name, ids in sequences.arrays().items():
                found = batch[name][row]
                np.testing.assert_array_equal(found[: len(ids)], ids)
                if name.endswith("_ids"):
                    mask = batch[name.replace("_ids", "_mask")][row]
                    assert mask.dtype == bool
                    np.testing.assert_array_equal(mask, np.arange(len(found)) < len(ids))
            for clip, path in enumerate(question.audio):
                wave, _ = soundfile.read(path, dtype="float32")
                assert batch["samples"][row, clip] == len(wave)
                np.testing.assert_array_equal(batch["waveform"][row, clip, : len(wave)], wave)
                assert not batch["waveform"][row, clip, len(wave) :].any()
            assert not batch["waveform"][row, len(question.audio) :].any()
            assert not batch["samples"][row, len(question.audio) :].any()


def test_the_next_token_of_a_position_is_that_of_the_response(data):
    for batch in make_question_iterator(data, spec(epochs=1)):
        for name in ("student", "teacher"):
            following = np.take_along_axis(batch[f"{name}_ids"], batch[f"{name}_at"] + 1, 1)
            mask = batch["response_mask"]
            np.testing.assert_array_equal(following[mask], batch["response_ids"][mask])


def test_placeholders_are_as_many_as_the_audio_makes(data, builder):
    for batch in make_question_iterator(data, spec(epochs=1)):
        marks = (batch["student_ids"] == builder.student.audio_id) & batch["student_mask"]
        np.testing.assert_array_equal(marks.sum(1), (batch["samples"] // 400).sum(1))


def test_a_bucket_has_one_shape_and_holds_the_buckets_before_it(data):
    shapes, bucket = bucket_shapes(data, SPEC)
    assert [shape.student for shape in shapes] == [49, 53, 64]
    assert min(Counter(bucket.tolist()).values()) > 1 and len(set(bucket.tolist())) == 3
    for small, large in itertools.pairwise(shapes):
        assert all(vars(large)[name] >= length for name, length in vars(small).items())
    seen = Counter()
    for batch in make_question_iterator(data, spec(epochs=8)):
        seen[tuple(batch[name].shape for name in sorted(ARRAYS))] += 1
        edge = batch["student_ids"].shape[1]
        assert batch["student_mask"].sum(1).max() <= edge
        assert all(bucket[i] <= SPEC.edges.index(edge) for i in batch["index"])
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("prompt", "response", "edges"),
    [(64, 0, (64,)), (60, 5, (64, 96)), (97, 0, (64, 96, 160)), (100, 61, (64, 96, 160, 256))],
)
def test_edges_grow_by_a_half_up_to_the_longest_sequence(prompt, response, edges):
    def example(prompt, response):
        parts = np.zeros(prompt, np.int32), None, np.zeros(response, np.int32)
        return Sequences(*parts, np.zeros(0, np.int32))

    asked = [Question(id, (), "Which?", (), "this") for id in "ab"]
    data = QuestionData(asked, [example(3, 2), example(prompt, response)], (0, 0))
    assert growing_edges(data) == edges


def test_one_edge_is_one_shape(data):
    batches = list(make_question_iterator(data, spec(epochs=3, edges=())))
    assert len({batch["student_ids"].shape for batch in batches}) == 1
    longest = max(len(s.prompt) + len(s.response) for s in data.sequences)
    assert batches[0]["student_ids"].shape[1] == -(-longest // 8) * 8
    fixed = next(make_question_iterator(data, spec(edges=(), samples=48_000)))
    assert fixed["waveform"].shape == (4, 2, 48_000)


def test_every_example_once_per_epoch_but_for_the_last_few(data):
    batches = list(make_question_iterator(data, spec(epochs=6)))
    assert len(batches) == 6 * 5  # 23 examples in batches of 4: three are left over, not more
    orders = []
    for epoch in range(6):
        index = np.concatenate([b["index"] for b in batches[5 * epoch : 5 * epoch + 5]])
        assert len(set(index.tolist())) == 20 and index.min() >= 0
        orders.append(tuple(index.tolist()))
    assert len(set(orders)) == 6
    assert set(np.concatenate(orders).tolist()) == set(range(COUNT))  # none is left out for good
    edges = [b["student_ids"].shape[1] for b in batches]
    assert edges != sorted(edges)  # buckets come mixed


def test_seeds_decide(data):
    def order(**changes):
        iterator = make_question_iterator(data, spec(epochs=2, **changes))
        return [batch["index"].tolist() for batch in iterator]

    assert order() == order()
    assert order() != order(seed=6)
    assert order()[5:] != order(seed=6)[:5]


def test_evaluation_is_in_order_and_filled_up(data):
    batches = list(make_question_iterator(data, spec(shuffle=False, epochs=1, batch_size=5)))
    index = np.concatenate([batch["index"] for batch in batches])
    assert index.tolist() == [*range(COUNT), -1, -1]
    for name in ("waveform", "samples", "student_mask", "teacher_mask", "response_mask"):
        assert not batches[-1][name][3:].any()
    _, bucket = bucket_shapes(data, SPEC)
    for batch in batches:  # the smallest bucket that holds all of a batch
        rows = batch["index"][batch["index"] >= 0]
        assert batch["student_ids"].shape[1] == SPEC.edges[bucket[rows].max()]


def test_prompts_are_padded_at_the_left(data, builder):
    from medalign_jax.models.generate import pad_left

    some = spec(prompts=True, shuffle=False, epochs=1, edges=(64,), batch_size=5)
    batches = list(make_question_iterator(data, some))
    assert set(batches[0]) == {"prompt_ids", "prompt_mask", "waveform", "samples", "index"}
    for batch in batches:
        rows = [i for i in batch["index"] if i >= 0]
        ids, mask = pad_left([data.sequences[i].prompt for i in rows], builder.student.pad_id)
        extra = 64 - ids.shape[1]
        np.testing.assert_array_equal(batch["prompt_ids"][: len(rows), extra:], ids)
        np.testing.assert_array_equal(batch["prompt_mask"][: len(rows), extra:], mask)
        assert not batch["prompt_mask"][:, :extra].any()
        assert not batch["prompt_mask"][len(rows) :].any()


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_batch_of_one(data, shuffle, processes):
    one = spec(epochs=2, shuffle=shuffle)
    whole = list(make_question_iterator(data, one))
    parts = np.split(np.arange(4), processes)
    shares = [list(make_question_iterator(data, one, range(p[0], p[-1] + 1))) for p in parts]
    together = [
        {name: np.concatenate([share[n][name] for share in shares]) for name in batch}
        for n, batch in enumerate(whole)
    ]
    assert_same(together, whole)


@pytest.mark.parametrize("taken", [0, 3, 5, 7])  # an epoch has 5 batches
def test_resuming_is_exact(data, taken):
    whole = list(make_question_iterator(data, spec(epochs=3)))
    stopped = make_question_iterator(data, spec(epochs=3))
    for _ in range(taken):
        next(stopped)
    state = json.loads(json.dumps(stopped.get_state()))
    resumed = make_question_iterator(data, spec(epochs=None))  # epochs may be changed
    resumed.set_state(state)
    assert_same([next(resumed) for _ in range(15 - taken)], whole[taken:])


def test_workers_change_nothing(data):
    whole = list(make_question_iterator(data, spec(epochs=2)))
    working = make_question_iterator(data, spec(epochs=2, workers=2))
    before = [next(working) for _ in range(4)]
    state = working.get_state()
    working.close()
    threads = make_question_iterator(data, spec(epochs=2))
    threads.set_state(state)
    assert_same(before + list(threads), whole)


def test_a_state_of_other_tokens_is_refused(data, questions, builder):
    state = make_question_iterator(data, SPEC).get_state()
    other = open_questions([replace(questions[0], answer="no."), *questions[1:]], builder)
    with pytest.raises(PipelineError, match="tokens is '"):
        make_question_iterator(other, SPEC).set_state(state)
    with pytest.raises(PipelineError, match=r"edges is \[49, 53, 64\] in the state and \[64\]"):
        make_question_iterator(data, spec(edges=(64,))).set_state(state)


def test_without_a_teacher_and_without_recordings(questions, builder):
    alone = SequenceBuilder(builder.student, None, builder.audio_tokens, 200)
    batch = next(make_question_iterator(open_questions(questions, alone), SPEC))
    assert set(batch) == {name for name in ARRAYS if not name.startswith("teacher")}
    reader = SequenceBuilder(builder.teacher, None, None, 200)
    unheard = [replace(question, audio=("none.wav",)) for question in questions]
    batch = next(make_question_iterator(open_questions(unheard, reader), spec(edges=())))
    assert set(batch) == {"student_ids", "student_mask", "response_ids", "response_mask",
                          "student_at", "index"}  # fmt: skip


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000, 96_000])
def test_lengths_from_headers_are_those_of_resampling(tmp_path, questions, builder, rate):
    for n in (20_000, 20_001, 20_003):
        path = manifests.write_wav(tmp_path / f"{n}.wav", n, n, rate)
        question = replace(questions[0], audio=(str(path),))
        free = SequenceBuilder(builder.student, None, builder.audio_tokens, 2000)
        data = open_questions([question], free)
        assert clip_samples(str(path)) == data.sequences[0].samples[0]
        position = data._source.clip(0)
        assert len(position.samples) == clip_samples(str(path))


def test_files_that_change_or_vanish(tmp_path, questions, builder):
    path = manifests.write_wav(tmp_path / "a.wav", 1, 2000)
    question = replace(questions[0], audio=(str(path),))
    data = open_questions([question], builder, cache_bytes=0)
    one = spec(batch_size=1, edges=())
    manifests.write_wav(path, 1, 16_000)
    with pytest.raises(AudioError, match="has 16000 samples at 16 kHz and had 2000"):
        next(make_question_iterator(data, one))
    path.unlink()
    with pytest.raises(AudioError, match="no such file"):
        next(make_question_iterator(data, one))
    with pytest.raises(AudioError, match="no such file"):
        open_questions([question], builder)


def test_questions_that_make_no_example_are_listed(questions, builder):
    broken = [*questions, replace(questions[0], id="x", description=None)]
    found = open_questions(broken, builder, max_bad_fraction=0.1)
    assert len(found) == COUNT
    assert [(p.row, p.audio_path) for p in found.problems] == [(COUNT + 1, "x")]
    with pytest.raises(QuestionsError, match="1 of 24 questions make no example"):
        open_questions(broken, builder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 24}, "23 examples fill no batch of 24"),
        ({"edges": (60, 60)}, r"edges are \(60, 60\)"),
        ({"edges": (0, 60)}, r"edges are \(0, 60\)"),
        ({"edges": (53,)}, r"examples are longer than the last edge 53 \(question 'q"),
        ({"samples": 2000}, r"question 'q22' has a clip of 3580 samples, longer than samples=2000"),
        ({"epochs": 0}, "epochs is 0"),
        ({"token_multiple": 0}, "token_multiple is 0"),
    ],
)
def test_specifications_that_cannot_be(data, changes, words):
    with pytest.raises(PipelineError, match=words):
        make_question_iterator(data, spec(**changes))
    with pytest.raises(PipelineError, match="not rows of batches of 4"):
        make_question_iterator(data, SPEC, range(3, 5))


def test_real_speech(shared, builder):
    """Recordings at 22.05 kHz: as many samples in a batch as the placeholders were counted for."""
    checks = Checks(decode=False)
    found = read_emotions(shared / "data/emodb/metadata.csv", checks=checks).questions[::40]
    long = SequenceBuilder(builder.student, None, builder.audio_tokens, 1000)
    data = open_questions(found, long)
    (batch,) = make_question_iterator(
        data, QuestionBatchSpec(batch_size=len(found), shuffle=False, epochs=1)
    )
    for row, question in enumerate(found):
        expected = audio_io.read(question.audio[0])
        count = batch["samples"][row, 0]
        assert count == len(expected)
        waveform = batch["waveform"][row, 0]
        np.testing.assert_allclose(waveform[:count], expected, rtol=0, atol=2**-16)
        assert not waveform[count:].any()
