"""Nearest class sentence and retrieval, named for what they are."""

import dataclasses

import numpy as np
import pytest

from medalign_jax.evaluate.collected import Measured
from medalign_jax.evaluate.folds import fold_of_splits
from medalign_jax.evaluate.sentences import Space, Words, measure_sentences
from medalign_jax.evaluate.tasks import tasks_of
from tests.evaluate.evaluation_rows import rows

COUNT = 120
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def world():
    """Two classes of three reports each; audio is a turned, noisy copy of the text."""
    found = rows(COUNT)
    (task,) = tasks_of(found, ["label"], "toy")
    report = task.answers * 3 + RNG.integers(3, size=COUNT)
    corners = RNG.standard_normal((6, 8)) * 0.5
    corners[:, 0] += np.repeat([-2.0, 2.0], 3)
    text = corners[report]
    turn = np.linalg.qr(RNG.standard_normal((8, 8)))[0]
    audio = (text + 0.2 * RNG.standard_normal(text.shape)) @ turn
    classes = np.stack([corners[:3].mean(0), corners[3:].mean(0)])[:, None]
    reports = tuple(f"report {r}" for r in report)
    words = Words(reports, ((("class a",), ("class b",)),), frozenset(reports))
    return found, task, words, audio, text, classes


def measured(world, space, words=None):
    found, task, told, *_ = world
    into = Measured()
    subjects = [row.subject_id for row in found]
    folds = [fold_of_splits(found)]
    shown = measure_sentences(task, folds, subjects, words or told, "after", [space], into)
    return into, shown


def one(into, **wanted):
    (result,) = (r for r in into.results if all(getattr(r, k) == v for k, v in wanted.items()))
    return result


def test_a_fitted_map_is_counted_as_training_and_is_not_zero_shot(world):
    *_, audio, text, classes = world
    into, shown = measured(world, Space(audio, text, classes, "procrustes"))
    result = one(into, kind="nearest_sentence", metric="accuracy")
    assert result.n_train == 60 and result.value > 0.95
    # The test part has 20 subjects, 10 of each class; training 20 of one and 10 of the other.
    assert "the most frequent class alone 0.5" in result.notes
    assert not any(r.kind == "zero_shot" for r in into.results)
    assert shown.confusion.sum() == 40 and len(shown.predicted) == 40


def test_zero_shot_is_where_nothing_was_fitted_and_no_sentence_was_a_report(world):
    _, _, words, _, text, classes = world
    space = Space(text + 0.01, text, classes, "none")
    into, _ = measured(world, space)
    result = one(into, kind="zero_shot", metric="accuracy")
    assert result.n_train == 0 and "no map" in result.notes
    told = dataclasses.replace(words, class_sentences=(((words.reports[0],), ("class b",)),))
    into, _ = measured(world, space, told)
    assert one(into, kind="nearest_sentence", metric="accuracy").n_train == 0


def test_a_class_sentence_among_any_wording_that_was_trained_on_is_not_zero_shot(world):
    _, _, words, _, text, classes = world
    told = dataclasses.replace(words, trained=words.trained | {"Class B"})
    into, _ = measured(world, Space(text + 0.01, text, classes, "none"), told)
    assert {r.kind for r in into.results if r.metric == "accuracy"} == {"nearest_sentence"}


def test_retrieval_says_how_many_reports_and_stops_before_all_of_them(world):
    *_, audio, text, classes = world
    into, _ = measured(world, Space(audio, text, classes, "procrustes"))
    first = one(into, task="audio_to_report", metric="recall@1")
    assert "6 distinct reports; a random order 0.167" in first.notes and first.value > 0.6
    assert not [r for r in into.results if (r.task, r.metric) == ("audio_to_report", "recall@10")]
    assert one(into, task="report_to_audio", metric="recall@10").value > 0.9


def test_a_class_that_is_never_named_is_told(world):
    *_, audio, text, classes = world
    same = np.concatenate([classes[:1], classes[:1]])
    into, _ = measured(world, Space(audio, text, same, "procrustes"))
    result = one(into, kind="nearest_sentence", metric="accuracy")
    assert "never named: b" in result.notes
    assert result.value == pytest.approx(0.5)  # equal sentences share every hit


def test_shown_similarities_are_centred(world):
    """A common direction would bring every cosine near 1; differences from the mean spread."""
    *_, text, classes = world
    space = Space(text + 50, text + 50, classes + 50, "none")
    _, shown = measured(world, space)
    best = [nearest[0][1] for nearest in shown.nearest.values()]
    third = [nearest[2][1] for nearest in shown.nearest.values()]
    assert np.mean(best) > 0.95 and np.mean(third) < 0.9
