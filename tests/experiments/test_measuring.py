"""Slips in what comes after training are told before it."""

from types import SimpleNamespace

import numpy as np
import pytest

from configs import acula
from medalign_jax.errors import UserError
from medalign_jax.evaluate.stages import Settings
from medalign_jax.evaluate.suite import Options, Suite
from medalign_jax.experiments import build, measuring
from medalign_jax.experiments.acula import options_of
from medalign_jax.experiments.measuring import check_settings
from tests.evaluate.evaluation_rows import row, rows


def check(tasks=("label",), **changes):
    config = acula.get_config("demo")
    config.evaluate.tasks = tasks
    config.update_from_flattened_dict(changes)
    suite = Suite.of(rows(age=lambda i: 30 + i % 7), options_of(config), "toy")
    check_settings(config, build.architecture_of(config), suite)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"evaluate.map": "procrustez"},
            r"map is 'procrustez' \(did you mean 'procrustes'",
        ),
        ({"evaluate.pad": "repat"}, r"evaluate\.pad is 'repat'.*repeat"),
        ({"evaluate.baselines": ("majority", "spectrall")}, "unknown baseline 'spectrall'"),
        ({"evaluate.pooling": "median"}, "unknown pooling 'median'"),
        ({"evaluate.layer": 99}, "99"),
        ({"evaluate.probes": ("linaer",)}, "unknown probe 'linaer'"),
        ({"evaluate.per_class": 500}, "500 labels of each class cannot be drawn"),
        ({"tasks": ("age",)}, "supervised.enabled: the first task, 'age', is a regression"),
        ({"tasks": ("lable",)}, "no recording has a value in column 'lable'"),
    ],
)
def test_a_slip_in_late_settings_is_told_at_first(changes, message):
    check()
    with pytest.raises(UserError, match=message):
        check(**changes)


def test_what_is_not_measured_needs_no_settings():
    check(**{"evaluate.enabled": False, "evaluate.map": "procrustez"})


def test_a_class_that_a_fold_trains_without_has_no_sentences_and_that_is_told_at_first():
    """Class c has two subjects, and where one is tested the other is kept for choices."""
    found = [row(i, label="c" if i in (0, 3) else "ab"[i % 2], subject_id=f"s{i}")
             for i in range(12)]  # fmt: skip
    config = acula.get_config("demo")
    config.evaluate.update({"folds": 3, "per_class": 0})
    suite = Suite.of(found, options_of(config), "toy", validation=True)
    with pytest.raises(UserError, match=r"'label', fold \d: .* no training recording is 'c'"):
        check_settings(config, build.architecture_of(config), suite)
    config.evaluate.sentences = False
    check_settings(config, build.architecture_of(config), suite)


class _Teacher:
    """The vector of "report 7" is (7, 1)."""

    def __init__(self):
        self.read = []

    def embed(self, texts):
        self.read += texts
        return np.array([[int(text.split()[1]), 1.0] for text in texts], np.float32)


@pytest.fixture
def folds():
    """A run of five folds whose recordings each have a report of their own."""
    found = [row(i, subject_id=f"s{i}", label="ab"[i % 2]) for i in range(40)]
    options = Options(("label",), folds=5, settings=Settings(per_class=0))
    suite = Suite.of(found, options, "toy", validation=True)
    parts = [SimpleNamespace(fold=fold, train_reports=build.Reports(()))
             for fold in suite.training_folds()]  # fmt: skip
    teacher = _Teacher()
    texts = SimpleNamespace(teacher=teacher, means=lambda reports: np.zeros((40, 2)))
    config = SimpleNamespace(
        evaluate=SimpleNamespace(sentences=True, map="procrustes"),
        reports=SimpleNamespace(use="first"), loss=SimpleNamespace(layers=(1,)),
    )  # fmt: skip
    data = SimpleNamespace(rows=found, reports=lambda i, count, seed: (f"report {i}",))
    reports = build.Reports(tuple((f"report {i}",) for i in range(40)))
    return SimpleNamespace(suite=suite, parts=parts, config=config, data=data, reports=reports,
                           texts=lambda config: texts, teacher=teacher)  # fmt: skip


def test_class_sentences_of_a_fold_are_reports_of_its_own_training_part(folds):
    words = measuring._words(folds)
    vectors = measuring._class_vectors(folds, words)
    embedded = {"before": [np.zeros((40, 3))] * 5}
    aligned = [SimpleNamespace(whitening=None)] * 5
    spaces = measuring._spaces(folds, embedded, aligned, vectors)["before"]
    answers = folds.suite.tasks[0].answers
    for part, space in zip(folds.parts, spaces, strict=True):
        train = part.fold.train
        expected = [train[answers[train] == c] for c in range(2)]
        least = min(map(len, expected))
        assert least >= 11
        for c, vectors in enumerate(space.class_text):
            assert vectors[:, 0].tolist() == expected[c][:least].tolist()
    assert len(folds.teacher.read) == len(set(folds.teacher.read))
