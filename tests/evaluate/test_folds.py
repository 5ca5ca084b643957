"""What is known of folds from the answers alone: it is said before anything is fitted."""

import numpy as np
import pytest

from medalign_jax.evaluate.folds import Fold, check_repeats, compared
from medalign_jax.evaluate.measure import measure
from medalign_jax.evaluate.stages import Settings, Stage
from medalign_jax.evaluate.statistics import StatisticsError, auroc_statistic
from medalign_jax.evaluate.suite import Options, Suite
from medalign_jax.evaluate.tasks import Task, TaskError
from tests.evaluate.evaluation_rows import row, rows

PLAIN = Settings(per_class=0)


def classes_of(letters: str) -> Task:
    """One recording per letter; a dash has no answer."""
    names = tuple(sorted(set(letters) - {"-"}))
    answers = [names.index(letter) if letter in names else -1 for letter in letters]
    return Task("grade", "toy", "classification", np.array(answers, np.int32), names)


def folds_of(*tested: list[int], count: int) -> list[Fold]:
    every, none = np.arange(count), np.zeros(0, int)
    return [
        Fold(f"fold {k}", np.setdiff1d(every, test), none, np.array(test))
        for k, test in enumerate(tested)
    ]


@pytest.mark.parametrize("aggregate", ["recording", "subject", "scores"])
def test_leaving_one_subject_out_has_no_auroc_and_says_so_with_the_task(aggregate):
    found = rows(24, age=lambda i: 30 + i // 2)
    with pytest.raises(TaskError, match=r"task 'label': 12 folds .* two classes.*fewer folds"):
        Suite.of(found, Options(("age", "label"), 12, aggregate=aggregate, settings=PLAIN), "toy")
    Suite.of(found, Options(("age",), 12, aggregate=aggregate, settings=PLAIN), "toy")
    Suite.of(found, Options(("label",), 6, aggregate=aggregate, settings=PLAIN), "toy")


def test_subjects_with_recordings_of_two_classes_may_be_left_out_one_by_one():
    found = [row(i, label="ab"[i % 2]) for i in range(24)]
    suite = Suite.of(found, Options(("label",), 12, settings=PLAIN), "toy")
    assert compared(suite.tasks[0], suite.plans[0]).tolist() == [12, 12]


def test_a_class_counts_in_the_folds_that_test_it_beside_others():
    task = classes_of("aabbcc-a")
    folds = folds_of([0, 2, 4], [1, 3], [5, 6], [7], count=8)
    assert compared(task, folds).tolist() == [2, 2, 1]


def test_repeats_that_compare_no_class_in_common_are_refused():
    """As the statistic has it, which would say so after all fits."""
    task = classes_of("aabbccdd")
    plans = [
        folds_of([0, 2], [1], [3], [4, 5], [6, 7], count=8),
        folds_of([4, 6], [5], [7], [0, 1], [2, 3], count=8),
    ]
    number = np.stack([
        [next(k for k, fold in enumerate(plan) if i in fold.test) for i in range(8)]
        for plan in plans
    ])  # fmt: skip
    for plan in plans:
        check_repeats([task], [plan])
    with pytest.raises(StatisticsError, match="AUROC is not defined"):
        auroc_statistic(task.answers, np.zeros((2, 8, 4)), folds=number)
    with pytest.raises(TaskError, match=r"'grade': 5 folds .* the same class .*fewer folds"):
        check_repeats([task], plans)


def unanswered(splits: str) -> list:
    """Rows without an answer in these splits."""
    found = rows()
    return [row(i, label=None if r.split in splits else r.label) for i, r in enumerate(found)]


def test_validation_recordings_without_an_answer_stop_the_probe_that_chooses_by_them():
    found = unanswered("valid")
    asked = Options(("label",), settings=Settings(("linear", "opera"), per_class=0))
    with pytest.raises(TaskError, match=r"task 'label': no validation .* the probe opera chooses"):
        Suite.of(found, asked, "toy")
    Suite.of(rows(), asked, "toy")


def test_validation_recordings_without_an_answer_stop_no_other_probe():
    settings = Settings(("linear", "knn"), per_class=0)
    suite = Suite.of(unanswered("valid"), Options(("label",), settings=settings), "toy")
    x = np.random.default_rng(0).standard_normal((suite.count, 3))
    found = measure(suite.tasks, suite.plans, suite.subjects, [Stage("x", x)], settings)
    assert {(r.kind, r.n_test) for r in found.results} == {("linear", 40), ("knn", 40)}


def auroc_notes(task: Task, plans, stages: int = 2) -> dict[str, str]:
    """stage -> notes of its AUROC, of features that are noise."""
    rng = np.random.default_rng(0)
    made = [Stage(f"s{k}", rng.standard_normal((len(task.answers), 3))) for k in range(stages)]
    subjects = [f"p{i}" for i in range(len(task.answers))]
    found = measure([task], plans, subjects, made, PLAIN)
    assert not any("classes" in r.notes for r in found.results if r.metric != "auroc")
    return {r.stage: r.notes for r in found.results if r.metric == "auroc"}


def test_a_class_that_is_not_tested_is_told_beside_the_auroc():
    task = classes_of("abc" * 10 + "ab" * 10)
    fold = Fold("", np.arange(30), np.zeros(0, int), np.arange(30, 50))
    notes = auroc_notes(task, [[fold]])
    assert set(notes) == {"s0", "s1", "s1 minus s0"}
    told = "mean over 2 of 3 classes, without 'c' (in no test recording)"
    assert all(told in note for note in notes.values()), notes


def test_classes_that_not_all_folds_compare_are_told_with_how_many_do():
    task = classes_of("ab" * 12 + "cc" + "dd" + "dd")
    plan = folds_of([*range(8), 24], [*range(8, 16), 25], [*range(16, 24)], [26, 27], [28, 29],
                    count=30)  # fmt: skip
    (note,) = auroc_notes(task, [plan], 1).values()
    assert "mean over 3 of 4 classes, without 'd' (in no fold beside others)" in note
    assert "compared with other classes: 'a' in 3, 'b' in 3, 'c' in 2 of 5 folds" in note
    again = folds_of([*range(8), 24], [*range(8, 16), 25], [*range(16, 23)], [23, 26, 27], [28, 29],
                     count=30)  # fmt: skip
    (note,) = auroc_notes(task, [plan, again], 1).values()
    assert "without 'd' (not beside others in every repeat)" in note
    assert "'a' in 3, 'b' in 3 to 4, 'c' in 2 of 5 folds" in note


def test_classes_that_all_folds_compare_need_no_note():
    task = classes_of("abc" * 10)
    plan = folds_of(list(range(15)), list(range(15, 30)), count=30)
    assert not any("classes" in note for note in auroc_notes(task, [plan]).values())
