import jax
import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from medalign_jax.evaluate import probes
from medalign_jax.evaluate import statistics as st
from medalign_jax.evaluate.intervals import interval
from medalign_jax.evaluate.probes import ProbeConfig, ProbeError
from medalign_jax.evaluate.probes.opera_training import macro_auroc


def blobs(n, width=12, classes=3, distance=3.0, seed=0, labels=None):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes if labels is None else labels
    centres = distance * np.eye(classes, width)
    return (centres[labels] + rng.standard_normal((n, width))).astype(np.float32), labels


def torch_probe(x, y, valid, test_x, seed, config, outputs, target=None):
    """The protocol step by step, on the initial weights and orders of the JAX probe."""
    init_key, shuffle_key = jax.random.split(jax.random.key(seed))
    layer = torch.nn.Linear(x.shape[1], outputs)
    kernel = config.init_std * jax.random.normal(init_key, (x.shape[1], outputs))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(np.array(kernel).T))
        layer.bias.zero_()
    optimizer = torch.optim.Adam(layer.parameters(), lr=config.learning_rate)
    best, best_epoch, saved = -np.inf, None, None

    def predict(features):
        out = layer(torch.tensor(features))
        return out if target is None else out[:, 0] * target[1] + target[0]

    for epoch in range(config.epochs):
        order = np.array(jax.random.permutation(jax.random.fold_in(shuffle_key, epoch), len(x)))
        for rows in np.split(order, range(config.batch_size, len(x), config.batch_size)):
            loss_of = torch.nn.CrossEntropyLoss() if target is None else torch.nn.MSELoss()
            loss = loss_of(predict(x[rows]), torch.tensor(y[rows]))
            loss = loss + config.l2 * sum(p.pow(2).sum() for p in layer.parameters())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(layer.parameters(), config.clip)
            optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] *= config.decay
        with torch.no_grad():
            out = predict(valid[0])
        if target is None:
            one_hot = np.eye(outputs)[valid[1]]
            score = roc_auc_score(one_hot, torch.softmax(out, 1).numpy())
        else:
            score = -np.abs(out.numpy() - valid[1]).mean()
        if score > best:
            best, best_epoch = score, epoch
            saved = {k: v.clone() for k, v in layer.state_dict().items()}
    layer.load_state_dict(saved)
    with torch.no_grad():
        out = predict(test_x)
        return (torch.softmax(out, 1) if target is None else out).numpy(), best_epoch, best


def test_classification_follows_the_protocol_of_pytorch():
    """Same numbers as a PyTorch loop: partial last batch, decay, clip, penalty, selection."""
    x, y = blobs(75, distance=1.0)
    valid, (test_x, _) = blobs(31, distance=1.0, seed=1), blobs(20, distance=1.0, seed=2)
    config = ProbeConfig(epochs=12, batch_size=32, learning_rate=3e-3, l2=1e-2, clip=0.3)
    ours = probes.classification_probe((x, y), valid, test_x, 3, seeds=[0, 7], config=config)
    for run, seed in enumerate((0, 7)):
        expected, epoch, score = torch_probe(x, y, valid, test_x, seed, config, 3)
        np.testing.assert_allclose(ours.probabilities[run], expected, atol=2e-6)
        assert ours.best_epoch[run] == epoch
        assert ours.valid_auroc[run] == pytest.approx(score, abs=1e-6)


def test_regression_follows_the_protocol_of_pytorch():
    x, _ = blobs(50)
    y = (20 + 5 * x[:, 0] + x[:, 1]).astype(np.float32)
    valid, test_x = (x[:11] + 0.1, y[:11]), x[20:30]
    config = ProbeConfig(epochs=10, batch_size=16, learning_rate=1e-2, l2=0.1)
    ours = probes.regression_probe((x, y), valid, test_x, seeds=[3], config=config)
    target = float(y.mean()), float(y.std())
    expected, epoch, score = torch_probe(x, y, valid, test_x, 3, config, 1, target)
    np.testing.assert_allclose(ours.predictions[0], expected, rtol=2e-6)
    assert ours.best_epoch[0] == epoch
    assert ours.valid_mae[0] == pytest.approx(-score, rel=1e-5)
    assert ours.mean_predictor[0] == pytest.approx(y.mean())


def test_published_defaults():
    config = ProbeConfig()
    assert (config.epochs, config.batch_size, config.learning_rate) == (64, 64, 1e-4)
    assert (config.decay, config.l2, config.clip, config.init_std) == (0.97, 1e-5, 1.0, 0.01)
    assert config.standardise is False
    assert probes.REGRESSION.l2 == 0.1


def test_separable_classes_are_found():
    train, valid, test = (blobs(90, distance=8.0, seed=s) for s in range(3))
    config = ProbeConfig(learning_rate=1e-2)
    scores = probes.classification_probe(train, valid, test[0], 3, config=config)
    assert scores.probabilities.shape == (5, 90, 3)
    np.testing.assert_allclose(scores.probabilities.sum(-1), 1, atol=1e-6)
    for probabilities in scores.probabilities:
        assert st.auroc(test[1], probabilities).value == 1


def test_random_labels_are_at_chance():
    rng = np.random.default_rng(0)
    sets = [blobs(120, seed=s)[0] for s in range(3)]
    labels = [rng.integers(0, 3, 120) for _ in range(3)]
    scores = probes.classification_probe(
        (sets[0], labels[0]), (sets[1], labels[1]), sets[2], 3
    ).probabilities
    found = interval(st.auroc_statistic(labels[2], scores), [None] * 120)
    assert found.low < 0.5 < found.high


def test_regression_beats_the_mean_predictor_where_there_is_signal():
    sets = [blobs(120, seed=s)[0] for s in range(3)]
    targets = [(15 + 4 * x[:, 0]).astype(np.float32) for x in sets]
    config = ProbeConfig(l2=1e-3, learning_rate=1e-2)
    scores = probes.regression_probe(
        (sets[0], targets[0]), (sets[1], targets[1]), sets[2], config=config
    )
    baseline = st.mae(targets[2], scores.mean_predictor[:, None])
    assert st.mae(targets[2], scores.predictions) < 0.3 * baseline


def test_draws_train_on_their_own_examples_only():
    """A draw equals a probe of those examples, whatever the other rows hold."""
    x, y = blobs(60)
    valid, test_x = blobs(30, seed=1), blobs(10, seed=2)[0]
    draws = probes.few_shot_draws(y, per_class=5, draws=3, seed=0)
    together = probes.classification_probe((x, y), valid, test_x, 3, draws=draws)
    one = probes.classification_probe((x[draws[2]], y[draws[2]]), valid, test_x, 3, seeds=[2])
    np.testing.assert_allclose(together.probabilities[2], one.probabilities[0], atol=1e-6)
    assert together.best_epoch[2] == one.best_epoch[0]
    spoilt = x.copy()
    spoilt[np.setdiff1d(np.arange(60), draws)] = 1e6
    again = probes.classification_probe((spoilt, y), valid, test_x, 3, draws=draws)
    np.testing.assert_allclose(again.probabilities, together.probabilities, atol=1e-6)


def test_selection_every_kth_epoch_and_without_validation():
    x, y = blobs(40)
    valid, test_x = blobs(30, distance=0.3, seed=1), blobs(10, seed=2)[0]
    config = ProbeConfig(epochs=20, select_every=5)
    scores = probes.classification_probe((x, y), valid, test_x, 3, config=config)
    assert set((scores.best_epoch + 1) % 5) == {0}
    last = probes.classification_probe((x, y), None, test_x, 3, config=ProbeConfig(epochs=7))
    assert set(last.best_epoch) == {6}
    assert np.isnan(last.valid_auroc).all()


def test_standardisation_makes_scale_and_offset_irrelevant():
    x, y = blobs(60)
    valid, test_x = blobs(30, seed=1), blobs(10, seed=2)[0]
    x, constant = np.c_[x, np.full(60, 3.0)], np.full((30, 1), 3.0)
    valid, test_x = (np.c_[valid[0], constant], valid[1]), np.c_[test_x, constant[:10]]
    config = ProbeConfig(epochs=5, standardise=True)
    a = probes.classification_probe((x, y), valid, test_x, 3, config=config)
    move = lambda z: 100 * z - 7  # noqa: E731
    moved = (move(valid[0]), valid[1])
    b = probes.classification_probe((move(x), y), moved, move(test_x), 3, config=config)
    np.testing.assert_allclose(a.probabilities, b.probabilities, atol=1e-4)


def test_seeds_change_the_runs_and_repeat():
    x, y = blobs(40)
    args = (x, y), blobs(20, seed=1), blobs(10, seed=2)[0], 3
    a = probes.classification_probe(*args, seeds=[0, 1])
    b = probes.classification_probe(*args, seeds=[0, 1])
    assert np.array_equal(a.probabilities, b.probabilities)
    assert not np.allclose(a.probabilities[0], a.probabilities[1], atol=1e-4)


@pytest.mark.parametrize("classes", [2, 4])
def test_device_auroc_equals_the_exact_one(classes):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, 80)
    scores = np.round(rng.random((80, classes)), 1).astype(np.float32)
    expected = st.auroc(labels, scores).value
    assert float(macro_auroc(labels, scores)) == pytest.approx(expected, abs=1e-6)


def test_few_shot_draws():
    labels = np.array([0] * 15 + [1] * 10 + [2] * 30)
    draws = probes.few_shot_draws(labels, 10, 6, seed=1)
    assert draws.shape == (6, 30)
    for row in draws:
        assert len(set(row.tolist())) == 30
        assert np.bincount(labels[row]).tolist() == [10, 10, 10]
    assert not np.array_equal(np.sort(draws[0]), np.sort(draws[1]))
    assert np.array_equal(draws[:4], probes.few_shot_draws(labels, 10, 4, seed=1))
    with pytest.raises(ProbeError, match=r"fewer \(class: examples\): \{1: 10\}"):
        probes.few_shot_draws(labels, 11, 2, seed=0)


def test_class_indices():
    names, (train, test) = probes.class_indices(["MR", "N", "MR"], ["N"])
    assert names == ("MR", "N")
    assert train.tolist() == [0, 1, 0]
    assert test.tolist() == [1]
    with pytest.raises(ProbeError, match=r"label set 1 .*'AS' \(first at 1\).*'MR', 'N'"):
        probes.class_indices(["MR", "N"], ["N", "AS"])
    with pytest.raises(ProbeError, match="no label"):
        probes.class_indices(["MR", None])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": (np.full((4, 2), np.nan), np.arange(4) % 2)}, "training embedding 0 is not"),
        ({"train": (np.ones((4, 2)), np.zeros(4, int))}, r"needs training examples of classes"),
        ({"valid": (np.ones((3, 2)), np.zeros(3, int))}, "all of one class"),
        ({"valid": (np.ones((3, 2)), np.array([0, 1, 5]))}, "go beyond"),
        ({"test_x": np.ones((3, 5))}, "5 wide"),
        ({"draws": np.array([[0, 9]])}, "indices below 4"),
        ({"draws": np.array([[0, 1]]), "seeds": [1, 2]}, "there are 1 draws and 2 seeds"),
    ],
)
def test_what_cannot_be_probed_is_refused(change, message):
    arguments = {
        "train": (np.ones((4, 2)), np.arange(4) % 2),
        "valid": None,
        "test_x": np.ones((3, 2)),
        "n_classes": 2,
    }
    with pytest.raises(ProbeError, match=message):
        probes.classification_probe(**(arguments | change))
