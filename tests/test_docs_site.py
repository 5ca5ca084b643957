"""The documentation is built without a warning, its pages that is; the reference takes minutes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_pages_are_built_without_a_warning(tmp_path):
    pytest.importorskip("furo", reason="the documentation's tools are not installed")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html"]
    done = subprocess.run(
        [*command, str(ROOT / "docs"), str(tmp_path)],
        env=os.environ | {"MEDALIGN_DOCS": "pages"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    start = (tmp_path / "start.html").read_text(encoding="utf-8")
    assert "Align an encoder with reports" in start and "evidence.html" in start
