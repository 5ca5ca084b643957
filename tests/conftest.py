"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest

from tests.quick import FLAGS

ROOT = Path(__file__).resolve().parent.parent

# Set before any test module imports jax. Processes of one run, and later runs, share compilations.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "xla"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("XLA_FLAGS", FLAGS)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of reference fixtures and recordings that lies beside the project."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("reference fixtures and recordings (../shared) are not on this machine")
    return folder
