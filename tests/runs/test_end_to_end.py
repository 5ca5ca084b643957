"""The contract of a workdir, from a config to the page, on a tiny encoder and simulated sounds."""

import csv
import json
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest

import medalign_jax
from configs import pretrain as pretrain_config
from medalign_jax.core.errors import UserError
from medalign_jax.runs import acula as experiment
from medalign_jax.runs import pretrain as pretrain_experiment
from medalign_jax.train.metrics import read_metrics
from medalign_jax.train.monitors import TrainingStoppedError
from medalign_jax.weights.readers import open_safetensors
from tests.runs.tiny_config import tiny

pytestmark = pytest.mark.slow


def test_workdir_holds_what_the_contract_names(finished):
    for name in ("config.json", "metrics.jsonl", "evaluation.json", "report.html"):
        assert (finished / name).stat().st_size > 0, name
    assert any((finished / "tensorboard").iterdir())
    steps = {int(p.name) for p in (finished / "checkpoints").iterdir() if p.name.isdigit()}
    assert 4 in steps
    provenance = json.loads((finished / "config.json").read_text())["provenance"]
    assert len(provenance["teacher_weights"]) == 64 and provenance["packages"]["jax"]


def test_metrics_have_the_named_columns(finished):
    lines = read_metrics(finished / "metrics.jsonl")
    training = next(line for line in lines if "loss" in line)
    wanted = {
        "loss", "align", "cka", "reconstruction", "learning_rate", "grad_norm",
        "embedding_variance", "effective_rank", "samples_per_second", "data_wait",
    }  # fmt: skip
    assert wanted <= training.keys()
    assert any("valid/cka" in line for line in lines)


def test_evaluation_has_stages_and_baselines_with_intervals(finished):
    content = json.loads((finished / "evaluation.json").read_text())
    assert content["provenance"]["teacher_weights"]
    none = "No two of the 60 recordings are near-copies of each other."
    assert content["provenance"]["near_copies"] == [none]
    assert content["provenance"]["alike_subjects"] == []
    assert none in (finished / "report.html").read_text()
    stages = {r["stage"]: r for r in content["results"] if r["kind"] == "linear"}
    assert {
        "before", "after", "supervised", "after minus before", "random weights",
        "majority or mean", "spectral statistics", "nearest training waveform",
        "after minus spectral statistics",
    } <= stages.keys()  # fmt: skip
    assert all(r["ci_low"] <= r["value"] <= r["ci_high"] for r in stages.values() if r["ci_low"])
    kinds = {r["kind"] for r in content["results"]}
    assert {"linear_2_labels", "opera", "opera_2_labels", "retrieval"} <= kinds
    (sentence,) = [
        r for r in content["results"]
        if (r["kind"], r["stage"], r["metric"]) == ("nearest_sentence", "after", "accuracy")
    ]  # fmt: skip
    assert sentence["n_train"] == 42 and "the most frequent class alone" in sentence["notes"]
    assert (finished / "evaluation.csv").read_text().count("\n") == len(content["results"]) + 1


def test_page_is_whole_and_self_contained(finished):
    page = (finished / "report.html").read_text()
    HTMLParser().feed(page)
    assert "default-src 'none'" in page, "nothing is loaded"
    assert page.count("<audio") >= 3


def test_export_loads_as_the_encoder_that_was_measured(finished):
    encoder = medalign_jax.load_encoder(None, finished)
    assert encoder.width == 32
    one = encoder.embed([np.sin(np.arange(9000, dtype=np.float32))], sample_rate=8000)
    assert one.shape == (1, 32) and np.isfinite(one).all()
    names = open_safetensors(finished / "export" / "encoder.safetensors")
    assert "blocks.0.attn.qkv.weight" in names and "decoder_pred.bias" in names
    heads = open_safetensors(finished / "export" / "heads.safetensors")
    assert heads["audio_last.layers.3.weight"].shape == (16, 32)


def test_starting_again_trains_nothing_and_changes_nothing(finished):
    before = (finished / "metrics.jsonl").read_text()
    results = json.loads((finished / "evaluation.json").read_text())["results"]
    experiment.run(tiny(), finished)
    assert (finished / "metrics.jsonl").read_text() == before
    assert json.loads((finished / "evaluation.json").read_text())["results"] == results


def test_another_config_in_the_same_workdir_is_refused(finished):
    config = tiny()
    config.optimizer.learning_rate = 0.5
    with pytest.raises(UserError, match=r"optimizer\.learning_rate: .* there, 0\.5 now"):
        experiment.run(config, finished)


def with_splits_exchanged(manifest, target):
    """The same recordings, with training and test subjects exchanged."""
    other = {"train": "test", "test": "train"}
    rows = list(csv.DictReader(manifest.open()))
    for row in rows:
        row["split"] = other.get(row["split"], row["split"])
        row["audio_path"] = str(manifest.parent / row["audio_path"])
    with target.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(target)


def test_other_splits_of_the_same_recordings_are_refused(finished, tmp_path):
    config = tiny()
    manifest = finished / "simulated" / "metadata.csv"
    config.data.manifest = with_splits_exchanged(manifest, tmp_path / "metadata.csv")
    page = (finished / "report.html").read_bytes()
    words = (
        r"54 of 60 are changed, the first: row 1 \('.*sim6-00000-0\.wav'\): split train there, test"
    )
    with pytest.raises(UserError, match=words):
        experiment.run(config, finished)
    assert (finished / "report.html").read_bytes() == page


def test_a_finished_run_is_measured_otherwise_lengthened_and_given_an_arm(finished, tmp_path):
    workdir = tmp_path / "more"
    shutil.copytree(finished, workdir)
    before = read_metrics(workdir / "pretrain" / "metrics.jsonl")
    config = tiny()
    config.evaluate.update({"map": "none", "probes": ("knn",), "per_class": 0, "baselines": ()})
    config.train.steps = 6
    config.arms.update({"no self-supervised term": {"loss": {"ssm_weight": 0.0}}})
    config.supervised.enabled = False
    experiment.run(config, workdir)
    trained = [line["step"] for line in read_metrics(workdir / "metrics.jsonl") if "loss" in line]
    assert trained == [1, 2, 3, 4, 5, 6]
    assert read_metrics(workdir / "pretrain" / "metrics.jsonl") == before
    assert (
        read_metrics(workdir / "metrics.jsonl")[:4] == read_metrics(finished / "metrics.jsonl")[:4]
    )
    results = json.loads((workdir / "evaluation.json").read_text())["results"]
    assert {"no self-supervised term", "after"} <= {r["stage"] for r in results}
    assert "knn" in {r["kind"] for r in results}
    (entry,) = json.loads((workdir / "config.json").read_text())["changes"]
    assert entry["changed"]["train.steps"] == [4, 6]


def test_the_advice_after_numbers_that_are_not_finite_works(finished, tmp_path):
    config = tiny()
    config.data.manifest = str(finished / "simulated" / "metadata.csv")
    config.encoder.source = str(finished / "pretrain")
    config.pretrain.enabled = config.supervised.enabled = config.evaluate.enabled = False
    config.train.eval_every = 1
    config.optimizer.learning_rate = 1e25
    workdir = tmp_path / "run"
    with pytest.raises(TrainingStoppedError, match=r"Lower optimizer\.learning_rate.*--restart"):
        experiment.run(config, workdir)
    config.optimizer.learning_rate = 1e-3
    with pytest.raises(UserError, match=r"learning_rate: 1e\+25 there, 0\.001 now(.|\n)*--restart"):
        experiment.run(config, workdir)
    experiment.run(config, workdir, restart=True)
    assert (workdir / "earlier_runs" / "1" / "metrics.jsonl").is_file()
    assert [line["step"] for line in read_metrics(workdir / "metrics.jsonl")][-1] == 4


def test_online_teacher_with_simulated_recordings_mixed_in(finished, tmp_path):
    """The language model in the step, one fresh wording each time; the same files of a workdir."""
    config = tiny()
    config.teacher.mode = "online"
    config.reports.use = "fresh"
    config.data.update({"manifest": str(finished / "simulated" / "metadata.csv"), "mix": 20})
    config.encoder.source = str(finished / "pretrain")
    config.supervised.enabled = False
    config.evaluate.update(
        {"sentences": False, "probes": ("linear",), "per_class": 0, "baselines": ()}
    )
    experiment.run(config, tmp_path / "online")
    lines = read_metrics(tmp_path / "online" / "metrics.jsonl")
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 4 and np.isfinite(losses).all() and len(set(losses)) == 4
    assert (tmp_path / "online" / "simulated_mix" / "metadata.csv").exists()
    provenance = json.loads((tmp_path / "online" / "config.json").read_text())["provenance"]
    assert len(provenance["encoder_weights"]) == 64
    stages = {
        r["stage"] for r in json.loads((tmp_path / "online/evaluation.json").read_text())["results"]
    }
    assert {"before", "after", "after minus before"} <= stages


def test_online_teacher_cannot_average_wordings(finished, tmp_path):
    config = tiny()
    config.teacher.mode = "online"
    config.data.manifest = str(finished / "simulated" / "metadata.csv")
    config.encoder.source = str(finished / "pretrain")
    with pytest.raises(UserError, match=r"reports\.use=fresh"):
        experiment.run(config, tmp_path / "refused")


def test_pre_training_as_a_run_of_its_own(finished, tmp_path):
    """It gives the very encoder that the first stage of AcuLa gives."""
    config = pretrain_config.get_config("demo")
    whole = tiny()
    for block in ("data", "encoder"):
        config[block] = whole[block]
    config.train.update(whole.pretrain.changes.train)
    config.data.manifest = str(finished / "simulated" / "metadata.csv")
    config.train.log_every = 1
    pretrain_experiment.run(config, tmp_path / "alone")
    names = open_safetensors(tmp_path / "alone" / "export" / "encoder.safetensors")
    stage = open_safetensors(finished / "pretrain" / "export" / "encoder.safetensors")
    assert names.keys() == stage.keys()
    for name in names:
        np.testing.assert_array_equal(names[name].read(), stage[name].read(), err_msg=name)
    assert medalign_jax.load_encoder(None, tmp_path / "alone").width == 32
