"""Checkpoints: which are kept, which is best, and what a bad one says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medalign_jax.core.errors import UserError
from medalign_jax.core.seals import NAME as SEAL
from medalign_jax.train.checkpoint import Checkpoints

SELECT = ("valid/cka", "max")

# Orbax leaves a result unread where a restore fails.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def state(value: float):
    params = {"w": jnp.full((4, 3), value), "b": jnp.full(3, -value), "heads": {}}
    return {"params": params, "step": value}


def abstract(tree=None):
    return jax.tree.map(jnp.asarray, state(0.0)) if tree is None else tree


def filled(folder, scores: dict[int, dict[str, float]], select=SELECT) -> Checkpoints:
    checkpoints = Checkpoints(folder, select)
    for step, metrics in scores.items():
        checkpoints.save(step, state(float(step)), {"batch": step}, metrics)
    checkpoints.wait()
    return checkpoints


def steps(folder) -> set[int]:
    return {int(path.name) for path in folder.iterdir() if path.name.isdigit()}


def cka(*values: float) -> dict[int, dict[str, float]]:
    return {step: {"valid/cka": value} for step, value in enumerate(values, 1)}


def test_a_state_comes_back_with_its_iterator(tmp_path):
    checkpoints = filled(tmp_path, cka(0.1))
    restored, iterator = checkpoints.restore(1, abstract())
    np.testing.assert_array_equal(restored["params"]["w"], np.full((4, 3), 1.0))
    assert float(restored["step"]) == 1.0 and iterator == {"batch": 1}
    assert restored["params"]["heads"] == {}  # a method without heads
    checkpoints.close()


@pytest.mark.parametrize(("mode", "best"), [("max", 2), ("min", 4)])
def test_the_two_latest_and_the_best_are_kept(tmp_path, mode, best):
    checkpoints = filled(tmp_path, cka(0.5, 0.9, 0.4, 0.1, 0.3), ("valid/cka", mode))
    assert (checkpoints.latest(), checkpoints.best()) == (5, best)
    assert steps(tmp_path) == {best, 4, 5}
    assert checkpoints.metrics(best) == cka(0.5, 0.9, 0.4, 0.1, 0.3)[best]
    checkpoints.close()


def test_the_best_survives_a_restart(tmp_path):
    filled(tmp_path, cka(0.1, 0.9, 0.3)).close()
    checkpoints = Checkpoints(tmp_path, SELECT)
    assert checkpoints.best() == 2
    checkpoints.save(4, state(4.0), {}, {"valid/cka": 0.5})
    checkpoints.wait()
    assert (checkpoints.latest(), checkpoints.best(), steps(tmp_path)) == (4, 2, {2, 3, 4})
    checkpoints.close()


def test_of_equal_scores_the_first_is_best(tmp_path):
    checkpoints = Checkpoints(tmp_path, SELECT, keep_latest=3)
    for step in (1, 2, 3):
        checkpoints.save(step, state(1.0), {}, {"valid/cka": 0.5})
    checkpoints.wait()
    assert checkpoints.best() == 1
    checkpoints.close()


def test_a_score_that_is_not_finite_is_never_best(tmp_path):
    checkpoints = filled(tmp_path, cka(0.2, float("nan"), float("inf"), 0.1))
    assert checkpoints.best() == 1
    checkpoints.close()


def test_without_scores_the_latest_is_best(tmp_path):
    checkpoints = filled(tmp_path, {1: {}, 2: {}})
    assert (checkpoints.best(), steps(tmp_path)) == (2, {1, 2})
    checkpoints.close()


def test_an_empty_folder_has_no_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path / "new", SELECT)
    assert checkpoints.latest() is None and checkpoints.best() is None
    checkpoints.close()


@pytest.mark.parametrize(
    "change",
    [
        {"w": jnp.zeros((4, 5)), "b": jnp.zeros(3), "heads": {}},
        {"w": jnp.zeros((4, 3)), "c": jnp.zeros(3), "heads": {}},
        {"w": jnp.zeros((4, 3)), "heads": {}},
    ],
    ids=["shape", "name", "missing"],
)
def test_a_checkpoint_of_another_model_is_refused(tmp_path, change):
    checkpoints = filled(tmp_path, cka(0.1))
    with pytest.raises(UserError, match=rf"{tmp_path / '1'} cannot be restored into this model"):
        checkpoints.restore(1, {"params": change, "step": jnp.zeros(())})
    checkpoints.close()


def damage(folder, kind: str) -> None:
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        if kind == "cut":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        elif kind == "overwritten":
            path.write_bytes(b"\xff" * path.stat().st_size)
        else:
            path.unlink()


@pytest.mark.parametrize("kind", ["cut", "overwritten", "deleted"])
@pytest.mark.parametrize("part", ["state", "iterator"])
def test_a_damaged_checkpoint_is_named(tmp_path, kind, part):
    filled(tmp_path, cka(0.1)).close()
    damage(tmp_path / "1" / part, kind)
    checkpoints = Checkpoints(tmp_path, SELECT)
    with pytest.raises(UserError, match=rf"{tmp_path / '1'} cannot be restored"):
        checkpoints.restore(1, abstract())
    checkpoints.close()


def test_remains_of_a_killed_save_are_not_a_checkpoint_and_go(tmp_path):
    filled(tmp_path, cka(0.1)).close()
    remains = tmp_path / "2.orbax-checkpoint-tmp"
    (remains / "state").mkdir(parents=True)
    checkpoints = Checkpoints(tmp_path, SELECT)
    assert checkpoints.latest() == 1
    checkpoints.save(2, state(2.0), {}, {})
    checkpoints.close()
    assert not remains.exists() and steps(tmp_path) == {1, 2}


def flip(path, bit: int = 77) -> None:
    content = bytearray(path.read_bytes())
    bit %= 8 * len(content)
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: (p.stat().st_size, p))


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before_in_words(tmp_path, capsys):
    folder = tmp_path / "checkpoints"
    filled(folder, cka(0.1, 0.2, 0.3)).close()
    flip(largest(folder / "3" / "state"))
    checkpoints = Checkpoints(folder, SELECT)
    step, restored, iterator = checkpoints.restore_newest(abstract())
    assert (step, iterator) == (2, {"batch": 2})
    np.testing.assert_array_equal(restored["params"]["w"], np.full((4, 3), 2.0))
    said = capsys.readouterr().out
    assert f"{folder / '3'} is damaged: state/" in said and "step 2 is the newest other" in said
    assert (tmp_path / "damaged_checkpoints" / "3.1" / "state").is_dir()
    checkpoints.save(
        3, state(3.5), {"batch": 3}, {"valid/cka": 0.2}
    )  # its step can be passed again
    checkpoints.wait()
    assert float(checkpoints.restore_newest(abstract())[1]["step"]) == 3.5
    checkpoints.close()


def test_damaged_metrics_do_not_choose_another_best(tmp_path, capsys):
    folder = tmp_path / "checkpoints"
    filled(folder, cka(0.9, 0.2, 0.3)).close()
    (folder / "1" / "metrics" / "metrics").write_text('{"valid/cka": 0.1}')
    checkpoints = Checkpoints(folder, SELECT)
    assert (checkpoints.latest(), checkpoints.best(), steps(folder)) == (3, 3, {2, 3})
    assert "metrics/metrics not as when written" in capsys.readouterr().out
    checkpoints.close()


def test_a_damaged_best_checkpoint_gives_way_to_the_next_best_in_words(tmp_path, capsys):
    folder = tmp_path / "checkpoints"
    filled(folder, cka(0.9, 0.5, 0.4, 0.3)).close()
    flip(largest(folder / "1" / "state"))
    checkpoints = Checkpoints(folder, SELECT)
    step, found = checkpoints.restore_best(4, jax.tree.map(jnp.asarray, state(4.0)))
    assert step == 3 and float(found["step"]) == 3.0  # kept as one of the two newest
    assert f"{folder / '1'} is damaged" in capsys.readouterr().out
    checkpoints.close()


def test_where_all_are_damaged_nothing_begins_anew_by_itself(tmp_path):
    filled(tmp_path / "run", cka(0.1, 0.2)).close()
    for step in ("1", "2"):
        flip(largest(tmp_path / "run" / step / "state"))
    checkpoints = Checkpoints(tmp_path / "run", SELECT)
    with pytest.raises(UserError, match=r"run/2 is damaged.*run/1 is damaged.*--restart"):
        checkpoints.restore_newest(abstract())
    assert steps(tmp_path / "run") == {1, 2}
    checkpoints.close()


def test_numbers_that_are_not_finite_are_refused_though_they_are_as_saved(tmp_path):
    checkpoints = filled(tmp_path, cka(0.1))
    broken = state(2.0)
    broken["params"]["w"] = broken["params"]["w"].at[1, 1].set(jnp.nan)
    checkpoints.save(2, broken, {"batch": 2}, {})
    checkpoints.wait()
    with pytest.raises(UserError, match=r"2 holds numbers that are not finite"):
        checkpoints.restore(2, abstract())
    checkpoints.close()


def test_a_checkpoint_of_an_earlier_version_is_taken_and_told(tmp_path, capsys):
    filled(tmp_path, cka(0.1)).close()
    (tmp_path / "1" / SEAL).unlink()
    checkpoints = Checkpoints(tmp_path, SELECT)
    assert float(checkpoints.restore(1, abstract())[0]["step"]) == 1.0
    assert "has no checksums" in capsys.readouterr().out
    checkpoints.close()
