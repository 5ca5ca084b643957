import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from medalign_jax.evaluate import statistics as st


def sample(n=149, classes=4, draws=1, signal=1.0, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    logits = rng.standard_normal((draws, n, classes)) + signal * np.eye(classes)[labels]
    scores = np.exp(logits)
    return labels, scores / scores.sum(-1, keepdims=True)


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("decimals", [None, 1])
def test_auroc_equals_sklearn_with_and_without_ties(classes, decimals):
    labels, scores = sample(classes=classes)
    scores = scores[0]
    if decimals is not None:
        scores = np.round(scores, decimals)
        assert len(np.unique(scores)) < len(scores)
    if classes == 2:
        expected = roc_auc_score(labels, scores[:, 1])
    else:
        one_hot = np.eye(classes)[labels]
        expected = roc_auc_score(one_hot, scores, average="macro")
    ours = st.auroc(labels, scores)
    assert ours.value == pytest.approx(expected, abs=1e-12)
    assert ours.undefined == ()
    statistic = st.auroc_statistic(labels, scores)
    assert statistic(np.ones((1, len(labels))))[0, 0] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("classes", [2, 4])
def test_weighted_auroc_equals_sklearn_on_repeated_recordings(classes):
    labels, scores = sample(n=40, classes=classes, draws=3)
    scores = np.round(scores, 1)
    counts = np.random.default_rng(1).integers(0, 4, (5, 40))
    values = st.auroc_statistic(labels, scores)(counts)
    assert values.shape == (5, 3)
    for b, count in enumerate(counts):
        rows = np.repeat(np.arange(40), count)
        for d in range(3):
            target = labels[rows] if classes == 2 else np.eye(classes)[labels[rows]]
            score = scores[d, rows, 1] if classes == 2 else scores[d, rows]
            assert values[b, d] == pytest.approx(roc_auc_score(target, score), abs=1e-12)


def test_pairs_within_folds_by_hand():
    """Fold 0: one pair, won; fold 1: two pairs, one lost, one tied; across folds none count."""
    labels = np.array([0, 1, 0, 1, 1, 0])
    score = np.array([0.1, 0.2, 5.0, 4.0, 5.0, 9.0])
    folds = np.array([0, 0, 1, 1, 1, 2])
    statistic = st.auroc_statistic(labels, np.stack([-score, score], 1), folds=folds)
    assert statistic(np.ones((1, 6)))[0, 0] == pytest.approx(1.5 / 3)
    assert statistic(np.array([[2.0, 1, 1, 1, 1, 1]]))[0, 0] == pytest.approx(2.5 / 4)
    pooled = st.auroc_statistic(labels, np.stack([-score, score], 1))
    assert pooled(np.ones((1, 6)))[0, 0] == pytest.approx(3.5 / 9)


def test_columns_have_folds_of_their_own():
    labels, scores = sample(n=40, draws=2)
    folds = np.stack([np.arange(40) % 2, np.arange(40) // 20])
    both = st.auroc_statistic(labels, scores, folds=folds)(np.ones((1, 40)))[0]
    for d in range(2):
        alone = st.auroc_statistic(labels, scores[d], folds=folds[d])(np.ones((1, 40)))[0]
        assert both[d] == pytest.approx(alone[0])
    assert both[0] != pytest.approx(st.auroc_statistic(labels, scores[0])(np.ones((1, 40)))[0, 0])


def test_folds_without_pairs_or_of_another_shape_are_refused():
    labels, scores = np.array([0, 0, 1, 1]), np.eye(2)[[0, 0, 1, 1]]
    with pytest.raises(st.StatisticsError, match="in no fold"):
        st.auroc_statistic(labels, scores, folds=labels)
    with pytest.raises(st.StatisticsError, match="do not go with"):
        st.auroc_statistic(labels, scores, folds=np.zeros(3))


def test_class_absent_from_the_test_sample_is_left_out_and_named():
    labels, scores = sample(classes=4)
    labels = np.where(labels == 2, 1, labels)
    ours = st.auroc(labels, scores[0])
    assert ours.undefined == (2,)
    assert np.isnan(ours.per_class[2])
    kept = [0, 1, 3]
    expected = np.mean([roc_auc_score(labels == c, scores[0, :, c]) for c in kept])
    assert ours.value == pytest.approx(expected, abs=1e-12)
    assert st.auroc_statistic(labels, scores)(np.ones((1, 149)))[0, 0] == pytest.approx(expected)


def test_one_class_only_is_refused():
    with pytest.raises(st.StatisticsError, match="all recordings of the sample are of one class"):
        st.auroc_statistic(np.zeros(5, int), np.random.rand(5, 2))


def test_bad_scores_are_refused():
    labels, scores = sample(n=8, classes=2)
    with pytest.raises(st.StatisticsError, match="recording 3 is not finite"):
        st.auroc(labels, np.where(np.arange(8)[:, None] == 3, np.nan, scores[0]))
    with pytest.raises(st.StatisticsError, match="go with labels"):
        st.auroc(labels[:5], scores[0])
    with pytest.raises(st.StatisticsError, match=r"classes 0\.\.1"):
        st.auroc(labels + 1, scores[0])


def test_simple_scores():
    labels, predicted = np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1])
    assert st.accuracy(labels, predicted) == 0.75
    assert st.unweighted_accuracy(labels, predicted) == pytest.approx(
        balanced_accuracy_score(labels, predicted)
    )
    assert st.mae(np.array([1.0, 2.0]), np.array([2.0, 0.0])) == 1.5


def test_classes_of_equal_scores_share_a_hit():
    """By the first of equals a probe that says nothing would know all of the first class."""
    scores = np.array([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5], [1 / 3, 1 / 3, 1 / 3]])
    assert st.hits(np.array([0, 0, 2]), scores).tolist() == pytest.approx([1 / 2, 0, 1 / 3])
    assert st.hits(np.array([1, 2, 0]), scores).tolist() == pytest.approx([1 / 2, 1, 1 / 3])
    draws = st.hits(np.array([0, 0, 2]), np.stack([scores, scores[::-1]]))
    assert draws.tolist() == [pytest.approx([1 / 2, 0, 1 / 3]), pytest.approx([1 / 3, 0, 0])]
