"""Folds inside the training rows, on which a probe's penalty (or its like) is chosen."""

from __future__ import annotations

import dataclasses

import numpy as np

FOLDS = 5


@dataclasses.dataclass(frozen=True, eq=False)
class InnerFolds:
    """Which training rows are held out together.

    Attributes:
      number: (n,) fold of each training row, 0..count - 1.
      usable: (count,) whether the rows outside the fold have every class; other folds are left
        out of the choice.
      note: what is not as it should be; empty otherwise.
    """

    number: np.ndarray
    usable: np.ndarray
    note: str = ""

    def held_out(self) -> np.ndarray:
        """(usable folds, n) bool: the rows of each usable fold."""
        return self.number[None, :] == np.flatnonzero(self.usable)[:, None]


def inner_folds(
    targets: np.ndarray, groups: np.ndarray, classes: int, seed: int, folds: int = FOLDS
) -> InnerFolds:
    """Deals the groups onto folds of nearly equal number, stratified.

    Groups are sorted by the rarest class that they have and then by size, or by their mean target
    (a regression), and dealt in turn. So no group is split, a class with two groups or more is
    never in one fold alone, and a fold has its share of every class as far as groups allow.

    Args:
      targets: (n,) classes or numbers of the training rows.
      groups: (n,) integers.
      classes: number of classes; 0 for a regression.
      seed: order of groups that are alike.
      folds: number of folds; no more are made than there are groups.
    """
    _, group = np.unique(groups, return_inverse=True)
    total = int(group.max()) + 1
    count = min(folds, total)
    if count < 2:
        note = "one subject in training: nothing to choose the penalty by"
        return InnerFolds(np.zeros(len(group), int), np.zeros(1, bool), note)
    chance = np.random.default_rng(seed).permutation(total)
    if classes:
        order = _by_rarest_class(targets, group, total, classes, chance)
    else:
        mean = np.bincount(group, targets) / np.bincount(group)
        block = np.empty(total, int)
        block[np.lexsort((chance, mean))] = np.arange(total) // count
        order = np.lexsort((chance, block))
    fold = np.empty(total, int)
    fold[order] = np.arange(total) % count
    number = fold[group]
    usable = np.ones(count, bool)
    if classes:
        inside = np.zeros((count, classes), int)
        np.add.at(inside, (number, targets), 1)
        usable = ((inside.sum(axis=0) - inside) > 0).all(axis=1)
    return InnerFolds(number, usable, _note(count, folds, usable))


def _by_rarest_class(targets, group, total, classes, chance) -> np.ndarray:
    """Groups sorted by the rarest class of each, large ones first."""
    has = np.zeros((total, classes), bool)
    has[group, targets] = True
    rarity = has.sum(axis=0)  # groups that have the class
    rarest = np.argmin(np.where(has, rarity, total + 1), axis=1)
    return np.lexsort((chance, -np.bincount(group), rarest))


def _note(count: int, wanted: int, usable: np.ndarray) -> str:
    notes = []
    if count < wanted:
        notes.append(f"{count} inner folds, as there are no more subjects in training")
    if not usable.any():
        notes.append("every inner fold takes a class away: nothing to choose the penalty by")
    elif not usable.all():
        notes.append(
            f"{np.sum(~usable)} of {count} inner folds left out: without them a class is missing"
        )
    return "; ".join(notes)
