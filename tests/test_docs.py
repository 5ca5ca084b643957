"""What the pages name is there: files, modules, headings, commands, configs with their variants."""

import importlib
import re
from pathlib import Path

import pytest

from medalign_jax import cli

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "third_party/README.md"])
ROOMS = "|".join(sorted(p.name for p in (ROOT / "medalign_jax").iterdir() if p.is_dir()))


def anchors(page: Path) -> set[str]:
    """As a Git forge makes them of headings."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_are_there(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            assert file.exists(), target
            assert not anchor or anchor in anchors(file), target
    places = (
        rf"`((?:medalign_jax/|tests/|docs/|launch/|configs/|(?:{ROOMS})/)[\w/.]+\.(?:py|sh|md))"
    )
    for name in re.findall(places, text):
        assert any((ROOT / folder / name).exists() for folder in ("", "medalign_jax")), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_configs_are_there(page):
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"^(?:W=\S+ |PYTHONPATH=\S+ )?medalign (\w+)", text, re.MULTILINE):
        assert name in cli.COMMANDS, name
    for name in re.findall(r"python -m (benchmarks\.\w+|tests\.\w+)", text):
        assert (ROOT / name.replace(".", "/")).with_suffix(".py").exists(), name
    for name, variant in re.findall(r"configs/(\w+)\.py(?::([\w+]+))?", text):
        assert importlib.import_module(f"configs.{name}").get_config(variant or "")


def named(parts: list[str]) -> bool:
    """Whether a dotted name leads to a module, or to what a module or a room's `__init__` names."""
    place = ROOT / "medalign_jax"
    for part in parts:
        if (place / part).is_dir():
            place /= part
        elif (place / f"{part}.py").exists():
            return True  # what follows is in the module
        else:
            return part in (place / "__init__.py").read_text(encoding="utf-8")
    return True


def test_names_of_modules_in_docstrings_are_there():
    """`audio.clip`, `losses.cka` and the like; keys of the configs look the same."""
    keys = set()
    for name in ("acula", "distill", "textualize"):
        for block, value in importlib.import_module(f"configs.{name}").get_config().items():
            if hasattr(value, "keys"):
                keys |= {f"{block}.{key}" for key in value}
    wrong = []
    for file in sorted((ROOT / "medalign_jax").rglob("*.py")):
        for name in re.findall(
            rf"`((?:{ROOMS})(?:\.(?!csv|json)\w+)+)", file.read_text(encoding="utf-8")
        ):
            if ".".join(name.split(".")[:2]) not in keys and not named(name.split(".")):
                wrong.append((str(file.relative_to(ROOT)), name))
    assert not wrong
