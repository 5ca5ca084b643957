"""Tasks out of label columns, folds by subject, and all that can be wrong with them."""

import numpy as np
import pytest

from medalign_jax.evaluate.folds import check_folds, fold_of_splits, folds_by_subject
from medalign_jax.evaluate.stages import Settings
from medalign_jax.evaluate.suite import Options, Suite
from medalign_jax.evaluate.tasks import TaskError, columns_of, tasks_of
from tests.evaluate.evaluation_rows import row, rows


def test_kinds_follow_from_the_values():
    found = rows(
        AS=lambda i: i % 2, age=lambda i: 30 + i % 7, device=lambda i: ["x", "y", "z"][i % 3],
        some=lambda i: "" if i % 4 else i,
    )  # fmt: skip
    tasks = {t.name: t for t in tasks_of(found, ["label", "AS", "age", "device", "some"], "toy")}
    assert {name: t.kind for name, t in tasks.items()} == {
        "label": "classification", "AS": "classification", "age": "regression",
        "device": "classification", "some": "regression",
    }  # fmt: skip
    assert tasks["AS"].classes == ("0", "1") and tasks["AS"].answers[:4].tolist() == [0, 1, 0, 1]
    assert tasks["age"].answers[:3].tolist() == [30, 31, 32]
    assert tasks["some"].known.tolist() == [i % 4 == 0 for i in range(120)]


def test_numbers_can_be_classes_and_sort_as_numbers():
    (task,) = tasks_of(rows(g=lambda i: [10, 9, 1][i % 3]), ["g:classification"], "toy")
    assert task.classes == ("1", "9", "10")
    assert task.answers[:3].tolist() == [2, 1, 0]


def test_several_labels_in_a_cell_are_a_task_each():
    cells = ["wheeze; crackles", "none", "", "crackles"]
    tasks = tasks_of(rows(f=lambda i: cells[i % 4]), ["f:labels"], "toy")
    assert [t.name for t in tasks] == ["f: crackles", "f: wheeze"]
    crackles, wheeze = tasks
    assert crackles.classes == ("no", "yes")
    assert crackles.answers[:4].tolist() == [1, 0, -1, 1]
    assert wheeze.answers[:4].tolist() == [1, 0, -1, 0]


def test_none_is_a_class_in_words_and_no_answer_where_python_wrote_it():
    """It is the usual name of the healthy class: none, fine and coarse crackles."""
    found = rows(f=lambda i: ["x", "y", "none"][i % 3], p=lambda i: ["x", "y", "None"][i % 3])
    spoken, written = tasks_of(found, ["f", "p"], "toy")
    assert spoken.classes == ("none", "x", "y") and spoken.answers[:3].tolist() == [1, 2, 0]
    assert written.classes == ("x", "y") and written.answers[:3].tolist() == [0, 1, -1]


def test_none_is_not_a_number():
    (task,) = tasks_of(rows(n=lambda i: [3, 4, 5, "none"][i % 4]), ["n"], "toy")
    assert task.kind == "regression" and task.description.endswith("30 without an answer")


@pytest.mark.parametrize("name", ["f", "f:labels"])
def test_two_spellings_of_a_label_are_refused(name):
    found = rows(f=lambda i: ["Fine_crackle", "fine crackle", "wheeze"][i % 3])
    told = r"'Fine_crackle' \(\d+ rows\) and 'fine crackle' .* one name"
    with pytest.raises(TaskError, match=told):
        tasks_of(found, [name], "toy")


@pytest.mark.parametrize("other", ["Wheeze", "wheeze\u200b", "\uff57heeze"])
def test_spellings_that_look_alike_are_refused(other):
    found = rows(f=lambda i: ["wheeze", "none", other][i % 3])
    with pytest.raises(TaskError, match="differ in spelling only"):
        tasks_of(found, ["f"], "toy")


@pytest.mark.parametrize("ages", [("36,6", "37,2", "38,5"), ("36", "37,2", ""), ("900", "1,100")])
def test_numbers_with_commas_are_not_classes(ages):
    """As words they would be classes, and a column that baselines read would say nothing."""
    found = rows(f=lambda i: "xy"[i % 2], age=lambda i: ages[i % len(ages)])
    for names in (["age"], ["age:regression"], ["f"]):
        with pytest.raises(TaskError, match=r"column 'age': row \d+ .* with a point, as 36\.6"):
            tasks_of(found, names, "toy")
    assert tasks_of(found, ["age:classification"], "toy")[0].kind == "classification"
    found = rows(f=lambda i: "xy"[i % 2], site=lambda i: ["1,2", "3"][i % 2], g=lambda i: "a,b")
    assert len(tasks_of(found, ["f"], "toy")) == 1  # a list of codes, and no numbers


def test_a_word_among_many_numbers_is_refused_with_its_row():
    found = rows(age=lambda i: "45y" if i == 7 else 20 + i % 30)
    with pytest.raises(TaskError, match=rf"row {found[7].row} .* says '45y'.*age:classification"):
        tasks_of(found, ["age"], "toy")
    (task,) = tasks_of(found, ["age:classification"], "toy")
    assert len(task.classes) == 31


def test_labels_may_be_apart_by_commas():
    tasks = tasks_of(rows(f=lambda i: ["a, b", "b;c", "none"][i % 3]), ["f:labels"], "toy")
    assert [task.name for task in tasks] == ["f: a", "f: b", "f: c"]


def test_what_became_of_the_cells_is_told():
    found = rows(f=lambda i: ["x", "y", "none", ""][i % 4], age=lambda i: 20 + i % 3)
    classes, numbers = tasks_of(found, ["f", "age"], "toy")
    assert classes.description == "task 'f': 30 x 'none', 30 x 'x', 30 x 'y'; 30 without an answer"
    assert numbers.description == "task 'age': numbers from 20 to 22"


def test_columns_are_what_a_manifest_has_to_keep():
    assert columns_of(["label", "age:regression", "f:labels", "age"]) == ("age", "f")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("height", "no recording has a value in column 'height'"),
        ("agee", "did you mean 'age'"),
        ("age:number", "unknown kind 'number'"),
        ("same", "every recording is 'x'"),
        ("name", "120 classes for 120 recordings.*'name:regression'"),
        ("device:regression", r"row 1 \('0.wav'\) says 'x'"),
        ("flat:regression", "every recording has 3"),
        ("same:labels", "every recording that has labels has this one"),
    ],
)
def test_a_task_that_cannot_be_asked_is_refused(name, message):
    found = rows(
        age=lambda i: i % 9, same=lambda i: "x", name=lambda i: f"n{i}",
        device=lambda i: "xy"[i % 2], flat=lambda i: 3,
    )  # fmt: skip
    with pytest.raises(TaskError, match=message):
        tasks_of(found, [name], "toy")


def test_a_task_named_twice_is_refused():
    with pytest.raises(TaskError, match="'label' is named twice"):
        tasks_of(rows(), ["label", "label"], "toy")


def test_the_fold_of_the_splits():
    fold = fold_of_splits(rows())
    assert [len(fold.train), len(fold.valid), len(fold.test)] == [60, 20, 40]
    with pytest.raises(TaskError, match=r"'test'.*--folds"):
        fold_of_splits([r for r in rows() if r.split != "test"])


def test_folds_keep_subjects_apart_and_classes_even():
    found = rows(240, rare=lambda i: int(i // 2 % 10 == 0))
    tasks = tasks_of(found, ["label", "rare"], "toy")
    subjects = [r.subject_id for r in found]
    folds = folds_by_subject(subjects, tasks, 5, seed=3)
    tested = np.concatenate([fold.test for fold in folds])
    assert sorted(tested) == list(range(240))
    for fold in folds:
        assert not {subjects[i] for i in fold.test} & {subjects[i] for i in fold.train}
        assert len(fold.train) + len(fold.test) == 240
        # 12 subjects with the rare label and 60 of each class, dealt to five folds.
        assert tasks[1].answers[fold.test].sum() / 2 in (2, 3)
        assert abs(tasks[0].answers[fold.test].sum() / 2 - 12) <= 1


def test_one_model_per_fold_chooses_on_what_the_next_fold_tests():
    found = rows(120)
    settings = Settings(per_class=2)
    options = Options(("label",), folds=5, aggregate="subject", settings=settings)
    suite = Suite.of(found, options, "toy", validation=True)
    folds = suite.training_folds()
    for fold, following in zip(folds, [*folds[1:], folds[0]], strict=True):
        assert fold.valid.tolist() == following.test.tolist()
        assert sorted([*fold.train, *fold.valid, *fold.test]) == list(range(120))
    assert len(suite.plans[0][0].train) == 48 and not len(suite.plans[0][0].valid)
    with pytest.raises(TaskError, match="3 folds or more"):
        Suite.of(found, Options(("label",), folds=2, settings=settings), "toy", validation=True)


def test_folds_are_the_same_for_the_same_seed():
    found = rows(80)
    args = [r.subject_id for r in found], tasks_of(found, ["label"], "t"), 4

    def tests(seed):
        return [fold.test.tolist() for fold in folds_by_subject(*args, seed=seed)]

    assert tests(1) == tests(1) != tests(2)


def test_more_folds_than_subjects_are_refused():
    with pytest.raises(TaskError, match="9 folds of 4 subjects"):
        folds_by_subject(["a", "b", "c", "d"], [], 9)


def _single(count, label_of, split_of):
    return [row(i, label=label_of(i), split=split_of(i), subject_id=f"s{i}") for i in range(count)]


def test_one_class_in_the_test_part_is_refused():
    found = _single(
        20, lambda i: "a" if i >= 10 else "ab"[i % 2], lambda i: ["train", "test"][i // 10]
    )
    with pytest.raises(TaskError, match="every test recording is 'a'"):
        check_folds(tasks_of(found, ["label"], "t"), [fold_of_splits(found)])


def test_a_number_that_does_not_vary_where_it_is_tested_is_refused():
    found = rows(age=lambda i: 30 + i % 7)
    (task,) = tasks_of(found, ["age"], "toy")
    fold = fold_of_splits(found)
    check_folds([task], [fold])
    task.answers[fold.test] = 41.0
    with pytest.raises(TaskError, match="'age': every test recording has 41: there is no variance"):
        check_folds([task], [fold])


def test_a_class_that_training_lacks_is_refused():
    found = _single(
        20, lambda i: "c" if i == 15 else "ab"[i % 2], lambda i: ["train", "test"][i // 10]
    )
    with pytest.raises(TaskError, match="no training recording is 'c'"):
        check_folds(tasks_of(found, ["label"], "t"), [fold_of_splits(found)])


def test_too_few_labels_to_draw_are_told_with_their_class():
    found = _single(24, lambda i: "b" if i % 4 == 0 else "a", lambda i: ["train", "test"][i // 12])
    with pytest.raises(TaskError, match=r"5 labels of each class.*3 of 'b'"):
        check_folds(tasks_of(found, ["label"], "t"), [fold_of_splits(found)], per_class=5)


def test_a_subject_becomes_one_row():
    found = rows(120, age=lambda i: 40 + i // 2)
    options = Options(("label", "age"), aggregate="subject", settings=Settings(per_class=2))
    suite = Suite.of(found, options, "toy")
    assert len(suite.subjects) == 60 and suite.count == 120
    assert suite.tasks[1].answers[:3].tolist() == [40, 41, 42]
    features = np.arange(240.0).reshape(120, 2)
    assert suite.gather(features)[1].tolist() == [5.0, 6.0]
    (over,) = suite.training_folds()
    assert over.test.tolist() == [i for i, r in enumerate(found) if r.split == "test"]


def test_recordings_of_one_subject_that_disagree_are_named():
    found = rows(120, site=lambda i: "xy"[i % 2])
    with pytest.raises(TaskError, match="recordings of 's0' have 'x' and 'y'"):
        Suite.of(found, Options(("site",), aggregate="subject"), "toy")


def test_options_that_make_no_sense_are_refused():
    for fields, message in (
        ({"folds": 1}, "2 or more folds"),
        ({"repeats": 2}, "ask for folds too"),
        ({"aggregate": "patient"}, "recording, subject"),
    ):
        with pytest.raises(TaskError, match=message):
            Options(**fields)
