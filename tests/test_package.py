"""The installed package: what it asks for, what it brings, where it finds its configs."""

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]


def test_pinned_versions_are_of_what_pyproject_asks_for():
    subprocess.run([sys.executable, ROOT / "launch/pin.py", "--check"], check=True)


def test_the_fast_tests_are_those_of_what_was_changed():
    spec = importlib.util.spec_from_file_location("changed", ROOT / "launch/changed.py")
    changed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(changed)
    found = changed.tests_of({Path("medalign_jax/losses/cka.py"), Path("tests/audio/test_clip.py")})
    names = {str(path) for path in found}
    assert {"tests/losses/test_cka.py", "tests/audio/test_clip.py"} <= names
    assert "tests/audio/test_kaldi.py" not in names
    wanted = "tests/core/test_registry.py"  # imports it, whatever it is called
    assert wanted in map(str, changed.tests_of({Path("medalign_jax/core/errors.py")}))
    assert changed.tests_of(set()) == []
    assert changed.tests_of({Path("README.md")}) == sorted(changed.ALWAYS)
    # Those of what imports it, too.
    assert Path("tests/methods/test_distill.py") in changed.tests_of(
        {Path("medalign_jax/losses/layerwise.py")}
    )
    assert Path("tests/test_main.py") in changed.tests_of({Path("configs/acula.py")})
    # But not where that is nearly everything.
    far = Path("tests/evaluate/test_retrieval.py")
    assert far not in changed.tests_of({Path("medalign_jax/core/errors.py")})
    # No test is its own: those of what imports it.
    found = changed.tests_of({Path("medalign_jax/core/words.py")})
    assert Path("tests/data/test_manifest.py") in found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The built package, unpacked; building needs the back end that pip fetches."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, ROOT]
    made = subprocess.run(build, capture_output=True, text=True)
    if made.returncode and "hatchling" in made.stderr:
        pytest.skip("the build back end, hatchling, cannot be fetched here")
    assert not made.returncode, made.stderr
    (file,) = folder.glob("medalign_jax-*.whl")
    with zipfile.ZipFile(file) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_holds_the_whole_package_and_its_configs_and_nothing_beside(wheel):
    whole = {p.relative_to(ROOT) for p in (ROOT / "medalign_jax").rglob("*.py")}
    whole |= {Path("medalign_jax/py.typed")}
    whole |= {p.relative_to(ROOT) for room in ("page", "app") for kind in ("assets", "templates")
              for p in (ROOT / "medalign_jax" / room / kind).iterdir()}  # fmt: skip
    whole |= {Path("medalign_jax/shipped") / p.relative_to(ROOT)
              for p in (ROOT / "configs").glob("*.py")}  # fmt: skip
    info = next(wheel.glob("*.dist-info"))
    found = {p.relative_to(wheel) for p in wheel.rglob("*") if p.is_file()}
    assert {p for p in found if p.parts[0] != info.name} == whole
    assert "medalign = medalign_jax.cli:main" in (info / "entry_points.txt").read_text()


def test_an_installed_package_finds_its_configs_from_any_folder(wheel, tmp_path):
    command = [sys.executable, "-m", "medalign_jax", "train", "--config=configs/pretrain.py:demo"]
    told = subprocess.run(
        [*command, "--help"], cwd=tmp_path, env={"PYTHONPATH": str(wheel), "PATH": ""},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "--config.train.steps=1000" in told.stdout
    refused = subprocess.run(
        [*command, "--config.data.manifest=none.csv", "--workdir=run"], cwd=tmp_path,
        env={"PYTHONPATH": str(wheel), "PATH": "", "HOME": str(tmp_path)}, capture_output=True,
        text=True,
    )  # fmt: skip
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1] == (
        "error: no manifest file at 'none.csv'; check the path"
    )
