"""Fixtures shared by all tests."""

import os
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Set before any test module imports jax. Processes of one run, later runs and other clones share
# compilations, as the runs of a user do.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache/medalign_jax/xla"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Small programs compile in less than the default of 1 s, and would be compiled anew each time.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of reference fixtures and recordings that lies beside the project."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("reference fixtures and recordings (../shared) are not on this machine")
    return folder


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium, which reaches no network."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        pytest.skip("there is no Chromium on this machine (Debian: apt-get install chromium)")
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", "--no-first-run"]  # fmt: skip
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=found, args=quiet)
        yield opened
        opened.close()
