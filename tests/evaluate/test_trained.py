"""An encoder that was trained on what it is tested on is told."""

import json
import shutil

import numpy as np
import pytest

from medalign_jax.core.errors import UserError
from medalign_jax.data.recordings.dataset import open_dataset
from medalign_jax.evaluate.stages import Settings
from medalign_jax.evaluate.suite import Options, Suite
from medalign_jax.evaluate.trained import describe_trained
from medalign_jax.runs.recordings import bind_dataset
from tests.data import manifests

COUNT = 12


def made(folder):
    """Twelve recordings of as many subjects; the last four are the test split."""
    rows = [
        {"audio_path": manifests.write_wav(folder / f"{i}.wav", i), "subject_id": f"s{i}",
         "label": "ab"[i % 2], "split": "train" if i < 6 else "valid" if i < 8 else "test"}
        for i in range(COUNT)
    ]  # fmt: skip
    return open_dataset(manifests.write_csv(folder / "m.csv", rows), reports_required=False)


def suite_of(data, folds=0):
    options = Options(("label",), folds, settings=Settings(per_class=0))
    return Suite.of(data.rows, options, "toy", validation=bool(folds))


def workdir_of(folder, data, folds=()):
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    bind_dataset(folder, data, folds)
    return folder


@pytest.mark.parametrize("place", ["", "export", "arms/x/export", "pretrain/export"])
def test_the_split_of_the_run_decides(tmp_path, place):
    data = made(tmp_path)
    weights = workdir_of(tmp_path / "run", data) / place
    assert describe_trained("mine", str(weights), data, suite_of(data)) == ()
    (told,) = describe_trained("mine", str(weights), data, suite_of(data, folds=3))
    assert told.startswith("mine was trained, or chosen, on 8 of the 12 test recordings, e.g. '")
    assert "/0.wav'" in told


def test_each_fold_has_trained_on_recordings_of_its_own(tmp_path):
    data = made(tmp_path)
    folds = suite_of(data, folds=3).training_folds()
    run = workdir_of(tmp_path / "run", data, folds)
    for k, fold in enumerate(folds):
        splits = np.full(COUNT, "train", object)
        splits[fold.test] = "test"
        own, other = data.with_splits(splits), data.with_splits(np.roll(splits, 1))
        weights = str(run / f"fold_{k}" / "export")
        assert describe_trained("mine", weights, own, suite_of(own)) == ()
        leaking = len(np.setdiff1d((fold.test + 1) % COUNT, fold.test))
        (told,) = describe_trained("mine", weights, other, suite_of(other))
        assert f" {leaking} of the {len(fold.test)} test recordings" in told


def test_a_recording_is_known_by_its_sound_wherever_it_lies(tmp_path):
    (tmp_path / "there").mkdir()
    run = workdir_of(tmp_path / "run", made(tmp_path))
    for i in range(COUNT):
        shutil.copy(tmp_path / f"{i}.wav", tmp_path / "there" / f"{i}.wav")
    moved = made(tmp_path / "there")
    assert describe_trained("mine", str(run), moved, suite_of(moved, folds=3))
    content = (run / "recordings.jsonl").read_text().splitlines()
    kept = [json.loads(line) | {"sound": "another"} for line in content]
    (run / "recordings.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    assert describe_trained("mine", str(run), moved, suite_of(moved, folds=3)) == ()


def test_weights_without_a_run_tell_nothing_and_a_torn_list_is_refused(tmp_path):
    data = made(tmp_path)
    suite = suite_of(data, folds=3)
    assert describe_trained("theirs", "openai/whisper-base", data, suite) == ()
    run = workdir_of(tmp_path / "run", data)
    (run / "recordings.jsonl").write_text("{")
    with pytest.raises(UserError, match=r"run/recordings\.jsonl, of a run whose encoder"):
        describe_trained("mine", str(run), data, suite)
