"""Slips in what comes after training are told before it."""

import pytest

from configs import acula
from medalign_jax.errors import UserError
from medalign_jax.evaluate.suite import Suite
from medalign_jax.experiments import build
from medalign_jax.experiments.acula import options_of
from medalign_jax.experiments.measuring import check_settings
from tests.evaluate.evaluation_rows import rows


def check(tasks=("label",), **changes):
    config = acula.get_config("demo")
    config.evaluate.tasks = tasks
    config.update_from_flattened_dict(changes)
    suite = Suite.of(rows(age=lambda i: 30 + i % 7), options_of(config), "toy")
    check_settings(config, build.architecture_of(config), suite)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"evaluate.map": "procrustez"},
            r"map is 'procrustez' \(did you mean 'procrustes'",
        ),
        ({"evaluate.pad": "repat"}, r"evaluate\.pad is 'repat'.*repeat"),
        ({"evaluate.baselines": ("majority", "spectrall")}, "unknown baseline 'spectrall'"),
        ({"evaluate.pooling": "median"}, "unknown pooling 'median'"),
        ({"evaluate.layer": 99}, "99"),
        ({"evaluate.probes": ("linaer",)}, "unknown probe 'linaer'"),
        ({"evaluate.per_class": 500}, "500 labels of each class cannot be drawn"),
        ({"tasks": ("age",)}, "supervised.enabled: the first task, 'age', is a regression"),
        ({"tasks": ("lable",)}, "no recording has a value in column 'lable'"),
    ],
)
def test_a_slip_in_late_settings_is_told_at_first(changes, message):
    check()
    with pytest.raises(UserError, match=message):
        check(**changes)


def test_what_is_not_measured_needs_no_settings():
    check(**{"evaluate.enabled": False, "evaluate.map": "procrustez"})
