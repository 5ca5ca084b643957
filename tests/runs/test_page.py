"""What the page of an AcuLa run shows, where sentences are of another task than the first."""

from types import SimpleNamespace

import numpy as np
import pytest

from medalign_jax.data.recordings.wordings import Reports
from medalign_jax.evaluate.collected import Measured
from medalign_jax.evaluate.sentences import Space, Words, measure_sentences
from medalign_jax.evaluate.stages import Settings
from medalign_jax.evaluate.suite import Options, Suite
from medalign_jax.reports.templates import prompts, wordings
from medalign_jax.runs import measuring, page
from tests.evaluate.evaluation_rows import row

LABELS = ("normal", "systolic murmur", "diastolic murmur")
COUNT = 60


class _Sounds:
    """As much of a data set as the page asks for."""

    sample_rate = 4000

    def __init__(self, rows):
        self.rows = rows

    def waveform(self, i):
        return np.full(4000, 0.01 * i, np.float32)


@pytest.fixture(scope="module")
def run():
    """`phase` says systolic or diastolic, nothing of the normal; `label` is the second task."""
    phases = ({}, {"phase": "systolic"}, {"phase": "diastolic"})
    rows = [
        row(i, subject_id=f"s{i}", split="train" if i < 30 else "test", label=LABELS[i % 3],
            targets=phases[i % 3])
        for i in range(COUNT)
    ]  # fmt: skip
    suite = Suite.of(rows, Options(("phase", "label"), settings=Settings(per_class=0)), "toy")
    config = SimpleNamespace(
        evaluate=SimpleNamespace(sentences=True), data=SimpleNamespace(seconds=1.0)
    )
    front_end = _FrontEnd()
    return SimpleNamespace(
        suite=suite, config=config, data=_Sounds(rows),
        made=SimpleNamespace(front_end=front_end),
        reports=Reports(tuple((f"report {i % 3}",) for i in range(COUNT))),
    )  # fmt: skip


class _FrontEnd:
    sample_rate = 4000

    def __call__(self, waveforms):
        return np.zeros((len(waveforms), 4, 2), np.float32)


@pytest.fixture(scope="module")
def shown(run):
    """Every third class is mistaken for the one before."""
    task = measuring._task(run)
    text = np.eye(3)[task.answers]
    heard = np.eye(3)[[0, 1, 1]][task.answers]
    reports = tuple(texts[0] for texts in run.reports.texts)
    words = Words(reports, (tuple((name,) for name in task.classes),), frozenset(reports))
    space = Space(heard + 1e-3, text, np.eye(3)[:, None], "none")
    fold = run.suite.plans[0][0]
    return measure_sentences(task, [fold], run.suite.subjects, words, "after", [space], Measured())


def test_confusions_are_named_by_the_classes_that_were_measured(run, shown):
    (found,) = page._confusions({"after": shown})
    assert found.classes == ("diastolic murmur", "normal", "systolic murmur")
    np.testing.assert_array_equal(found.counts, [[10, 0, 0], [0, 10, 0], [0, 10, 0]])


def test_recordings_of_every_class_are_played_with_what_was_heard(run, shown):
    played = page._recordings(run, shown)
    assert {one.label for one in played} == set(LABELS)
    heard = {"normal": "normal", "diastolic murmur": "diastolic murmur",
             "systolic murmur": "normal"}  # fmt: skip
    assert all(one.predicted == heard[one.label] for one in played)
    assert all(len(one.nearest) == 3 for one in played)


def test_recordings_are_those_of_the_first_task_where_no_sentences_were_measured(run):
    played = page._recordings(run, None)
    assert {one.label for one in played} == set(LABELS[1:])
    assert {one.predicted for one in played} == {""}


@pytest.mark.parametrize(("use", "seen"), [("fresh", True), ("mean", True), ("first", False)])
def test_all_wordings_that_are_used_count_as_trained_on(use, seen):
    sentences = prompts("aortic stenosis", "heart")
    texts = next(
        found
        for seed in range(100)
        if (found := wordings({"diagnosis": "aortic stenosis", "organ": "heart"}, 8, seed))
        and found[0] not in sentences
        and set(found[1:]) & set(sentences)
    )
    part = SimpleNamespace(train_reports=Reports((texts,)))
    run = SimpleNamespace(config=SimpleNamespace(reports=SimpleNamespace(use=use)), parts=[part])
    trained = measuring._trained_texts(run)
    assert Words((), ((sentences,),), trained).seen is seen
