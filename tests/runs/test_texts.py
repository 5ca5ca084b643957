"""Reports that leave something out, and whitening that keeps too little."""

import numpy as np
import pytest

from configs import acula
from medalign_jax.core.errors import UserError
from medalign_jax.data.recordings.wordings import Reports, TextColumn, report_marks
from medalign_jax.losses.contrastive import same_rows
from medalign_jax.runs import acula as experiment
from medalign_jax.runs.arms import arms_of
from medalign_jax.runs.texts import Texts, check_reports
from tests.runs.tiny_config import tiny


def whitening(leave_out, classes=6):
    """Of 40 recordings, 4 different reports at right angles: three directions."""
    names = "abcd"
    texts = Texts(None, np.eye(4, 7, dtype=np.float32), {name: i for i, name in enumerate(names)})
    reports = Reports(tuple((names[i % 4],) for i in range(40)))
    config = acula.get_config("patients")
    config.reports.leave_out = leave_out
    return texts.whitening(config, reports, classes)


def test_reports_that_leave_something_out_need_not_tell_the_classes_apart():
    with pytest.raises(UserError, match="6 classes cannot be told apart in fewer than 5"):
        whitening(())
    assert whitening(("diagnosis",)).width == 3


def test_what_the_reports_of_an_arm_do_not_allow_is_told_before_anything_is_trained(
    tmp_path, monkeypatch
):
    def start(part):
        raise AssertionError("training has begun")

    monkeypatch.setattr(experiment, "starting_params", start)
    config = tiny()
    config.data.update({"simulated": 48, "simulated_seconds": 2.0, "simulated_kinds": ("heart",)})
    config.arms.update({"one direction": {"teacher": {"whiten": 0.01}}})
    with pytest.raises(UserError, match=r"whiten=0\.01 keeps 1 of 384 directions"):
        experiment.run(config, tmp_path)


def test_recordings_of_the_same_wordings_have_one_mark():
    """Whatever wording a batch draws, and in both parts of a fold."""
    train = tuple(np.array(rows) for rows in ([0, 1], [2, 3], [0, 1]))
    valid = (np.array([2, 3]), np.array([4, 5]))
    marks, others = report_marks(train, valid)
    assert marks.shape == (3, 8) and others.shape == (2, 8)
    assert np.array_equal(marks[0], marks[2]) and np.array_equal(marks[1], others[0])
    assert np.array_equal(same_rows(np.concatenate([marks[:2], others[1:]])), np.eye(3))
    column = TextColumn({"text": np.arange(12.0).reshape(6, 2)}, train, "fresh", marks)
    rng = np.random.default_rng(0)
    drawn = [column(0, rng) for _ in range(20)]
    assert {tuple(one["text"]) for one in drawn} == {(0.0, 1.0), (2.0, 3.0)}
    assert all(np.array_equal(one["report"], marks[0]) for one in drawn)
    assert set(TextColumn(column.arrays, train, "mean")(1, rng)) == {"text"}


def test_leaving_everything_out_is_refused():
    config = tiny()
    config.arms.update({"silent": {"reports": {"leave_out": ("diagnosis", "posture")}}})
    silent = arms_of(config, 1)[1]
    check_reports(silent, Reports((("a", "b"), ("a", "c"))))
    with pytest.raises(UserError, match=r"leave_out \(silent\): without diagnosis, posture the"):
        check_reports(silent, Reports((("a", "b"), ("a", "b"))))
