"""Sphinx: `pip install ".[docs]"`, then `python -m sphinx -W -b html docs docs/_build`."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

project = "medalign_jax"
author = "The medalign_jax contributors"
copyright = "2026, the medalign_jax contributors"
extensions = [
    "myst_parser",
    "sphinx.ext.apidoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "medalign_jax"
html_static_path: list[str] = []
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # they stand in the signature and, with shapes, in the docstrings
autodoc_mock_imports = ["gradio"]
napoleon_numpy_docstring = False
napoleon_use_rtype = False
apidoc_modules = [
    {
        "path": "../medalign_jax",
        "destination": "api",
        "exclude_patterns": ["**/__main__.py"],
        "max_depth": 2,
        "module_first": True,
        "separate_modules": True,
        "automodule_options": {"members", "show-inheritance"},
    }
]
# Pages of the repository that are no pages of the documentation.
suppress_warnings = ["myst.xref_missing"]
autodoc_default_options = {"members": True, "ignore-module-all": True, "show-inheritance": True}
