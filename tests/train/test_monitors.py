"""Failure signs on constructed metrics."""

import math

import pytest

from medalign_jax.core.errors import UserError
from medalign_jax.train.monitors import Monitors, TrainingStoppedError

HEALTHY = {
    "loss": 1.0,
    "grad_norm": 0.5,
    "cka": 0.3,
    "embedding_variance": 0.5,
    "effective_rank": 8.0,
    "reconstruction": 0.02,
}


def said(values: list[dict], total_steps: int = 100, first: dict | None = None) -> list[str]:
    """All that is said while the values come in, after a first healthy line."""
    monitors = Monitors(total_steps)
    lines = monitors.check(1, HEALTHY | (first or {}), "none yet")
    for step, changed in enumerate(values, 2):
        lines += monitors.check(step, HEALTHY | changed, "none yet")
    return lines


def rising(count: int) -> list[dict]:
    return [{"cka": 0.3 + 0.01 * step} for step in range(count)]


def test_a_healthy_run_is_silent():
    assert said(rising(90)) == []


def test_vanishing_variance_is_called_collapse_once():
    (line,) = said([{"embedding_variance": 1e-6}] * 60 + rising(1), total_steps=1000)
    assert line.startswith("collapse") and "variance" in line and "it began at 0.5" in line
    assert "loss.ssm_weight" in line


def test_embeddings_on_a_line_are_called_collapse_once():
    (line,) = said([{"effective_rank": 1.01}] * 60, total_steps=1000)
    assert line.startswith("collapse") and "one line" in line and "8.00" in line


def test_a_rank_that_was_low_from_the_start_is_not_a_collapse():
    assert said([{"effective_rank": 1.01}] * 30, 1000, first={"effective_rank": 1.5}) == []


def test_cka_that_does_not_rise_is_told_after_a_fifth_of_the_run():
    monitors = Monitors(total_steps=200)
    told = {step: monitors.check(step, HEALTHY, "none") for step in range(1, 101)}
    spoken = {step: lines for step, lines in told.items() if lines}
    assert list(spoken) == [40]
    (line,) = spoken[40]
    assert line.startswith("CKA is not rising: 0.300 after 40 steps, it began at 0.300")
    assert "pre-trained" in line


def test_short_runs_wait_twenty_steps_for_cka():
    monitors = Monitors(total_steps=30)
    spoken = [step for step in range(1, 31) if monitors.check(step, HEALTHY, "none")]
    assert spoken == [20]


def test_diverging_reconstruction_is_told_once():
    values = [{"reconstruction": 0.01}] * 20 + [{"reconstruction": 0.1}] * 20
    (line,) = said(values, total_steps=1000)
    assert line.startswith("reconstruction diverges") and "its best was 0.01" in line


def test_one_bad_batch_is_not_a_divergence():
    values = [{"reconstruction": 0.02}] * 10 + [{"reconstruction": 0.05}] + [{}] * 10
    assert said(values, total_steps=1000) == []


def test_a_sign_that_went_away_is_told_again_when_it_comes_back():
    bad, good = [{"embedding_variance": 1e-6}] * 30, [{"embedding_variance": 0.5}] * 30
    lines = said(bad + good + bad, total_steps=1000)
    assert len(lines) == 2 and all(line.startswith("collapse") for line in lines)


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_step_stops_naming_the_checkpoint(name, value):
    monitors = Monitors(100)
    monitors.check(1, HEALTHY, "none yet")
    with pytest.raises(TrainingStoppedError) as caught:
        monitors.check(7, HEALTHY | {name: value}, "run/checkpoints/5")
    text = str(caught.value)
    assert "step 7" in text and name in text and "run/checkpoints/5" in text
    assert isinstance(caught.value, UserError)


def test_methods_without_these_metrics_are_left_alone():
    monitors = Monitors(20)
    assert [monitors.check(step, {"loss": 1.0}, "none") for step in range(1, 50)] == [[]] * 49


def test_a_restart_remembers_how_it_began_and_repeats_nothing():
    lines = [{"step": step} | HEALTHY | {"cka": 0.3 + 0.01 * step} for step in range(1, 30)]
    lines.insert(5, {"step": 5, "valid/cka": 0.2})
    lines += [{"step": step} | HEALTHY | {"embedding_variance": 1e-6} for step in range(30, 60)]
    monitors = Monitors(1000)
    monitors.replay(lines)
    assert monitors.check(60, HEALTHY | {"embedding_variance": 1e-6}, "none") == []  # told before
    said = [monitors.check(step, HEALTHY | {"reconstruction": 9.0}, "none") for step in (61, 62)]
    assert any("its best was 0.02" in line for line in said[0])
