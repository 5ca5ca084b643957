"""What may change between two starts in one workdir, and what is refused with what changed."""

import json
import os

import pytest
from ml_collections import ConfigDict

from medalign_jax.core.errors import UserError
from medalign_jax.core.locks import LockedError
from medalign_jax.runs.identity import compare_recordings, recording
from medalign_jax.runs.workdir import (
    alone,
    begin_anew,
    bind,
    bind_recordings,
    note_provenance,
    open_workdir,
    record_config,
    set_aside,
)


def config(**changes):
    made = ConfigDict(
        {
            "method": "acula",
            "seed": 0,
            "data": {"manifest": "a.csv", "seconds": 2.0, "workers": 0},
            "encoder": {"overrides": {"depth": 2}},
            "teacher": {"source": "t", "others": ()},
            "mesh": {"data": -1},
            "train": {"steps": 10, "epochs": 5, "log_every": 1, "batch_size": 8, "accumulate": 1},
            "optimizer": {"learning_rate": 1e-3},
            "pretrain": {"enabled": True, "changes": {"train": {"steps": 5}}},
            "supervised": {"enabled": True, "changes": {"train": {"steps": 5}}},
            "arms": {"one": {"loss": {"ssm_weight": 0.0}}, "plain": {}},
            "evaluate": {"map": "procrustes", "tasks": ("label",)},
        },
        convert_dict=True,
    )
    with made.unlocked():
        made.update_from_flattened_dict(changes)
    return made


def train(folder) -> None:
    (folder / "checkpoints" / "4").mkdir(parents=True)


@pytest.fixture
def begun(tmp_path):
    open_workdir(tmp_path, config())
    train(tmp_path)
    return tmp_path


def start(folder, config, defaults=None) -> None:
    """As a run does; between the two it sees to its data."""
    open_workdir(folder, config, defaults)
    record_config(folder, config, defaults)


def saved(folder) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(
    "changes",
    [
        {"evaluate.map": "none"},
        {"evaluate.tasks": ("label", "age")},
        {"mesh.data": 2},
        {"train.log_every": 5},
        {"train.accumulate": 2},
        {"train.steps": 20},
        {"data.workers": 3},
        {"data.manifest": "moved/a.csv"},
        {"teacher.others": ("u",)},
        {"arms.two": ConfigDict({"loss": {"align": "l2"}})},
        {"arms.one.role": "candidate"},
        {"supervised.enabled": False},
        {"supervised.changes.train.steps": 9},  # it was not trained yet
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_changes_nothing_that_was_trained_is_taken_and_recorded(begun, changes, capsys):
    start(begun, config(**changes))
    (key,) = changes
    assert f"{key}" in capsys.readouterr().out
    (entry,) = saved(begun)["changes"]
    assert all(name.startswith(key) for name in entry["changed"])
    assert saved(begun)["config"] == json.loads(config(**changes).to_json_best_effort())
    start(begun, config(**changes))  # the same again is not a change
    assert len(saved(begun)["changes"]) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 1}, "seed: 0 there, 1 now"),
        ({"optimizer.learning_rate": 0.5}, r"learning_rate: 0\.001 there, 0\.5 now"),
        ({"data.seconds": 3.0}, r"data\.seconds: 2\.0 there, 3\.0 now"),
        ({"train.steps": 4}, r"train\.steps: 10 there, 4 now \(it may only grow\)"),
        ({"encoder.overrides.width": 64}, r"encoder\.overrides\.width: \(absent\) there, 64 now"),
        ({"pretrain.changes.train.steps": 9}, r"pretrain\.changes\.train\.steps: 5 there, 9 now"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_decides_the_result_is_refused_by_name(begun, changes, words):
    before = saved(begun)
    with pytest.raises(UserError, match=words):
        open_workdir(begun, config(**changes))
    assert saved(begun) == before


def test_more_steps_would_lengthen_a_pretraining_that_has_none_of_its_own(tmp_path):
    short = config()
    del short.pretrain.changes["train"]
    open_workdir(tmp_path, short)
    train(tmp_path)
    short.train.steps = 20
    with pytest.raises(UserError, match=r"train\.steps: 10 there, 20 now \(pre-training"):
        open_workdir(tmp_path, short)


@pytest.mark.parametrize("stage", ["arms/one", "fold_1/arms/one"])
def test_an_arm_may_change_until_it_is_trained(begun, stage):
    changed = config(**{"arms.one.loss.ssm_weight": 0.5})
    start(begun, changed)
    train(begun / stage)
    with pytest.raises(UserError, match=rf"ssm_weight: 0\.5 there, 0\.0 now \(remove .*{stage} to"):
        open_workdir(begun, config())
    without = config()
    del without.arms["one"]
    open_workdir(begun, without)  # leaving it out changes no other arm


def test_an_arm_that_went_and_comes_back_otherwise_is_refused(begun):
    bind(begun, "arms/one", **{"arm one": "a" * 16})
    train(begun / "arms" / "one")
    bind(begun, "arms/one", **{"arm one": "a" * 16})
    with pytest.raises(UserError, match=r"arms/one was begun with others: arm one aaa.*bbb"):
        bind(begun, "arms/one", **{"arm one": "b" * 16})


def test_a_key_of_a_newer_version_counts_as_its_default(begun):
    content = saved(begun)
    del content["config"]["evaluate"]["map"], content["config"]["teacher"]["others"]
    del content["config"]["optimizer"]["learning_rate"]
    (begun / "config.json").write_text(json.dumps(content))
    changed = config(**{"optimizer.learning_rate": 0.5})
    with pytest.raises(UserError, match=r"learning_rate: 0\.001 there, 0\.5 now"):
        open_workdir(begun, changed, defaults=config())
    start(begun, config(), defaults=config())
    assert "changes" not in saved(begun)


def test_before_the_first_checkpoint_everything_may_change(tmp_path):
    open_workdir(tmp_path, config())
    note_provenance(tmp_path, recordings=3)
    bind_recordings(tmp_path, [recording("a", "1", split="train")])
    open_workdir(tmp_path, config(seed=1))
    assert saved(tmp_path)["config"]["seed"] == 1
    assert "recordings" not in saved(tmp_path)["provenance"]
    bind_recordings(tmp_path, [recording("b", "2", split="train")])


def test_other_weights_are_refused_where_something_was_trained(begun):
    bind(begun, shown=True, teacher_weights="a" * 64)
    assert saved(begun)["provenance"]["teacher_weights"] == "a" * 64
    with pytest.raises(UserError, match=r"teacher weights aaaaaaaaaaaaaaaa there, bbbb"):
        bind(begun, teacher_weights="b" * 64)


ROWS = [recording(f"{i}.wav", f"sound {i}", split="train", reports=[f"r{i}"]) for i in range(5)]


def changed(row: int, **values) -> list:
    return [record | values if i == row else record for i, record in enumerate(ROWS)]


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (changed(3, split="test"), r"1 of 5 are changed, the first: row 4 \('3.wav'\): split train "
         "there, test now"),
        (changed(1, sound="x"), r"1 of 5 are changed, the first: row 2 \('1.wav'\): another sound"),
        (changed(0, reports="x"), r"row 1 \('0.wav'\): other reports"),
        (ROWS[:1] + ROWS[3:], r"2 of 5 are not there any more, the first: '1.wav'"),
        ([*ROWS, recording("9.wav", "9")], r"1 of 6 are new, the first: '9.wav'"),
        ([ROWS[0], ROWS[2], ROWS[1], *ROWS[3:]], r"another order from row 2 \('2.wav'\) on"),
    ],
)  # fmt: skip
def test_other_recordings_are_refused_with_how_many_and_which_first(begun, now, words):
    bind_recordings(begun, ROWS)
    bind_recordings(begun, ROWS)
    with pytest.raises(UserError, match=f"was begun with other recordings: .*{words}"):
        bind_recordings(begun, now)
    bind_recordings(begun, ROWS)  # the refused ones were not remembered


def test_names_that_are_not_utf8_are_remembered(begun):
    name = os.fsdecode(b"souffl\xe9/1.wav")
    rows = [recording(name, "a:1.0", split="train"), recording("é.wav", "b:1.0", split=name)]
    bind_recordings(begun, rows)
    bind_recordings(begun, rows)  # as they were
    with pytest.raises(UserError, match="other recordings"):
        bind_recordings(begun, rows[:1])


def test_recordings_may_move_and_be_told_more_of():
    moved = [record | {"name": f"/else/{record['name']}", "subject": "s"} for record in ROWS]
    assert compare_recordings(ROWS, moved) == []


def test_restart_moves_the_run_away_and_leaves_what_is_known_by_its_content(begun):
    for name in ("teacher_cache", "embeddings", "export"):
        (begun / name).mkdir()
    (begun / "unusable_rows.jsonl").write_text("of the run that begins")
    assert open_workdir(begun, config(seed=1), restart=True) == begun  # nothing is compared
    assert (begun / "checkpoints" / "4").is_dir()
    begin_anew(begun, config(seed=1))
    for name in ("config.json", "unusable_rows.jsonl"):  # of the new run
        (begun / name).unlink()
    assert {p.name for p in begun.iterdir()} == {"teacher_cache", "embeddings", "earlier_runs"}
    assert (begun / "earlier_runs" / "1" / "checkpoints" / "4").is_dir()
    open_workdir(begun, config(seed=1))
    assert set_aside(begun) == begun / "earlier_runs" / "2"
    assert set_aside(begun) is None and set_aside(begun / "nowhere") is None


def test_a_workdir_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for name, words in (("file", "is a file"), (os.fsdecode(b"souffl\xe9"), "not UTF-8")):
        with pytest.raises(UserError, match=words):
            alone(lambda config, workdir: None)(None, tmp_path / name)


def test_two_runs_do_not_work_in_one_workdir(tmp_path):
    @alone
    def run(config, workdir):
        with pytest.raises(LockedError, match="in use by another process"):
            run(config, workdir)
        return "done"

    assert run(None, tmp_path / "w") == "done"
    assert run(None, tmp_path / "w") == "done"


def test_what_was_trained_nobody_knows_how_is_refused(begun):
    (begun / "config.json").unlink()
    with pytest.raises(UserError, match=r"no config\.json that says how"):
        open_workdir(begun, config())
    assert not (begun / "config.json").exists()


@pytest.mark.parametrize("text", ["{}", "[]", "{", '{"config": 1, "provenance": {}}'])
def test_a_damaged_config_is_named(begun, text):
    (begun / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        open_workdir(begun, config())
