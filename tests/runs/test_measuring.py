"""What the config alone says wrong is told before anything is made, read or trained."""

from types import SimpleNamespace

import numpy as np
import pytest

from configs import acula, distill
from medalign_jax.core.errors import UserError
from medalign_jax.data.recordings.wordings import Reports
from medalign_jax.evaluate.stages import Settings
from medalign_jax.evaluate.suite import Options, Suite
from medalign_jax.runs import acula as experiment
from medalign_jax.runs import checks, measuring
from medalign_jax.runs.acula import options_of
from medalign_jax.runs.arms import arms_of
from medalign_jax.runs.measuring import check_settings
from medalign_jax.runs.parts.audio import architecture_of
from medalign_jax.runs.parts.distillation import check_settings as check_distillation
from medalign_jax.weights.load import save
from tests.evaluate.evaluation_rows import row, rows


def check(variant="demo", tasks=("label",), **changes):
    config = acula.get_config(variant)
    config.evaluate.tasks = tasks
    config.update_from_flattened_dict(changes)
    made, options = architecture_of(config), options_of(config)
    checks.check_alignment(config, made, arms_of(config, made.module.config.depth))
    suite = Suite.of(rows(age=lambda i: 30 + i % 7), options, "toy")
    check_settings(config, suite)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"evaluate.map": "procrustez"},
            r"map is 'procrustez' \(did you mean 'procrustes'",
        ),
        ({"evaluate.pad": "repat"}, r"evaluate\.pad is 'repat'.*repeat"),
        ({"evaluate.baselines": ("majority", "spectrall")}, "unknown baseline 'spectrall'"),
        ({"evaluate.pooling": "median"}, "unknown pooling 'median'"),
        ({"evaluate.layer": 99}, "99"),
        ({"evaluate.probes": ("linaer",)}, "unknown probe 'linaer'"),
        ({"evaluate.per_class": 500}, "500 labels of each class cannot be drawn"),
        ({"tasks": ("age",)}, "supervised.enabled: the first task, 'age', is a regression"),
        ({"tasks": ("lable",)}, "no recording has a value in column 'lable'"),
    ],
)
def test_a_slip_in_late_settings_is_told_at_first(changes, message):
    check()
    with pytest.raises(UserError, match=message):
        check(**changes)


def test_what_is_not_measured_needs_no_settings():
    check(**{"evaluate.enabled": False, "evaluate.map": "procrustez"})


def test_a_class_that_a_fold_trains_without_has_no_sentences_and_that_is_told_at_first():
    """Class c has two subjects, and where one is tested the other is kept for choices."""
    found = [row(i, label="c" if i in (0, 3) else "ab"[i % 2], subject_id=f"s{i}")
             for i in range(12)]  # fmt: skip
    config = acula.get_config("demo")
    config.evaluate.update({"folds": 3, "per_class": 0})
    suite = Suite.of(found, options_of(config), "toy", validation=True)
    with pytest.raises(UserError, match=r"'label', fold \d: .* no training recording is 'c'"):
        check_settings(config, suite)
    config.evaluate.sentences = False
    check_settings(config, suite)


class _Teacher:
    """The vector of "report 7" is (7, 1)."""

    def __init__(self):
        self.read = []

    def embed(self, texts):
        self.read += texts
        return np.array([[int(text.split()[1]), 1.0] for text in texts], np.float32)


@pytest.fixture
def folds():
    """A run of five folds whose recordings each have a report of their own."""
    found = [row(i, subject_id=f"s{i}", label="ab"[i % 2]) for i in range(40)]
    options = Options(("label",), folds=5, settings=Settings(per_class=0))
    suite = Suite.of(found, options, "toy", validation=True)
    parts = [SimpleNamespace(fold=fold, train_reports=Reports(()))
             for fold in suite.training_folds()]  # fmt: skip
    teacher = _Teacher()
    texts = SimpleNamespace(teacher=teacher, means=lambda reports: np.zeros((40, 2)))
    config = SimpleNamespace(
        evaluate=SimpleNamespace(sentences=True, map="procrustes"),
        reports=SimpleNamespace(use="first"), loss=SimpleNamespace(layers=(1,)),
    )  # fmt: skip
    data = SimpleNamespace(rows=found, reports=lambda i, count, seed: (f"report {i}",))
    reports = Reports(tuple((f"report {i}",) for i in range(40)))
    return SimpleNamespace(suite=suite, parts=parts, config=config, data=data, reports=reports,
                           texts=lambda config: texts, teacher=teacher)  # fmt: skip


def test_class_sentences_of_a_fold_are_reports_of_its_own_training_part(folds):
    words = measuring._words(folds)
    vectors = measuring._class_vectors(folds, words)
    embedded = {"before": [np.zeros((40, 3))] * 5}
    aligned = [SimpleNamespace(whitening=None)] * 5
    spaces = measuring._spaces(folds, embedded, aligned, vectors)["before"]
    answers = folds.suite.tasks[0].answers
    for part, space in zip(folds.parts, spaces, strict=True):
        train = part.fold.train
        expected = [train[answers[train] == c] for c in range(2)]
        least = min(map(len, expected))
        assert least >= 11
        for c, vectors in enumerate(space.class_text):
            assert vectors[:, 0].tolist() == expected[c][:least].tolist()
    assert len(folds.teacher.read) == len(set(folds.teacher.read))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer.schedule": "cosin"}, "schedule 'cosin'"),
        ({"augment.noise": 3.0}, "augment.noise must be a probability"),
        ({"data.pad": "zeros"}, "unknown pad 'zeros'"),
        ({"loss.ssm": "colla"}, "'colla' is not one of"),
        ({"mesh.tensor": 3}, "does not use"),
        ({"pretrain.changes.train": {"accumulate": 7}}, "multiple of train.accumulate 7"),
        ({"supervised.changes.optimizer.schedule": "flat"}, "schedule 'flat'"),
        ({"reports.use": "meen"}, "reports.use is 'meen' .*'mean'"),
        ({"reports.leave_out": ("diagnose",)}, "'diagnose', of which .*'diagnosis'"),
        ({"reports.pairing": "suffled"}, "reports.pairing is 'suffled' .*'shuffled'"),
        ({"teacher.mode": "onlin"}, "teacher.mode is 'onlin' .*'online'"),
        ({"teacher.mode": "online"}, "online reads one wording per step"),
        ({"teacher.source": "/nowhere/teacher"}, "/nowhere/teacher: no such file"),
        ({"teacher.dtype": "float7"}, "teacher.dtype is 'float7'.*bfloat16 or float32"),
        ({"teacher.layer": 99}, "hidden state 99 does not exist"),
        ({"teacher.pooling": "men"}, "pooling 'men'"),
        ({"evaluate.map": "none"}, "audio side has 96 numbers, .* whitening keeps of 384"),
        ({"evaluate.map": "none", "teacher.whiten": 0.0}, "has 96 numbers, the text side 384"),
        ({"loss.align": "l2", "teacher.whiten": 0.0}, r"l2 \(after\).* 96 numbers, .* 384"),
        ({"evaluate.pooling": "mean_std", "loss.audio_head": "mlp"}, "takes 96 .* gives 192"),
        ({"arms": {"x": {"loss": {"align": "cosine"}}}}, "loss.align=cosine compares"),
        ({"arms": {"x": {"teacher": {"source": "/nowhere"}}}}, "/nowhere: no such file"),
    ],
)  # fmt: skip
def test_every_part_is_built_before_anything_is_made(changes, message):
    with pytest.raises(UserError, match=message):
        check(**changes)


def test_weights_of_another_encoder_are_told_before_recordings_are_read(tmp_path):
    save(tmp_path / "model.safetensors", {"conv1.weight": np.zeros((2, 3), np.float32)})
    with pytest.raises(UserError, match="does not fit the table"):
        check(**{"encoder.source": str(tmp_path / "model.safetensors")})


def test_what_fits_is_taken():
    heads = {"loss.audio_head": "mlp", "loss.text_head": "mlp"}
    check(**heads, **{"evaluate.map": "none", "loss.align": "l2"})
    check(variant="demo+controls")
    check(**{"evaluate.map": "none", "evaluate.sentences": False})
    check(**{"evaluate.map": "none", "evaluate.aggregate": "subject"})


@pytest.mark.parametrize(
    ("tasks", "per_class", "message"),
    [
        (("label", "timming"), 0, "'timming'"),
        (("phase",), 300, "300"),
    ],
)
def test_tasks_of_simulated_recordings_are_checked_before_there_is_any_sound(
    tmp_path, tasks, per_class, message
):
    config = acula.get_config("demo")
    config.evaluate.update({"tasks": tasks, "per_class": per_class})
    with pytest.raises(UserError, match=message):
        experiment.run(config, tmp_path)
    assert not list(tmp_path.glob("simulated*/**/*.wav"))


def test_bands_need_tokens_of_several_bands():
    with pytest.raises(UserError, match="one band only"):
        check(**{"evaluate.pooling": "bands"})  # the demo's tokens hold all bands


def test_batches_that_a_training_split_does_not_fill():
    config = acula.get_config("demo")
    arms = arms_of(config, 4)
    train = rows()[:64]
    checks.check_fills(config, arms, train)
    with pytest.raises(UserError, match=r"63 training recordings fill no batch of 64 \(pretrain"):
        checks.check_fills(config, arms, train[:-1])
    config.pretrain.enabled = config.supervised.enabled = False
    config.data.one_per_subject = True
    subjects = len({row.subject_id for row in train})
    assert subjects < 64
    with pytest.raises(UserError, match=rf"{subjects} .*subjects.* of 64 \(after of fold 1\)"):
        checks.check_fills(config, arms_of(config, 4), train, "fold 1")
    config.data.mix = 10  # joins them
    checks.check_fills(config, arms_of(config, 4), train)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher.dtype": "float7"}, "teacher.dtype is 'float7'"),
        ({"optimizer.schedule": "cosin"}, "schedule 'cosin'"),
        ({"teacher.form": "lats"}, "teacher.form 'lats'"),
        ({"train.accumulate": 7}, "multiple of train.accumulate 7"),
        ({"loss.hidden": "jds"}, "jds"),
    ],
)
def test_slips_of_a_distillation(changes, message):
    config = distill.get_config("demo")
    check_distillation(config)
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        check_distillation(config)
