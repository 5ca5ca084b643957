"""Linear probes on frozen embeddings, after the published protocol of the OPERA benchmark.

Source: OPERA (Zhang et al., 2024), `src/model/models_eval.py` and `src/benchmark/` of the
official repository: one linear layer, weights N(0, 0.01), bias 0; Adam at 1e-4, times 0.97 after
every epoch; l2 times the sum of squares of weight and bias added to the loss; gradient norm
clipped at 1; no standardisation of the features; the epoch with the best validation score
(the first, when several are equal) is the one that is tested.

All runs of a probe (seeds, or few-shot draws) train together (`opera_training.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from medalign_jax.evaluate.probes.opera_training import ProbeConfig
from medalign_jax.evaluate.probes.opera_training import train as _train
from medalign_jax.evaluate.probes.problem import ProbeError

Pair = tuple[np.ndarray, np.ndarray]


REGRESSION = ProbeConfig(l2=0.1)


@dataclasses.dataclass(frozen=True)
class ProbeScores:
    """Test outputs of the R runs of a classification probe.

    Attributes:
      probabilities: (R, n_test, C) float32.
      best_epoch: (R,) the selected epoch, counted from 0.
      valid_auroc: (R,) its validation AUROC; NaN without a validation set.
    """

    probabilities: np.ndarray
    best_epoch: np.ndarray
    valid_auroc: np.ndarray


@dataclasses.dataclass(frozen=True)
class RegressionScores:
    """Test outputs of the R runs of a regression probe.

    Attributes:
      predictions: (R, n_test) in the target's unit.
      mean_predictor: (R,) mean target of the examples that each run trained on: the prediction
        to be beaten, whatever the recording.
      best_epoch: (R,) the selected epoch, counted from 0.
      valid_mae: (R,) its validation MAE; NaN without a validation set.
    """

    predictions: np.ndarray
    mean_predictor: np.ndarray
    best_epoch: np.ndarray
    valid_mae: np.ndarray


def class_indices(
    train_labels: Sequence, *others: Sequence
) -> tuple[tuple, tuple[np.ndarray, ...]]:
    """Numbers the classes in sorted order, as the training labels have them.

    Returns:
      The class names, and one int32 array for `train_labels` and each of `others`.

    Raises:
      ProbeError: a label of `others` that no training example has, by name and place.
    """
    if any(label is None or label == "" for labels in (train_labels, *others) for label in labels):
        raise ProbeError("some recordings have no label; leave them out of the probe first")
    names = tuple(sorted(set(train_labels)))
    number = {name: i for i, name in enumerate(names)}
    encoded = []
    for k, labels in enumerate((train_labels, *others)):
        unknown = {
            label: i for i, label in reversed(list(enumerate(labels))) if label not in number
        }
        if unknown:
            found = ", ".join(f"{label!r} (first at {i})" for label, i in sorted(unknown.items()))
            raise ProbeError(
                f"label set {k} has labels that no training example has: {found}; "
                f"the training classes are {', '.join(map(repr, names))}"
            )
        encoded.append(np.array([number[label] for label in labels], np.int32))
    return names, tuple(encoded)


def few_shot_draws(labels: np.ndarray, per_class: int, draws: int, seed: int) -> np.ndarray:
    """Draws of the same number of training examples from each class, without replacement.

    Args:
      labels: (n,) integer classes.
      per_class: examples per class in each draw.
      draws: number of draws, D.
      seed: same seed, same draws; a longer list starts with the shorter one.

    Returns:
      (D, per_class * C) int32 indices into `labels`.

    Raises:
      ProbeError: a class has fewer than `per_class` examples.
    """
    labels = np.asarray(labels)
    members = {int(c): np.flatnonzero(labels == c) for c in np.unique(labels)}
    small = {c: len(m) for c, m in members.items() if len(m) < per_class}
    if small or per_class < 1 or draws < 1 or not members:
        raise ProbeError(
            f"cannot draw {per_class} examples per class {draws} times from {len(labels)} examples"
            + (f": classes with fewer (class: examples): {small}" if small else "")
        )
    rows = []
    for d in range(draws):
        rng = np.random.default_rng([seed, d])
        rows.append(np.concatenate([rng.choice(m, per_class, False) for m in members.values()]))
    return np.stack(rows).astype(np.int32)


def classification_probe(
    train: Pair,
    valid: Pair | None,
    test_x: np.ndarray,
    n_classes: int,
    *,
    draws: np.ndarray | None = None,
    seeds: Sequence[int] | None = None,
    config: ProbeConfig | None = None,
) -> ProbeScores:
    """Trains linear classifiers with softmax cross-entropy and gives their test probabilities.

    Args:
      train: (n, D) embeddings and (n,) integer classes.
      valid: the same for the selection of the epoch by macro one-vs-rest AUROC. None selects
        the last epoch.
      test_x: (m, D) embeddings.
      n_classes: number of classes, C.
      draws: (R, k) training indices of each run, as from `few_shot_draws`; None trains every
        run on all examples.
      seeds: (R,) seeds of initial weights and shuffling; by default 0..4, or one per draw.
      config: the protocol, published values by default.

    Raises:
      ProbeError: shapes disagree, an embedding is not finite, a class lacks in training or is
        known in validation only, or draws and seeds differ in number.
    """
    config = ProbeConfig() if config is None else config
    train_x, train_y = _check_pair(train, "training", np.int32)
    present = set(np.unique(train_y).tolist())
    if n_classes < 2 or present != set(range(n_classes)):
        raise ProbeError(
            f"a probe of {n_classes} classes needs training examples of classes "
            f"0..{n_classes - 1}; there are {sorted(present)}"
        )
    valid_x, valid_y = _check_valid(valid, train_x, np.int32)
    if valid is not None and not set(np.unique(valid_y).tolist()) <= present:
        raise ProbeError(f"validation labels {np.unique(valid_y)} go beyond 0..{n_classes - 1}")
    if valid is not None and len(np.unique(valid_y)) < 2:
        raise ProbeError("validation examples are all of one class, so no epoch can be selected")
    draws, seeds = _check_runs(draws, seeds, len(train_x))
    outputs, best_epoch, best_score = _train(
        train_x, train_y, valid_x, valid_y, _check_test(test_x, train_x), draws, seeds,
        config=config, n_outputs=n_classes, regression=False,
    )  # fmt: skip
    return ProbeScores(_check_outputs(outputs), np.asarray(best_epoch), np.asarray(best_score))


def regression_probe(
    train: Pair,
    valid: Pair | None,
    test_x: np.ndarray,
    *,
    draws: np.ndarray | None = None,
    seeds: Sequence[int] | None = None,
    config: ProbeConfig = REGRESSION,
) -> RegressionScores:
    """Trains linear regressors and gives their test predictions.

    The prediction is head(x) * std + mean, with mean and (population) standard deviation of the
    targets that the run trains on; the loss is the squared error in the target's own unit, as
    published. The epoch is selected by validation MAE.

    Arguments and errors as `classification_probe`, with real-valued targets.
    """
    train_x, train_y = _check_pair(train, "training", np.float32)
    valid_x, valid_y = _check_valid(valid, train_x, np.float32)
    draws, seeds = _check_runs(draws, seeds, len(train_x))
    outputs, best_epoch, score = _train(
        train_x, train_y, valid_x, valid_y, _check_test(test_x, train_x), draws, seeds,
        config=config, n_outputs=1, regression=True,
    )  # fmt: skip
    means = (
        train_y[draws].mean(axis=1) if draws is not None else np.full(len(seeds), train_y.mean())
    )
    return RegressionScores(np.asarray(outputs), means, np.asarray(best_epoch), -np.asarray(score))


# --------------------------------------------------------------------------------- checks


def _check_embeddings(x, name: str) -> np.ndarray:
    x = np.asarray(x, np.float32)
    if x.ndim != 2 or not len(x):
        raise ProbeError(f"{name} embeddings are (n, D) with n > 0; got {x.shape}")
    if not np.all(np.isfinite(x)):
        row = int(np.flatnonzero(~np.isfinite(x).all(axis=1))[0])
        raise ProbeError(f"{name} embedding {row} is not finite")
    return x


def _check_pair(pair: Pair, name: str, dtype) -> Pair:
    x, y = _check_embeddings(pair[0], name), np.asarray(pair[1])
    if y.shape != (len(x),):
        raise ProbeError(f"{name}: {len(x)} embeddings but targets of shape {y.shape}")
    if dtype == np.int32 and y.dtype.kind not in "iu":
        raise ProbeError(f"{name} labels are integers (see class_indices); got {y.dtype}")
    if dtype == np.float32 and (y.dtype.kind not in "iuf" or not np.all(np.isfinite(y))):
        raise ProbeError(f"{name} targets are finite numbers; got {y.dtype}")
    return x, y.astype(dtype)


def _check_valid(valid: Pair | None, train_x: np.ndarray, dtype):
    if valid is None:
        return None, None
    x, y = _check_pair(valid, "validation", dtype)
    return _check_width(x, train_x, "validation"), y


def _check_test(test_x, train_x: np.ndarray) -> np.ndarray:
    return _check_width(_check_embeddings(test_x, "test"), train_x, "test")


def _check_outputs(outputs) -> np.ndarray:
    outputs = np.asarray(outputs)
    if not np.all(np.isfinite(outputs)):
        run = int(np.argwhere(~np.isfinite(outputs))[0, 0])
        raise ProbeError(f"run {run} of the probe diverged; lower learning_rate or standardise")
    return outputs


def _check_width(x: np.ndarray, train_x: np.ndarray, name: str) -> np.ndarray:
    if x.shape[1] != train_x.shape[1]:
        raise ProbeError(
            f"{name} embeddings are {x.shape[1]} wide, training ones {train_x.shape[1]}"
        )
    return x


def _check_runs(draws, seeds, n: int) -> tuple[np.ndarray | None, np.ndarray]:
    if draws is not None:
        draws = np.asarray(draws, np.int32)
        if draws.ndim != 2 or not draws.size or draws.min() < 0 or draws.max() >= n:
            raise ProbeError(f"draws are (R, k) indices below {n}; got shape {draws.shape}")
    if seeds is None:
        seeds = range(5 if draws is None else len(draws))
    seeds = np.asarray(list(seeds), np.uint32)
    if not len(seeds) or (draws is not None and len(draws) != len(seeds)):
        given = "no" if draws is None else len(draws)
        raise ProbeError(f"one seed per run: there are {given} draws and {len(seeds)} seeds")
    return draws, seeds
