"""Near-copies among the recordings of an evaluation: kept together, or told."""

import csv

import numpy as np
import pytest
import soundfile

from medalign_jax.data.recordings.dataset import open_dataset
from medalign_jax.datasets.simulated.simulate import SAMPLE_RATE, simulate
from medalign_jax.evaluate.copies import search
from medalign_jax.evaluate.stages import Settings
from medalign_jax.evaluate.suite import Options, Suite

COUNT, COPIES = 24, 6  # the last ones are louder, cut copies of the first


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sounds")
    made = [simulate("heart", i, seconds=3.0, subject=i) for i in range(COUNT - COPIES)]
    sounds = [one.waveform for one in made] + [1.7 * one.waveform[800:] for one in made[:COPIES]]
    for i, sound in enumerate(sounds):
        soundfile.write(folder / f"{i}.wav", 0.3 * sound, SAMPLE_RATE)
    return folder


def opened(folder, **columns):
    """The recordings, with columns as functions of their number."""
    with open(folder / "m.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["audio_path", "label", *columns])
        for i in range(COUNT):
            values = [column(i) for column in columns.values()]
            writer.writerow([f"{i}.wav", "ab"[i % 2], *values])
    return open_dataset(folder / "m.csv", reports_required=False)


def suite_of(data, folds):
    options = Options(("label",), folds, settings=Settings(per_class=0))
    return Suite.of(data.rows, options, "sounds")


def test_copies_without_a_subject_stay_together(folder):
    searched = search(opened(folder))
    subjects = [row.subject_id for row in searched.data.rows]
    assert subjects[:COPIES] == subjects[-COPIES:] and len(set(subjects[:COPIES])) == COPIES
    assert subjects[COPIES:-COPIES] == [f"{i}.wav" for i in range(COPIES, COUNT - COPIES)]
    suite = suite_of(searched.data, 4)
    for fold in suite.plans[0]:
        tested = np.isin(np.arange(COUNT), fold.test)
        np.testing.assert_array_equal(tested[:COPIES], tested[-COPIES:])
    assert searched.findings(suite) == [
        "6 pairs of the 24 recordings are near-copies.",
        "None lies across training and test recordings of a fold.",
    ]


def test_copies_of_named_subjects_are_told(folder):
    searched = search(opened(folder, subject_id=lambda i: f"s{i}"))
    assert [row.subject_id for row in searched.data.rows] == [f"s{i}" for i in range(COUNT)]
    suite = suite_of(searched.data, 6)
    tested = {int(i): k for k, fold in enumerate(suite.plans[0]) for i in fold.test}
    apart = sum(2 for i in range(COPIES) if tested[i] != tested[COUNT - COPIES + i])
    assert apart > 0
    first, second = searched.findings(suite)
    assert first.startswith("6 pairs")
    assert second.startswith(f"{apart} of 24 test recordings have a near-copy among the training")


def test_copies_across_the_manifests_splits_are_told(folder):
    data = opened(folder, split=lambda i: "test" if i >= COUNT - 2 else "train")
    searched = search(data)
    _, told = searched.findings(suite_of(searched.data, 0))
    assert told.startswith("2 of 2 test recordings have a near-copy in train, e.g. row ")


def test_copies_stay_apart_where_a_subject_is_a_row(folder):
    """One row of a training and a test recording would be both."""
    data = opened(folder, split=lambda i: "test" if i >= COUNT - 2 else "train")
    searched = search(data, aggregate="subject")
    assert [row.subject_id for row in searched.data.rows] == [f"{i}.wav" for i in range(COUNT)]
    options = Options(("label",), 0, aggregate="subject", settings=Settings(per_class=0))
    suite = Suite.of(searched.data.rows, options, "sounds")
    assert len(suite.members) == COUNT
    assert "2 of 2 test recordings" in searched.findings(suite)[1]


def test_nothing_is_claimed_where_nobody_looked_or_nothing_is_found(folder):
    data = opened(folder)
    searched = search(data, enabled=False)
    assert searched.data is data
    assert searched.findings(suite_of(data, 3))[0].startswith("Nobody looked")
    some = data.select(range(COUNT - COPIES))
    (told,) = search(some).findings(suite_of(some, 3))
    assert told == "No two of the 18 recordings are near-copies of each other."
