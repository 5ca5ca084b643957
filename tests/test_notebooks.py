"""Every notebook is the text beside it, without outputs, and runs from top to bottom."""

import shutil
from pathlib import Path

import pytest

from tests import quick

jupytext = pytest.importorskip("jupytext", reason="the notebooks' tools are not installed")
papermill = pytest.importorskip("papermill", reason="the notebooks' tools are not installed")

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
# As they come they take minutes; so they take seconds, and learn nothing.
SMALL = {
    "align_my_reports": {"COUNT": 150, "PRETRAIN_STEPS": 4, "STEPS": 4},
    "distil_a_listener": {"READING": 60, "STUDENT_STEPS": 2, "TEACHER_STEPS": 2, "STEPS": 2,
                          "TEST": 6},
    "embed_my_folder": {"COUNT": 60},
    "find_and_label": {"COUNT": 140, "OTHERS": 150, "STEPS": 4, "ALIGN_STEPS": 4, "ROUNDS": 2},
    "plan_a_pod": {"TOPOLOGY": "cpu:8", "COMPILERS": False, "FSDP": 8, "BATCH": 8},
}  # fmt: skip


def test_there_are_five_and_each_has_its_text():
    assert sorted(SMALL) == NAMES == sorted(path.stem for path in FOLDER.glob("*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_its_text_without_outputs(name):
    """`jupytext --sync notebooks/*.py` makes it so."""
    notebook, text = (jupytext.read(FOLDER / f"{name}{end}") for end in (".ipynb", ".py"))
    assert [(c.cell_type, c.source) for c in notebook.cells] == [
        (c.cell_type, c.source) for c in text.cells
    ]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert sum("parameters" in cell.metadata.get("tags", ()) for cell in code) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_from_top_to_bottom(name, tmp_path, request, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", quick.FLAGS)  # for few steps compiling is most of the work
    parameters = dict(SMALL[name])
    if name == "embed_my_folder":  # the Hub is not at hand
        weights = request.getfixturevalue("shared") / "weights/whisper_base_encoder"
        parameters["SOURCE"] = str(weights)
    notebook = shutil.copy(FOLDER / f"{name}.ipynb", tmp_path)
    ran = papermill.execute_notebook(
        notebook, tmp_path / "out.ipynb", parameters, cwd=tmp_path, progress_bar=False
    )
    shown = [output for cell in ran.cells if cell.cell_type == "code" for output in cell.outputs]
    assert shown and not any(output.output_type == "error" for output in shown)
