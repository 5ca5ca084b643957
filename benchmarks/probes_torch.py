"""One run of the published linear probe in PyTorch: the yardstick of `benchmarks.probes`."""

from __future__ import annotations

import copy

import numpy as np
import torch
from sklearn.metrics import roc_auc_score


def published_run(x, problem, batch: int, epochs: int, l2: float, seed: int) -> np.ndarray:
    """Trains on a problem's rows, keeps the best epoch on its validation rows, predicts its test.

    Returns:
      (m, C) probabilities, or (m,) numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, valid, test = (torch.from_numpy(x[r]) for r in (problem.train, problem.valid,
                                                          problem.test))  # fmt: skip
    classes = problem.classes
    y = torch.from_numpy(problem.targets[problem.train])
    y = y if classes else y.float()
    mean, deviation = (0.0, 1.0) if classes else (y.mean(), y.std(correction=0))
    layer = torch.nn.Linear(x.shape[1], classes or 1)
    torch.nn.init.normal_(layer.weight, 0, 0.01, generator=generator)
    torch.nn.init.zeros_(layer.bias)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-4)
    decay = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
    loss_of = torch.nn.functional.cross_entropy if classes else torch.nn.functional.mse_loss
    best, kept = -np.inf, None

    def predict(features):
        z = layer(features)
        return z if classes else z[:, 0] * deviation + mean

    for _ in range(epochs):
        for part in torch.randperm(len(rows), generator=generator).split(batch):
            penalty = sum(p.square().sum() for p in layer.parameters())
            loss = loss_of(predict(rows[part]), y[part]) + l2 * penalty
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
            optimizer.step()
        decay.step()
        with torch.no_grad():
            score = _score(predict(valid), problem.targets[problem.valid], classes)
        if score > best:
            best, kept = score, copy.deepcopy(layer.state_dict())
    layer.load_state_dict(kept)
    with torch.no_grad():
        outputs = predict(test)
        return (outputs.softmax(dim=1) if classes else outputs).numpy()


def _score(outputs: torch.Tensor, targets: np.ndarray, classes: int) -> float:
    if classes == 0:
        return -float(np.abs(outputs.numpy() - targets).mean())
    one_hot = np.eye(classes)[targets]
    return float(roc_auc_score(one_hot, outputs.softmax(dim=1).numpy()))
