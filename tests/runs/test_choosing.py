"""Each fold chooses its alignment on recordings that it neither trains nor tests on."""

import csv
import json

import numpy as np
import pytest

from configs import acula
from medalign_jax.core.errors import UserError
from medalign_jax.data.recordings.manifest import Row
from medalign_jax.datasets.simulated.simulate import write_dataset
from medalign_jax.evaluate.stages import Settings
from medalign_jax.evaluate.suite import Options, Suite
from medalign_jax.runs import acula as experiment
from medalign_jax.runs.arms import arms_of
from medalign_jax.runs.choosing import settle, validation_scores
from medalign_jax.runs.measuring import check_sentences
from tests.runs.tiny_config import tiny

SUBJECTS, EACH = 30, 2


def suite_of(folds=3, tasks=("sick", "age"), rows=None) -> Suite:
    options = Options(tasks, folds, aggregate="subject", settings=Settings(per_class=0))
    return Suite.of(rows or patients(), options, "made up", validation=True)


def patients(split=lambda subject: "") -> list[Row]:
    """Every second subject is sick, and older."""
    rows = []
    for i in range(SUBJECTS * EACH):
        subject = i // EACH
        sick, age = "ny"[subject % 2], 20 + subject + 30 * (subject % 2)
        rows.append(
            Row(
                row=i, audio_path=f"{i}.wav", subject_id=f"s{subject:02d}", split=split(subject),
                label="", metadata={}, report="", targets={"sick": sick, "age": str(age)},
            )
        )  # fmt: skip
    return rows


def arms(**roles):
    config = acula.get_config("small")
    for name, role in roles.items():
        config.arms[name] = {"role": role, "train": {"steps": len(config.arms) + 7}}
    return arms_of(config, 4)


def telling(rng, where, strength=9.0):
    """Features (N, 4) that tell the sick apart in the recordings `where`, elsewhere noise."""
    x = rng.standard_normal((SUBJECTS * EACH, 4))
    sick = np.arange(SUBJECTS * EACH) // EACH % 2
    x[where, 0] += strength * sick[where]
    return x


def test_what_tells_validation_subjects_apart_is_chosen_fold_by_fold():
    rng = np.random.default_rng(0)
    suite = suite_of(tasks=("sick",))
    training = suite.training_folds()
    everywhere, nowhere = np.arange(SUBJECTS * EACH), np.zeros(0, int)
    good = [telling(rng, everywhere) for _ in range(3)]
    bad = [telling(rng, nowhere) for _ in range(3)]
    found = {
        "before": bad,
        "after": [good[0], bad[1], bad[2]],
        "other": [bad[0], good[1], bad[2]],
        # Good on the test recordings alone: no reason to be chosen.
        "seer": [telling(rng, fold.test, 30.0) for fold in training[:2]] + [good[2]],
        "shuffled": bad,
    }
    kept = found["after"][0], found["other"][1], found["seer"][2]
    chosen = settle(suite, arms(other="candidate", seer="candidate", shuffled="control"), found)
    assert chosen.names == ("after", "other", "seer")
    assert list(found) == ["before", "after", "shuffled"]
    assert all(a is b for a, b in zip(found["after"], kept, strict=True))
    assert [set(scores) for scores in chosen.scores] == [{"after", "other", "seer"}] * 3
    assert chosen.describe().startswith(
        "chosen on validation subjects of fold 0: after 1.000 (others "
    )


def test_test_recordings_have_no_say():
    rng = np.random.default_rng(1)
    suite = suite_of()
    x = telling(rng, np.arange(SUBJECTS * EACH))
    for fold, rows in zip(suite.choice_folds(), suite.training_folds(), strict=True):
        other = x.copy()
        other[rows.test] = rng.standard_normal((len(rows.test), 4))
        assert validation_scores(suite, fold, {"x": x}) == validation_scores(
            suite, fold, {"x": other}
        )


def test_numbers_count_by_their_error():
    suite = suite_of(tasks=("age:regression",))
    ages = np.array([float(row.targets["age"]) for row in patients()])
    rng = np.random.default_rng(2)
    noise = rng.standard_normal((len(ages), 3))
    told = np.column_stack([ages, noise])
    scores = validation_scores(suite, suite.choice_folds()[0], {"told": told, "noise": noise})
    assert -0.05 < scores["told"] <= 0 and scores["noise"] < -0.5


def test_nothing_is_chosen_without_candidates():
    suite = suite_of()
    found = {"before": [1, 2, 3], "after": [4, 5, 6]}
    chosen = settle(suite, arms(shuffled="control"), found)
    assert chosen.names == ("after",) * 3 and chosen.describe() == ""
    assert found == {"before": [1, 2, 3], "after": [4, 5, 6]}


def test_validation_subjects_of_one_class_are_refused():
    def split(subject):
        if subject >= SUBJECTS - 4:
            return "test"
        return "valid" if subject % 4 == 2 else "train"

    rows = patients(split)
    suite = suite_of(folds=0, tasks=("sick",), rows=rows)
    with pytest.raises(UserError, match="no task has two answers among the validation"):
        validation_scores(suite, suite.choice_folds()[0], {"x": np.zeros((len(rows), 2))})


@pytest.mark.parametrize(
    ("loss", "role", "message"),
    [
        ({}, "candidate", r"candidates \(x\) may have other teachers"),
        ({"audio_head": "standardise"}, "control", "loss.audio_head=standardise has no map"),
    ],
)
def test_sentences_are_refused_where_they_would_be_compared_wrongly(loss, role, message):
    config = acula.get_config("small")
    config.loss.update(loss)
    config.arms["x"] = {"role": role, "train": {"steps": 3}}
    with pytest.raises(UserError, match=message + ".*set evaluate.sentences=False"):
        check_sentences(config, arms_of(config, 4))
    config.evaluate.sentences = False
    check_sentences(config, arms_of(config, 4))


@pytest.mark.slow
def test_a_run_with_one_model_per_fold_chosen_among_candidates(tmp_path):
    folder = tmp_path / "data"
    manifest = write_dataset(folder, 48, 0, seconds=2.0, kinds=("heart",))
    with open(manifest, newline="") as file:
        rows = list(csv.DictReader(file))
    for i, row in enumerate(rows):
        row |= {"subject_id": f"p{i // 2}", "sick": str(i // 2 % 2)}
        del row["split"]
    with open(manifest, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    config = tiny()
    config.data.manifest = str(manifest)
    config.data.one_per_subject = True
    config.pretrain.enabled = config.supervised.enabled = False
    config.loss.update({"audio_head": "none", "text_head": "none"})
    config.teacher.whiten = 0.0
    config.arms.update({  # none needs a program of its own
        "one wording": {"reports": {"use": "first"}, "role": "candidate"},
        "shuffled reports": {"reports": {"pairing": "shuffled"}},
        # Texts that the run's own alignment does not read.
        "other reports": {"reports": {"wordings": 9, "leave_out": ("heart_rate",)}},
    })  # fmt: skip
    config.evaluate.update({
        "tasks": ("sick",), "folds": 3, "aggregate": "subject", "probes": ("linear",),
        "per_class": 0, "sentences": False, "baselines": (), "pooling": "mean_std",
    })  # fmt: skip
    workdir = tmp_path / "run"
    experiment.run(config, workdir)
    results = json.loads((workdir / "evaluation.json").read_text())["results"]
    stages = {r["stage"]: r for r in results}
    assert {"before", "after", "shuffled reports", "after minus before"} <= stages.keys()
    assert "one wording" not in stages  # candidates are not looked at on test recordings
    assert all(stages[name]["n_test"] == 24 for name in ("before", "after"))
    assert "chosen on validation subjects of fold 0: " in stages["after"]["notes"]
    # The card says so too, and what candidates aligned with is not taken for the run's own.
    export = workdir / "fold_0" / "export"
    assert "chosen on validation subjects of fold 0: " in (export / "README.md").read_text()
    assert "hosen on validation subjects of fold 0: " in (workdir / "report.html").read_text()
    assert not (export / "space.json").exists()
    chosen = stages["after"]["notes"].partition("subjects of ")[2].split("; ")
    for fold in range(3):
        name = "arms/one_wording" if chosen[fold].startswith(f"fold {fold}: one wording") else ""
        folder = workdir / f"fold_{fold}"
        exports = [folder / place / "export/encoder.safetensors" for place in ("", name)]
        assert exports[0].read_bytes() == exports[1].read_bytes()
        arms = ("", "arms/one_wording", "arms/shuffled_reports", "arms/other_reports")
        made = {(folder / arm / "export/encoder.safetensors").read_bytes() for arm in arms}
        assert len(made) == len(arms) - (chosen[fold].startswith(f"fold {fold}: one wording"))
