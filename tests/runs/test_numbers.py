"""Numbers of a config that mean nothing are refused by their own names."""

import functools
import importlib

import pytest

from configs import acula, distill
from medalign_jax.core.errors import UserError
from medalign_jax.runs.numbers import check_numbers


@pytest.mark.parametrize("name", ["acula", "distill", "pretrain", "textualize"])
def test_every_variant_is_within_bounds(name):
    module = importlib.import_module(f"configs.{name}")
    for variant in getattr(module, "VARIANTS", ("",)):
        check_numbers(module.get_config(variant))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("train.steps", -5, "a whole number from 0 on"),
        ("train.batch_size", 0, "a whole number from 1 on"),
        ("train.eval_every", 0, "a whole number from 1 on"),
        ("train.log_every", -1, "a whole number from 1 on"),
        ("train.accumulate", 0, "a whole number from 1 on"),
        ("data.seconds", 0.0, "a number above 0"),
        ("data.max_seconds", float("nan"), "a number above 0"),
        ("data.workers", -1, "a whole number from 0 on"),
        ("data.max_bad_fraction", 1.5, "a share, 0 to 1"),
        ("teacher.max_tokens", 0, "a whole number from 1 on"),
        ("reports.wordings", 0, "a whole number from 1 on"),
        ("loss.temperature", 0.0, "a number above 0"),
        ("loss.align_weight", -1.0, "a number from 0 on"),
        ("evaluate.seeds", 0, "a whole number from 1 on"),
        ("optimizer.learning_rate", -1e-3, "a number from 0 on"),
        ("optimizer.learning_rate", float("inf"), "a number from 0 on"),
        ("seed", -1, "a whole number from 0 on"),
        ("pretrain.changes.train.steps", -1, "a whole number from 0 on"),
    ],
)
def test_each_number_has_its_own_error(key, value, words):
    config = acula.get_config("small")
    *blocks, name = key.split(".")
    functools.reduce(lambda block, name: block[name], blocks, config)[name] = value
    with pytest.raises(UserError) as caught:
        check_numbers(config)
    assert str(caught.value) == f"config.{key} is {value}; it has to be {words}"


def test_all_are_said_at_once_and_lists_are_looked_into():
    config = distill.get_config("demo")
    config.data.buckets = (88, 0)
    config.seeds = (3, -4)
    config.lora.rank = 0
    with pytest.raises(UserError) as caught:
        check_numbers(config)
    assert sorted(str(caught.value).split(" | ")) == [
        "config.data.buckets is 0; it has to be a whole number from 1 on",
        "config.lora.rank is 0; it has to be a whole number from 1 on",
        "config.seeds is -4; it has to be a whole number from 0 on",
    ]
