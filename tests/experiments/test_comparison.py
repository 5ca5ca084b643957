"""Side-by-side measurements on embeddings whose quality is known."""

import dataclasses

import numpy as np
import pytest

from medalign_jax.data.manifest import Row
from medalign_jax.errors import UserError
from medalign_jax.experiments import comparison as compare

SETTINGS = compare.ProbeSettings(per_class=4, draws=4, seeds=2, resamples=200)


def _rows(count: int = 90) -> list[Row]:
    splits = ("train", "train", "test", "valid", "train", "test")
    return [
        Row(
            i + 1,
            f"{i}.wav",
            f"s{i}",
            splits[i // 2 % 6],
            "ab"[i % 2],
            {"rate": str(i % 7)},
            {},
            None,
        )
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def stages():
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((90, 128)).astype(np.float32)
    # Wide: 64 small steps of the published probe overcome its random start only together.
    informed = noise + 3.0 * np.float32(2 * (np.arange(90) % 2) - 1)[:, None]
    return {"before": noise, "after": informed}


def test_the_better_stage_wins_with_its_paired_interval(stages):
    outcome = compare.Comparison()
    compare.compare_probes(compare.make_task(_rows(), "label", "toy"), stages, SETTINGS, outcome)
    gain = outcome.intervals["label/probe_4_labels", "after minus before"]
    assert gain.low > 0.1
    assert outcome.intervals["label/probe", "after"].value > 0.95
    assert {r.n_train for r in outcome.results} == {46, 8}


def test_regression_stands_beside_the_mean_predictor(stages):
    outcome = compare.Comparison()
    task = compare.make_task(_rows(), "rate", "toy")
    assert task.kind == "regression"
    compare.compare_probes(task, stages, SETTINGS, outcome)
    guess = outcome.intervals["rate/probe", "mean predictor"].value
    answers = task.answers.astype(float)
    expected = np.abs(answers[task.test] - answers[task.train].mean()).mean()
    assert guess == pytest.approx(expected, rel=1e-6)


def test_zero_shot_names_classes_and_chance(stages):
    task = compare.make_task(_rows(), "label", "toy")
    text = np.eye(2)[np.arange(90) % 2] + 0.01
    space = compare.Space(stages["after"], text, np.eye(2)[:, None] + 0.01)
    outcome = compare.Comparison()
    texts = ["ab"[i % 2] for i in range(90)]
    compare.compare_zero_shot(task, ("a", "b"), {"after": space}, texts, "ridge", SETTINGS, outcome)
    found = {r.kind: r for r in outcome.results}
    assert found["zero_shot"].value > 0.9 and "chance 0.500" in found["zero_shot"].notes
    assert outcome.confusion.sum() == len(task.test)
    assert set(outcome.predictions) == set(task.test)


def test_a_column_without_values_is_named():
    with pytest.raises(UserError, match="'height'"):
        compare.make_task(_rows(), "height", "toy")


def test_too_few_subjects_give_values_without_intervals(stages):
    rows = [row for row in _rows() if row.split != "test"]
    rows += [row for row in _rows() if row.split == "test" and row.label == "a"]
    rows += [row for row in _rows() if row.split == "test" and row.label == "b"][:1]
    order = [row.row - 1 for row in rows]
    task = compare.make_task(rows, "label", "toy")
    same = np.array(["one" if row.label == "a" else "two" for row in rows], object)
    task = dataclasses.replace(task, subjects=same)
    outcome = compare.Comparison()
    some = {name: values[order] for name, values in stages.items()}
    compare.compare_probes(task, some, SETTINGS, outcome)
    result = next(r for r in outcome.results if r.stage == "after")
    assert result.ci_low is None and "too few subjects" in result.notes
    assert result.value > 0.9
