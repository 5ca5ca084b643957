"""Prints the test files of what differs from the last commit, for `launch/test.sh --fast`.

They are the tests that were changed themselves, those named after a changed module, those that
import one, and those of the modules that import it, where these are few (`FEW`) or no test is its
own: what everything stands on is left to the whole run. Tests of all configs and docs are always
among them. Where nothing differs, the last commit stands for the change.
"""

from __future__ import annotations

import ast
import functools
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FEW = 12  # modules that import a changed one, up to which their tests are run too
ALWAYS = (Path("tests/core/test_config_command.py"), Path("tests/test_docs.py"))


def changed() -> set[Path]:
    """Python files and pages that differ, relative to the root; those that are gone included."""
    lines = _git("diff", "--name-only", "HEAD") + _git("ls-files", "--others", "--exclude-standard")
    if not lines:
        lines = _git("diff", "--name-only", "HEAD~1", "HEAD")
    return {Path(line) for line in lines if line.endswith((".py", ".md"))}


def _git(*arguments: str) -> list[str]:
    command = ["git", *arguments]
    return subprocess.run(
        command, cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split()


def module_of(path: Path) -> str:
    """The dotted name of a file."""
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path) -> Iterator[str]:
    """Names of the modules, and of what is taken from them, that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def tests_of(files: set[Path]) -> list[Path]:
    """Test files to run, relative to the root; none where nothing differs."""
    tests = _imports("tests")
    sources = _imports("medalign_jax") | _imports("configs") | _imports("benchmarks")
    found = {path for path in files if path in tests and path.name.startswith("test_")}
    for path in files - tests.keys():
        modules, names = {module_of(path)}, {f"test_{path.stem}.py"}
        own = _tests_of(modules, names, tests)
        if modules & sources.get(path.parent / "__init__.py", set()):  # had through its room
            modules |= {module_of(path.parent / "__init__.py")}
        importers = {p for p, imports in sources.items() if modules & imports}
        found |= own
        if len(importers) <= FEW or not own:
            names = {f"test_{p.stem}.py" for p in importers}
            found |= _tests_of({module_of(p) for p in importers}, names, tests)
    if files:
        found |= {path for path in ALWAYS if (ROOT / path).is_file()}
    return sorted(found)


def _tests_of(modules: set[str], names: set[str], tests: dict[Path, set[str]]) -> set[Path]:
    return {
        path
        for path, imports in tests.items()
        if path.name.startswith("test_") and (path.name in names or modules & imports)
    }


@functools.cache
def _imports(folder: str) -> dict[Path, set[str]]:
    """File -> what it imports, of a folder below the root."""
    paths = sorted((ROOT / folder).rglob("*.py"))
    return {path.relative_to(ROOT): {*imported(path)} for path in paths}


if __name__ == "__main__":
    found = tests_of(changed())
    print(*found, sep="\n", end="\n" * bool(found))
