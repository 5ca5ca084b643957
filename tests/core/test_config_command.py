"""Help of commands that take a config: every key, its value, what it means."""

import importlib
from pathlib import Path

import pytest

from medalign_jax.core import config_command

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FILES = sorted(p.stem for p in CONFIGS.glob("*.py") if p.stem not in ("__init__", "common"))


def lines_of(name: str, variant: str = "") -> dict[str, tuple[str, str]]:
    """key -> (value, comment) as printed."""
    config = importlib.import_module(f"configs.{name}").get_config(variant)
    found, key = {}, ""
    for line in config_command.keys(config, CONFIGS / f"{name}.py").splitlines():
        if line.startswith("--config."):
            key, _, value = line.removeprefix("--config.").partition("=")
            found[key] = (value, "")
        else:
            found[key] = (found[key][0], f"{found[key][1]} {line.strip()}".strip())
    return found


@pytest.mark.parametrize("name", FILES)
def test_every_key_is_explained(name):
    found = lines_of(name)
    assert len(found) > 10
    assert [key for key, (_, comment) in found.items() if not comment] == []


def test_values_are_those_in_force_and_comments_those_of_the_key():
    found = lines_of("acula", "demo")
    assert found["data.simulated"] == ("600", "recordings to simulate where there is no manifest")
    assert found["train.batch_size"] == ("64", "of all devices together")
    assert found["evaluate.layer"] == ("", "block whose tokens are pooled; none: the last")
    assert found["pretrain.changes.train.steps"] == ("1000", found["train.steps"][1])
    assert found["arms"][0] == "{}"
    assert "models/layers/pooling.py" in found["evaluate.pooling"][1]


def test_long_values_are_cut_and_stay_one_line():
    value, comment = lines_of("textualize")["prompt.text"]
    assert len(value) < 100 and value.endswith("...") and comment == "what it is asked"


def test_the_overview_names_files_and_their_variants():
    text = config_command.overview(CONFIGS)
    assert all(f"--config=configs/{name}.py" in text for name in FILES)
    assert ":patients" in text and "common.py" not in text
