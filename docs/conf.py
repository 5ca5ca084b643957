"""Sphinx: `pip install ".[docs]"`, then `python -m sphinx -W -b html docs docs/_build`.

The reference of all modules takes two minutes; `MEDALIGN_DOCS=pages` leaves it out.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

project = "medalign_jax"
author = "The medalign_jax contributors"
copyright = "2026, the medalign_jax contributors"
extensions = ["myst_parser", "sphinx.ext.mathjax"]
if os.environ.get("MEDALIGN_DOCS") != "pages":
    extensions += ["sphinx.ext.apidoc", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "medalign_jax"
autodoc_default_options = {"members": True, "ignore-module-all": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # they stand in the signature and, with shapes, in the docstrings
autodoc_mock_imports = ["gradio"]
napoleon_numpy_docstring = False
napoleon_use_rtype = False
apidoc_modules = [
    {
        "path": "../medalign_jax",
        "destination": "api",
        # Flags of two commands cannot be defined in one process.
        "exclude_patterns": ["**/__main__.py", "**/main.py", "**/plan.py"],
        "max_depth": 2,
        "module_first": True,
        "separate_modules": True,
        "automodule_options": {"members", "show-inheritance"},
    }
]
suppress_warnings = [
    "myst.xref_missing",  # pages of the repository that are not of the documentation
    "ref.python",  # an error is named where it is raised, and is in its room's __init__ as well
]


def drawn(app, what, name, obj, options, lines):
    """Drawings and commands in a module's docstring are shown as they are."""
    del app, name, obj, options
    if what != "module":
        return
    found, paragraph = [], []
    for line in [*lines, ""]:
        if line.strip():
            paragraph.append(line)
            continue
        if any(each.startswith(" ") for each in paragraph):
            paragraph = ["::", "", *(f"    {each}" for each in paragraph)]
        found += [*paragraph, ""]
        paragraph = []
    lines[:] = found


def without_reference(app, name, source):
    """The contents name no page that is not made."""
    del app, name
    source[0] = source[0].replace("api/modules\n", "")


def setup(app):
    """Sphinx calls this."""
    if "sphinx.ext.autodoc" in extensions:
        app.connect("autodoc-process-docstring", drawn)
    else:
        app.connect("source-read", without_reference)
