import numpy as np
import pytest

from medalign_jax.search.judge import Judge, JudgeError

NAMES = ("crackle", "none", "wheeze")


def drawn(rng, subjects, noise=1.0, each=2):
    """Subjects of three classes, `each` recordings that share most of what they are."""
    labels = rng.integers(0, 3, subjects)
    middles = np.eye(3, 8)[labels] * 2.5 + rng.standard_normal((subjects, 8)) * noise
    x = np.repeat(middles, each, axis=0) + 0.3 * rng.standard_normal((subjects * each, 8))
    names = [NAMES[c] for c in np.repeat(labels, each)]
    return x, names, list(np.repeat(np.arange(subjects), each))


def test_true_labels_are_among_those_named_for_nine_subjects_in_ten():
    rng = np.random.default_rng(0)
    covered, sizes = [], []
    for _ in range(25):
        judge = Judge.fit(*drawn(rng, 60))
        x, labels, _ = drawn(rng, 100, each=1)
        said = judge(x)
        covered.append(
            np.mean([label in j.possible for label, j in zip(labels, said, strict=True)])
        )
        sizes.append(np.mean([len(j.possible) for j in said]))
    assert np.mean(covered) == pytest.approx(0.9, abs=0.03)
    assert 1 < np.mean(sizes) < 1.6, "naming everything would be no answer"


def test_probabilities_say_how_often_they_are_right():
    rng = np.random.default_rng(1)
    # Half of the labels of training are drawn at random: a probe that is sure would be wrong.
    x, labels, subjects = drawn(rng, 300, noise=0.2)
    labels = [rng.choice(NAMES) if i % 2 else label for i, label in enumerate(labels)]
    judge = Judge.fit(x, labels, subjects)
    x, truth, _ = drawn(rng, 300, noise=0.2)
    truth = [rng.choice(NAMES) if i % 2 else label for i, label in enumerate(truth)]
    said = judge(x)
    first = np.array([next(iter(j.probabilities.values())) for j in said])
    right = np.array([next(iter(j.probabilities)) == t for j, t in zip(said, truth, strict=True)])
    assert first.mean() == pytest.approx(right.mean(), abs=0.05)
    assert judge.accuracy == pytest.approx(2 / 3, abs=0.06)


def test_what_lies_between_classes_is_to_be_looked_at():
    rng = np.random.default_rng(2)
    judge = Judge.fit(*drawn(rng, 120, noise=0.4))
    clear, between = np.eye(3, 8)[0] * 2.5, np.eye(3, 8)[:2].mean(axis=0) * 2.5
    sure, unsure = judge(np.stack([clear, between]))
    assert not sure.unsure and sure.possible == ("crackle",)
    assert unsure.unsure and set(unsure.possible) != {"wheeze"}
    assert sum(sure.probabilities.values()) == pytest.approx(1)
    assert list(sure.probabilities.values()) == sorted(sure.probabilities.values(), reverse=True)


def test_labels_that_nothing_can_be_learnt_from_are_refused():
    x = np.random.default_rng(0).standard_normal((8, 4))
    with pytest.raises(JudgeError, match="1 class"):
        Judge.fit(x, ["a"] * 4 + [""] * 4, list(range(8)))
    with pytest.raises(JudgeError, match="'b' is of one subject only"):
        Judge.fit(x, ["a"] * 6 + ["b"] * 2, [0, 1, 2, 3, 4, 5, 6, 6])


def test_few_labels_exclude_nothing():
    rng = np.random.default_rng(3)
    labels = ["crackle", "none", "wheeze"] * 2
    x = rng.standard_normal((6, 4))
    judge = Judge.fit(x, labels, range(6))
    assert not judge.least.any() and all(len(j.possible) == len(judge.classes) for j in judge(x))


def test_a_rare_class_is_excluded_no_more_often_than_a_common_one():
    rng = np.random.default_rng(4)
    rare, common = [], []
    for few in (4, 12):
        for _ in range(12):
            labels = np.repeat(["common", "rare"], [40, few])
            middles = np.where(labels == "rare", 1.2, 0.0)[:, None] * np.eye(1, 8)
            x = middles + rng.standard_normal((40 + few, 8))
            judge = Judge.fit(x, labels.tolist(), range(len(labels)))
            said = judge(np.eye(1, 8) * 1.2 + rng.standard_normal((200, 8)))
            rare.append(np.mean(["rare" in each.possible for each in said]))
            said = judge(rng.standard_normal((200, 8)))
            common.append(np.mean(["common" in each.possible for each in said]))
        if few == 4:
            assert rare == [1.0] * 12, "four subjects exclude nothing"
            rare.clear()
    assert np.mean(rare) > 0.87 and np.mean(common) > 0.87


def test_what_is_like_nothing_labelled_is_said_to_be():
    rng = np.random.default_rng(5)
    judge = Judge.fit(*drawn(rng, 120, noise=0.4))
    x, _, _ = drawn(rng, 200, noise=0.4, each=1)
    assert np.mean([each.unlike for each in judge(x)]) < 0.12
    (far,) = judge(-5.0 * np.eye(3, 8).sum(axis=0, keepdims=True))
    assert far.unlike and far.unsure
