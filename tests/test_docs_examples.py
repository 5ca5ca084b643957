"""The examples of the pages are run: a package of one's own, and the formulas of the concepts."""

import configparser
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"(?:^`([\w/.]+)`:\n\n)?^```(python|toml)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page):
    """(file name or "", language, text) of the page's code."""
    return BLOCK.findall((ROOT / "docs" / page).read_text(encoding="utf-8"))


def run(folder, code):
    path = os.pathsep.join([str(ROOT), str(folder)])
    environment = os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The package of `extending.md`, as pip leaves it."""
    folder = tmp_path_factory.mktemp("site")
    found = blocks("extending.md")
    ((_, _, project),) = [each for each in found if each[1] == "toml"]
    points = configparser.ConfigParser()
    for group, entries in tomllib.loads(project)["project"]["entry-points"].items():
        points[group] = entries
    info = folder / "mine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    with open(info / "entry_points.txt", "w") as file:
        points.write(file)
    (folder / "mine").mkdir()
    (folder / "mine/__init__.py").touch()
    for name, language, text in found:
        if language == "python" and name:
            (folder / name).write_text(text)
    return folder


def test_a_package_of_ones_own_works_as_the_page_says(installed):
    (use,) = [text for name, language, text in blocks("extending.md")
              if language == "python" and not name]  # fmt: skip
    done = run(installed, use)
    assert done.returncode == 0, done.stderr
    assert len(list((installed / "mine").glob("*.py"))) == 7


def test_the_numbers_of_the_concepts_are_those_that_are_printed(tmp_path):
    ((_, _, code),) = blocks("concepts.md")
    biased, unbiased = map(float, run(tmp_path, code).stdout.split())
    assert biased == pytest.approx(0.955, abs=0.01)
    assert abs(unbiased) < 0.1
