"""``python -m medalign_jax.evaluate``: from files to results, and what it refuses at once."""

import csv
import json
import shutil
import time
from html.parser import HTMLParser

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from medalign_jax import embed
from medalign_jax.data.recordings.dataset import open_dataset
from medalign_jax.encoder import Encoder
from medalign_jax.evaluate.sources import sources_of
from medalign_jax.runs.evaluate import _random, main
from medalign_jax.runs.export import export_encoder
from medalign_jax.runs.recordings import bind_dataset
from tests.tiny_models import quick_jit
from tests.toy_encoders import toy

COUNT = 48  # recordings, two per subject


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Tones that say the label, and two encoders as exports."""
    folder = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    for name, seed in (("one", 0), ("two", 1)):
        made = toy("vit_mae_small")
        features, noise = np.zeros((1, 16, 64), np.float32), np.zeros((1, 16), np.float32)
        params = quick_jit(made.module.init)(jax.random.key(seed), features, noise)["params"]
        export_encoder(folder / name / "export", Encoder(made, params, samples=15 * 512))
    with open(folder / "metadata.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["audio_path", "subject_id", "split", "label", "age", "device", "name"])
        for i in range(COUNT):
            subject = i // 2
            label = subject % 2
            time_axis = np.arange(4000) / 4000
            tone = np.sin(2 * np.pi * (300 + 700 * label) * time_axis)
            soundfile.write(folder / f"{i}.wav", 0.2 * tone + 0.1 * rng.standard_normal(4000), 4000)
            split = ("train", "train", "test")[subject // 2 % 3]
            age = 30 + 20 * label + subject % 5
            row = [f"{i}.wav", f"s{subject}", split, "ab"[label], age, "xy"[subject // 4 % 2]]
            writer.writerow([*row, f"n{i}"])
    return folder


def run(world, out, *more, encoders=("one", "two")):
    given = [part for name in encoders for part in ("--encoder", str(world / name))]
    manifest = ["--manifest", str(world / "metadata.csv"), "--out", str(world / out)]
    return main([*given, *manifest, *more])


def results(world, out):
    content = json.loads((world / out / "evaluation.json").read_text())
    return {(r["task"], r["kind"], r["stage"], r["metric"]): r for r in content["results"]}


def test_encoders_side_by_side_with_baselines(world, capsys):
    assert run(world, "first", "--tasks", "label", "age", "--folds", "3") == 0
    found = results(world, "first")
    stages = {stage for (task, _, stage, _) in found if task == "label"}
    assert {
        "one", "two", "two minus one", "one, random weights", "metadata", "spectral statistics",
        "majority or mean", "nearest training waveform", "one minus spectral statistics",
    } <= stages  # fmt: skip
    assert found["label", "linear", "spectral statistics", "auroc"]["value"] > 0.95
    assert found["label", "linear", "majority or mean", "auroc"]["value"] == 0.5
    assert found["age", "linear", "spectral statistics", "mae"]["value"] < 8
    assert "from device" in found["label", "linear", "metadata", "auroc"]["notes"]
    with open(world / "first" / "evaluation.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == len(found)
    page = (world / "first" / "report.html").read_text()
    HTMLParser().feed(page)
    assert "default-src 'none'" in page and "two minus one" in page
    assert "spectral statistics" in capsys.readouterr().out


def test_a_second_run_embeds_nothing_and_takes_other_tasks(world, capsys):
    more = ("--cache", str(world / "first" / "embeddings"), "--aggregate", "subject")
    assert run(world, "second", "--tasks", "device", "--folds", "4", *more) == 0
    assert "embedding:" not in capsys.readouterr().err
    (value,) = [
        r for k, r in results(world, "second").items() if k[1:] == ("linear", "one", "auroc")
    ]
    assert value["n_test"] == COUNT // 2


def test_embeddings_made_elsewhere_stand_beside_or_alone(world, capsys):
    table = world / "theirs.parquet"
    files = [str(world / f"{i}.wav") for i in range(COUNT)]
    embed.main(["--checkpoint", str(world / "one"), "--out", str(table), *files])
    assert run(world, "third", "--baselines", encoders=("one", "theirs.parquet")) == 0
    found = results(world, "third")
    own, theirs = (found["label", "linear", name, "auroc"] for name in ("one", "theirs"))
    assert own["value"] == pytest.approx(theirs["value"], abs=1e-6)
    capsys.readouterr()
    command = ["--embeddings", str(table), "--tasks", "label", "--out", str(world / "fourth")]
    assert main(command) == 1
    assert "no recording has a value in column 'label'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--tasks", "lable"), "lable"),
        (("--tasks", "name"), "48 classes for 48 recordings"),
        (("--tasks", "label", "--folds", "30"), "30 folds of 24 subjects"),
        (("--tasks", "label", "--per_class", "20"), "20 labels of each class"),
        (("--tasks", "label", "--baselines", "spectrum"), "did you mean 'spectral'"),
        (("--tasks", "label", "--metadata", "label"), "may not read 'label', which is asked for"),
        (("--tasks", "age", "--metadata", "age"), "may not read 'age', which is asked for"),
        (("--seed", "-1"), "seed is -1; a seed is 0 or more"),
        (("--probes", "linear", "linear"), "'linear' is named twice"),
        (("--encoder", "nowhere"), "nothing at 'nowhere'"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_decoded(world, capsys, more, message):
    begun = time.process_time()
    assert run(world, "refused", *more) == 1
    assert message in capsys.readouterr().err
    assert time.process_time() - begun < 2
    assert not (world / "refused").exists()


def test_a_folder_in_the_place_of_a_result(world, capsys):
    (world / "blocked" / "report.html").mkdir(parents=True)
    assert run(world, "blocked", "--tasks", "label") == 1
    assert "report.html is a folder, and a file of that name" in capsys.readouterr().err


def sources_refused(world, capsys, source):
    """What is said of an encoder, in little time, and with nothing decoded."""
    begun = time.process_time()
    assert run(world, "refused", "--encoder", source, encoders=()) == 1
    told = capsys.readouterr()
    assert "checking" not in told.err and not (world / "refused").exists()
    assert time.process_time() - begun < 4
    return told.err


def test_an_encoder_that_does_not_load_is_refused_before_anything_is_decoded(world, capsys):
    one = str(world / "one")
    assert "there is no layer 99" in sources_refused(world, capsys, f"{one}#layer=99")
    told = sources_refused(world, capsys, f"whisper={one}")
    assert f"--encoder {one}" in told and "'vit_mae_small' encoder, not 'whisper'" in told
    empty = world / "empty"
    empty.mkdir()
    assert str(empty) in sources_refused(world, capsys, f"whisper={empty}")
    export = world / "cut" / "export"
    shutil.copytree(world / "one" / "export", export)
    settings = json.loads((export / "encoder.json").read_text())
    settings["overrides"]["width"] = 64
    (export / "encoder.json").write_text(json.dumps(settings))
    (export / "medalign.sha256").unlink()  # else that is what is said
    assert "does not fit the table" in sources_refused(world, capsys, str(world / "cut"))
    table = world / "nameless.parquet"
    pq.write_table(pa.table({"embedding": [[1.0]]}), table)
    assert "no column audio_path" in sources_refused(world, capsys, str(table))


def test_random_weights_stand_beside_each_kind_of_encoder(world):
    made = {}
    for source in ("one", "two", "one#layer=0"):
        (given,) = sources_of([str(world / source)])
        made[given.name] = given.load(None)
    assert list(_random(made, 0)) == ["one, random weights", "one (layer 0), random weights"]


def test_an_encoder_that_was_trained_on_the_test_recordings_is_told(world, capsys):
    run_folder = world / "own"
    shutil.copytree(world / "one", run_folder)
    (run_folder / "config.json").write_text("{}")
    bind_dataset(run_folder, open_dataset(world / "metadata.csv", reports_required=False))
    asked = ("--folds", "3", "--ignore_copies", "--baselines", "majority", "--tasks", "label")
    assert run(world, "own_results", *asked, encoders=("own", "two")) == 0
    told = "own was trained, or chosen, on 32 of the 48 test recordings"
    assert told in capsys.readouterr().out
    content = json.loads((world / "own_results" / "evaluation.json").read_text())
    (kept,) = content["provenance"]["trained_on_tested"]
    assert kept.startswith(told) and told in (world / "own_results" / "report.html").read_text()
