"""Pins what pyproject.toml asks for, at the versions that pip resolves today.

    python launch/pin.py           writes requirements.txt and requirements-dev.txt anew
    python launch/pin.py --check   only looks whether they name what pyproject.toml names (status 1)

The other requirements files hold packages that carry weights or compilers and go in without what
they depend on; their versions are changed by hand.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
HEADS = {
    "requirements.txt": (
        "# Run time, pinned from pyproject.toml by launch/pin.py. CPU; docs/acula.md says how to "
        "get TPUs and CUDA.\n"
    ),
    "requirements-dev.txt": (
        "# Tests, formatting, and the references that numbers are compared with; pinned as "
        "requirements.txt.\n-r requirements.txt\n"
    ),
}


def asked() -> dict[str, list[Requirement]]:
    """file -> what pyproject.toml asks for, of what the file pins."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = (project["dependencies"], project["optional-dependencies"]["dev"])
    return {
        name: [Requirement(text) for text in texts]
        for name, texts in zip(HEADS, lists, strict=True)
    }


def resolved(requirements: list[Requirement]) -> dict[str, str]:
    """package -> version, by pip, whatever is installed here."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet",
               "--report", "-", *map(str, requirements)]  # fmt: skip
    report = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return {canonicalize_name(p["metadata"]["name"]): p["metadata"]["version"]
            for p in report["install"]}  # fmt: skip


def write() -> None:
    """Both files; what a package is for stands behind it in pyproject.toml."""
    wanted = asked()
    versions = resolved([r for requirements in wanted.values() for r in requirements])
    source = (ROOT / "pyproject.toml").read_text()
    reasons = dict(re.findall(r'^    "([\w.-]+)[^"]*",(  # .*)$', source, re.MULTILINE))
    for name, requirements in wanted.items():
        lines = [f"{r.name}=={versions[canonicalize_name(r.name)]}{reasons.get(r.name, '')}\n"
                 for r in requirements]  # fmt: skip
        (ROOT / name).write_text(HEADS[name] + "".join(lines))


def problems() -> list[str]:
    """What the files pin otherwise than pyproject.toml asks."""
    found = []
    for name, requirements in asked().items():
        lines = (ROOT / name).read_text().splitlines()
        pins = dict(re.findall(r"^([\w.-]+)==(\S+)", "\n".join(lines), re.MULTILINE))
        if odd := {r.name for r in requirements} ^ pins.keys():
            found.append(f"{name} and pyproject.toml differ in {', '.join(sorted(odd))}")
        for r in requirements:
            if r.name in pins and not r.specifier.contains(pins[r.name], prereleases=True):
                found.append(f"{name} has {r.name} {pins[r.name]}, pyproject.toml asks for {r}")
    return found


if __name__ == "__main__":
    if "--check" not in sys.argv[1:]:
        write()
    found = problems()
    print(*found, sep="\n", end="\n" * bool(found))
    sys.exit(bool(found))
