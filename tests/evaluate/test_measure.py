"""Stages side by side, on features whose quality is known."""

import dataclasses

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from medalign_jax.core.errors import UserError
from medalign_jax.evaluate.measure import _means, measure
from medalign_jax.evaluate.stages import Guess, Settings
from medalign_jax.evaluate.suite import Options, Suite
from tests.evaluate.evaluation_rows import rows

COUNT = 160


@pytest.fixture(scope="module")
def found():
    return rows(COUNT, AS=lambda i: i // 4 % 2, age=lambda i: 40 + i // 2 % 9)


def features(seed, *answers, strength=1.5):
    x = np.random.default_rng(seed).standard_normal((COUNT, 8)).astype(np.float32)
    for place, answer in enumerate(answers):
        x[:, place] += strength * answer
    return x


@pytest.fixture(scope="module")
def suite(found):
    options = Options(("label", "AS", "age"), folds=4, settings=Settings(per_class=6, draws=3))
    return Suite.of(found, options, "toy")


@pytest.fixture(scope="module")
def stages(suite):
    label, valve, age = (task.answers for task in suite.tasks)
    return [
        suite.stage("before", features(0)),
        suite.stage("after", features(1, label, valve, age / 5)),
        suite.stage("shuffled", features(2), role="control"),
        suite.stage("spectral statistics", features(3, 0.5 * label), role="baseline"),
    ]


@pytest.fixture(scope="module")
def measured(suite, stages):
    half = Guess("half", lambda task, fold: np.full((len(fold.test), 2), 0.5)
                 if task.classes else None)  # fmt: skip
    return measure(suite.tasks, suite.plans, suite.subjects, stages, suite.options.settings, [half])


def one(measured, **wanted):
    found = [r for r in measured.results if all(getattr(r, k) == v for k, v in wanted.items())]
    assert len(found) == 1, (wanted, [r.key for r in found])
    return found[0]


def test_the_better_stage_wins_with_its_paired_interval(measured):
    gain = one(measured, task="label", kind="linear", stage="after minus before", metric="auroc")
    found = (gain.value, gain.ci_low, gain.ci_high)  # widened, as four folds share training sets
    assert found == pytest.approx((0.255, 0.0765, 0.4116), abs=1e-3)
    assert "by Holm over 2 tasks" in gain.notes
    control = one(
        measured, task="label", kind="linear", stage="shuffled minus before", metric="auroc"
    )
    assert control.ci_low < 0 < control.ci_high


def test_values_are_those_of_the_pairs_of_each_fold(measured, suite):
    scores = measured.scores["label", "linear", "after"]
    assert scores.shape == (1, COUNT, 2) and np.isfinite(scores).all()
    assert measured.tested["label"].tolist() == list(range(COUNT))
    value = one(measured, task="label", kind="linear", stage="after", metric="auroc")
    wins, pairs = 0.0, 0
    for fold in suite.plans[0]:
        truth = suite.tasks[0].answers[fold.test]
        there = int(truth.sum() * (1 - truth).sum())
        wins += there * roc_auc_score(truth, scores[0, fold.test, 1])
        pairs += there
    expected = wins / pairs
    assert expected != pytest.approx(
        roc_auc_score(suite.tasks[0].answers, scores[0, :, 1]), abs=1e-4
    )
    assert value.value == pytest.approx(expected, abs=1e-12)
    assert (value.n_train, value.n_test) == (120, COUNT)
    right = (scores[0].argmax(1) == suite.tasks[0].answers).mean()
    hits = one(measured, task="label", kind="linear", stage="after", metric="accuracy")
    assert hits.value == pytest.approx(right)


def test_the_mean_over_tasks_stands_beside_them(measured):
    values = [
        one(measured, task=task, kind="linear", stage="after", metric="auroc").value
        for task in ("label", "AS", "mean of 2 tasks")
    ]
    assert values[2] == pytest.approx((values[0] + values[1]) / 2)
    gain = one(measured, task="mean of 2 tasks", kind="linear", stage="after minus before")
    assert gain.ci_low > 0.1 and gain.ci_high < 0.6


def test_regressions_are_errors_in_their_own_unit(measured, suite):
    predicted = measured.scores["age", "linear", "after"]
    value = one(measured, task="age", kind="linear", stage="after")
    assert value.metric == "mae"
    assert value.value == pytest.approx(np.abs(predicted[0] - suite.tasks[2].answers).mean())
    assert not [r for r in measured.results if r.task == "age" and r.kind == "linear_6_labels"]


def test_few_labels_are_drawn_anew_in_every_column(measured):
    few = one(measured, task="label", kind="linear_6_labels", stage="after", metric="auroc")
    assert (few.n_train, len(few.seeds)) == (12, 3)
    scores = measured.scores["label", "linear_6_labels", "after"]
    assert scores.shape == (3, COUNT, 2) and not np.allclose(scores[0], scores[1])


def test_baselines_are_beside_and_no_differences_are_taken_of_them(measured):
    half = one(measured, task="label", kind="linear", stage="half", metric="auroc")
    assert half.value == 0.5
    stages = {r.stage for r in measured.results}
    assert "after minus spectral statistics" in stages
    assert not {"spectral statistics minus before", "half minus before"} & stages
    assert "shuffled minus spectral statistics" not in stages


def test_scores_of_a_subjects_recordings_are_averaged(found):
    """Against the probe's own scores of recordings, by hand."""
    settings = Settings(per_class=0, probes=("linear", "knn"))
    options = Options(("label", "age"), folds=4, settings=settings, aggregate="scores")
    suite = Suite.of(found, options, "toy")
    assert len(suite.members) == COUNT
    stage = suite.stage("only", features(1, suite.tasks[0].answers, strength=0.7))
    arguments = (suite.tasks, suite.plans, suite.subjects, [stage], settings)
    single, whole = measure(*arguments), measure(*arguments, by_subject=True)
    subjects = np.asarray(suite.subjects)
    names = list(dict.fromkeys(suite.subjects))
    assert [suite.subjects[i] for i in whole.tested["label"]] == names
    for task, kind in (("label", "linear"), ("label", "knn"), ("age", "linear")):
        of_recordings = single.scores[task, kind, "only"][0]
        of_subjects = whole.scores[task, kind, "only"][0]
        for name, got in zip(names, of_subjects, strict=True):
            each = of_recordings[subjects == name]
            if task == "age":
                expected = each.mean()
            else:
                expected = np.exp(np.log(np.maximum(each, 1e-6)).mean(axis=0))
                expected = expected / expected.sum()
            np.testing.assert_allclose(got, expected, rtol=1e-12)
    result = one(whole, task="label", kind="linear", stage="only", metric="auroc")
    assert result.n_test == len(names)
    assert (
        result.value != one(single, task="label", kind="linear", stage="only", metric="auroc").value
    )


def test_answers_that_differ_within_a_subject_have_no_mean_score(found):
    mixed = [dataclasses.replace(row, label=f"{i % 2}") for i, row in enumerate(found)]
    with pytest.raises(UserError, match="not a matter of the subject"):
        Suite.of(mixed, Options(("label",), folds=4, aggregate="scores"), "toy")


@pytest.mark.parametrize(("subjects", "folds"), [(30, 5), (60, 10)])
def test_without_signal_folds_give_one_half(subjects, folds):
    """Scores of all folds in one pool give 0.44 to 0.45 here."""
    values, covered = [], 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        labels = rng.permutation(np.arange(subjects) % 2)
        listed = rows(subjects, label=lambda i, labels=labels: f"class {labels[i]}",
                      subject_id=lambda i: f"s{i}")  # fmt: skip
        options = Options(("label",), folds=folds, seed=seed, settings=Settings(per_class=0))
        suite = Suite.of(listed, options, "noise")
        stage = suite.stage("noise", rng.standard_normal((subjects, 32)).astype(np.float32))
        majority = Guess("majority", lambda task, fold: np.tile(
            np.bincount(task.answers[fold.train], minlength=2) / len(fold.train),
            (len(fold.test), 1)))  # fmt: skip
        measured = measure(
            suite.tasks, suite.plans, suite.subjects, [stage], options.settings, [majority]
        )
        result = one(measured, stage="noise", metric="auroc")
        values.append(result.value)
        covered += result.ci_low <= 0.5 <= result.ci_high
        assert one(measured, stage="majority", metric="auroc").value == 0.5
    assert abs(np.mean(values) - 0.5) < 3 * np.std(values, ddof=1) / 20**0.5
    assert covered >= 17


def test_a_mean_over_more_recordings_is_no_higher():
    """n times x over n is not x to the last bit, and an AUROC ranks by the last bit."""
    group = np.array([0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 3, 3])
    scores = np.array([0.1] * 3 + [0.1] * 5 + [0.2, 0.4, 0.4, 0.2])
    for scale in (1.0, 1e-9, 3e7):
        means = _means(scale * scores[None, :, None], group)[0, :, 0]
        assert means[0] == means[1] and means[2] == means[3]
        np.testing.assert_allclose(means, scale * np.array([0.1, 0.1, 0.3, 0.3]), rtol=1e-12)


def test_the_most_frequent_class_ranks_nobody(found):
    """Subjects of unequal numbers of recordings."""
    fewer = [r for i, r in enumerate(found) if i % 5]
    options = Options(("label",), folds=4, settings=Settings(per_class=0), aggregate="scores")
    suite = Suite.of(fewer, options, "toy")
    assert len(set(np.unique(suite.subjects, return_counts=True)[1])) > 1
    stage = suite.stage("only", features(1)[: len(fewer)])
    share = Guess("share", lambda task, fold: np.tile([0.3, 0.7], (len(fold.test), 1)))
    arguments = (suite.tasks, suite.plans, suite.subjects, [stage], options.settings)
    result = measure(*arguments, [share], by_subject=True)
    assert one(result, task="label", stage="share", metric="auroc").value == 0.5


def test_repeats_of_folds_are_columns_of_one_score(found):
    options = Options(("label",), folds=3, repeats=2, settings=Settings(per_class=0))
    suite = Suite.of(found, options, "toy")
    stage = suite.stage("only", features(1, suite.tasks[0].answers))
    measured = measure(suite.tasks, suite.plans, suite.subjects, [stage], options.settings)
    scores = measured.scores["label", "linear", "only"]
    assert scores.shape == (2, COUNT, 2) and not np.allclose(scores[0], scores[1])


def test_one_model_per_fold_is_probed_on_its_own_features(found):
    """The second fold's model turns all signs: the predictions agree all the same."""
    suite = Suite.of(found, Options(("label",), folds=2, settings=Settings(per_class=0)), "toy")
    x = features(1, 3.0 * suite.tasks[0].answers)
    stages = [suite.stage("one", x), suite.stage("two", [x, -x])]
    measured = measure(suite.tasks, suite.plans, suite.subjects, stages, Settings(per_class=0))
    one_score, two_score = (measured.scores["label", "linear", s] for s in ("one", "two"))
    np.testing.assert_allclose(one_score, two_score, atol=1e-4)


def test_models_that_do_not_fit_the_folds_are_refused(suite, stages):
    with pytest.raises(UserError, match="3 models for 4 folds"):
        bad = suite.stage("bad", [features(0)] * 3)
        measure(suite.tasks, suite.plans, suite.subjects, [bad], Settings())
    with pytest.raises(UserError, match="features of shape"):
        bad = type(stages[0])("bad", features(0)[:-1])
        measure(suite.tasks, suite.plans, suite.subjects, [bad], Settings())


def test_unknown_probes_are_named():
    with pytest.raises(UserError, match="'svm'; there are linear"):
        Settings(probes=("svm",))


def test_identical_predictions_differ_by_nothing(suite, stages):
    """Also of the mean over tasks, and whatever an interval over subjects would leave open."""
    before, after, _, plain = stages
    same = dataclasses.replace(before, name="the same")
    listed = [before, after, same, dataclasses.replace(plain, features=before.features)]
    found = measure(suite.tasks, suite.plans, suite.subjects, listed, suite.options.settings)
    pairs = ("the same minus before", "the same minus spectral statistics")
    nothing = [r for r in found.results if r.stage in pairs]
    # AUROC and accuracy of two tasks, an error, a mean; with few labels two AUROC and their mean.
    assert len(nothing) == len(pairs) * (2 * 2 + 1 + 1 + 3)
    assert {(r.value, r.ci_low, r.ci_high) for r in nothing} == {(0.0, 0.0, 0.0)}
    assert all("the predictions are identical; p 1" in r.notes for r in nothing)
    gain = one(found, task="label", kind="linear", stage="after minus before", metric="auroc")
    assert (gain.ci_low, gain.ci_high) == pytest.approx((0.0765, 0.4116), abs=1e-3)
    assert "identical" not in gain.notes
