"""Writing and ranking answers: equal to one question at a time, whatever the batches."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from medalign_jax.core.errors import UserError
from medalign_jax.data.questions.prompts import SequenceBuilder
from medalign_jax.data.questions.source import open_questions
from medalign_jax.evaluate.answering import (
    features_of,
    likeliest_options,
    log_likelihood,
    write_answers,
)
from tests import distill_models as tiny


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny.world(tmp_path_factory.mktemp("answering"), 5)


@pytest.fixture(scope="module")
def asked(world):
    """Questions with three options each, the first of them the answer."""
    others = ("wheeze", "normal crackle")
    return [
        dataclasses.replace(q, choices=(q.answer, *others), description=None)
        for q in world.data.questions
    ]


@pytest.fixture(scope="module")
def builder(world):
    student = world.student
    return SequenceBuilder(
        student.tokenizer, None, student.audio_tokens, 128, max_samples=student.max_samples,
        format=tiny.FORMAT,
    )  # fmt: skip


def test_batches_change_no_answer(world, asked, builder):
    """Five questions in batches of two: the last is filled up."""
    together = write_answers(world.student, asked, builder, 6, 2)
    assert set(together) == {q.id for q in asked}
    alone = {}
    for question in asked:
        alone |= write_answers(world.student, [question], builder, 6, 1)
    assert together == alone
    assert any(together.values())


def test_progress_counts_every_question(world, asked, builder):
    seen = []
    write_answers(world.student, asked, builder, 1, 2, progress=seen.append)
    assert sum(seen) == len(asked)


def test_no_room_for_the_answer_is_refused(world, asked, builder):
    with pytest.raises(UserError, match="more than the window of 128"):
        write_answers(world.student, asked, builder, 126, 2)


def test_log_likelihood_is_that_of_the_plain_formula(world, builder):
    data = open_questions(world.data.questions, builder)
    batch = next(tiny.World(world.student, world.teacher, builder, data).batches(5))
    found = np.asarray(log_likelihood(world.student, batch))
    module, variables = world.student.module, {"params": world.student.params}
    arrays = {name: jnp.asarray(array) for name, array in batch.items()}
    features, lengths = features_of(world.student.front_end, arrays)
    ids, mask = arrays["student_ids"], arrays["student_mask"]
    hidden, _ = module.apply(variables, ids, mask, features, lengths)
    logits = np.asarray(module.apply(variables, hidden, method="logits"), np.float64)
    scores = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for row in range(5):
        at, labels = batch["student_at"][row], batch["response_ids"][row]
        real = batch["response_mask"][row]
        expected = scores[row, at[real], labels[real]].sum()
        assert found[row] == pytest.approx(expected, rel=1e-5)


def test_the_likeliest_option_wins(world, asked, builder):
    found = likeliest_options(world.student, asked, builder, 4)
    for question in asked:
        direct = [
            dataclasses.replace(question, id=str(n), answer=option, choices=question.choices)
            for n, option in enumerate(question.choices)
        ]
        data = open_questions(direct, builder)
        batch = next(tiny.World(world.student, world.teacher, builder, data).batches(3))
        best = int(np.asarray(log_likelihood(world.student, batch)).argmax())
        assert found[question.id] == question.choices[best]


def test_ranking_needs_options(world, builder):
    with pytest.raises(UserError, match="no options"):
        likeliest_options(world.student, world.data.questions, builder)
