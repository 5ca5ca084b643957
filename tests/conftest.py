"""Fixtures shared by all tests."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of reference fixtures and recordings that lies beside the project."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("reference fixtures and recordings (../shared) are not on this machine")
    return folder


@pytest.fixture(autouse=True)
def _strict_dtypes():
    """No silent dtype promotion anywhere in the package."""
    with jax.numpy_dtype_promotion("standard"):
        yield
