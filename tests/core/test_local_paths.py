"""Places on no disk of this machine are refused at every way in, before anything is done."""

import csv
import json
from pathlib import Path

import pytest
from ml_collections import ConfigDict

import medalign_jax
from medalign_jax import embed
from medalign_jax.core.errors import UserError
from medalign_jax.core.local_paths import check_local, is_remote, local
from medalign_jax.data import open_dataset
from medalign_jax.data.questions import descriptions as textualised
from medalign_jax.data.questions.question import Checks
from medalign_jax.data.questions.readers import read_questions
from medalign_jax.data.recordings import prepare
from medalign_jax.data.recordings.manifest import read_manifest
from medalign_jax.datasets import convert
from medalign_jax.datasets.simulated import simulate
from medalign_jax.runs import evaluate
from medalign_jax.runs.workdir import open_workdir

REMOTE = "gs://bucket/folder"


@pytest.mark.parametrize(
    "place", ["gs://b/x", "s3://b/x", "memory://x", "https://h/x", "file:///x", Path("gs://b/x")]
)
def test_what_has_a_scheme_is_remote(place):
    assert is_remote(place)
    with pytest.raises(UserError, match="not a local path: mount it"):
        local(place)


@pytest.mark.parametrize(
    "place",
    ["/data/x", "x", "a:b/c", "pypi:name", "org/name:file.gguf", "C:/x", "see https://x", "",
     "x//y", Path("a:b/c"), Path("/gs:/x")],
)  # fmt: skip
def test_other_names_are_left_as_they_are(place):
    assert not is_remote(place) and local(place) == Path(place)


def test_all_of_a_config_are_named_by_their_keys():
    config = {"data": {"manifest": REMOTE, "targets": ("age",)}, "seed": 0,
              "teacher": {"source": "org/name", "others": ["s3://b/y"], "cache": ""}}  # fmt: skip
    with pytest.raises(UserError) as refused:
        check_local(config, "config")
    assert f"config.data.manifest is {REMOTE} and config.teacher.others is s3://b/y" in str(
        refused.value
    )
    check_local({"data": {"manifest": "m.csv"}, "seed": None, "flag": True}, "config")


@pytest.mark.parametrize(
    ("main", "arguments", "named"),
    [
        (prepare.main, ("--manifest=m.csv", f"--out={REMOTE}"), "out"),
        (prepare.main, (f"--manifest={REMOTE}", "--out=x"), "manifest"),
        (evaluate.main, ("--encoder=x", "--manifest=m.csv", f"--out={REMOTE}"), "out"),
        (evaluate.main, (f"--encoder={REMOTE}", "--manifest=m.csv", "--out=x"), "encoder"),
        (embed.main, (REMOTE, "--checkpoint=x"), "files"),
        (embed.main, ("x.wav", "--checkpoint=x", f"--out={REMOTE}"), "out"),
        (convert.main, ("--format=icbhi", f"--root={REMOTE}", "--out=x"), "root"),
        (simulate.main, (f"--out={REMOTE}", "--count=2"), "out"),
        (
            textualised.main,
            ("--questions=q.jsonl", f"--descriptions={REMOTE}", "--out=x"),
            "descriptions",
        ),
    ],
)
def test_every_command_refuses_them_in_one_line(
    tmp_path, monkeypatch, capsys, main, arguments, named
):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith(f"error: {named} is {REMOTE}, which is not a local path: mount it"), said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "way_in",
    [
        lambda: medalign_jax.load_encoder("whisper", "gs://bucket/model.safetensors"),
        lambda: medalign_jax.load_teacher(Path("s3://bucket/model")),
        lambda: open_dataset("s3://bucket/metadata.csv"),
        lambda: read_manifest("s3://bucket/metadata.csv"),
        lambda: open_workdir(Path("gs://bucket/run"), ConfigDict()),
    ],
    ids=["encoder", "teacher", "data set", "manifest", "workdir"],
)
def test_so_do_the_functions(tmp_path, monkeypatch, way_in):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"bucket/.*not a local path: mount it"):
        way_in()
    assert not list(tmp_path.iterdir())


def test_a_row_that_names_one_is_told_by_its_number(tmp_path):
    manifest = tmp_path / "metadata.csv"
    with manifest.open("w", newline="") as file:
        csv.writer(file).writerows([("audio_path", "report"), ("s3://b/x.wav", "A murmur.")])
    rows, problems = read_manifest(manifest)
    fatal = [(problem.row, problem.reason[:43]) for problem in problems if problem.fatal]
    assert (rows, fatal) == ([], [(1, "audio_path is not a local path: mount it (g")])

    questions = tmp_path / "questions.jsonl"
    asked = {"audio": ["s3://b/x.wav"], "question": "What is it?", "answer": "A murmur."}
    questions.write_text(json.dumps(asked) + "\n")
    with pytest.raises(UserError, match=r"'s3://b/x\.wav' is not a local path: mount it"):
        read_questions(questions, checks=Checks())
