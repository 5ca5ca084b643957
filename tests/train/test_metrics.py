"""metrics.jsonl: restarts, kills and values that JSON does not have."""

import json
import math
import sys
from types import ModuleType

import pytest

from medalign_jax.core.errors import UserError
from medalign_jax.train.metrics import MetricWriter, read_metrics


def write(folder, steps, restored=0, **values):
    writer = MetricWriter(folder, restored)
    for step in steps:
        writer.write(step, {"loss": float(step)} | values)
    writer.close()


def steps(folder) -> list[int]:
    return [line["step"] for line in read_metrics(folder / "metrics.jsonl")]


def test_one_object_per_line(tmp_path):
    write(tmp_path, (1, 2), cka=0.25)
    lines = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "cka": 0.25, "loss": 1.0}, {"step": 2, "cka": 0.25, "loss": 2.0}]


def test_floats_come_back_bit_for_bit(tmp_path):
    value = 0.1 + 0.2
    writer = MetricWriter(tmp_path)
    writer.write(1, {"loss": value})
    writer.close()
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["loss"] == value


def test_a_restart_takes_back_the_lines_past_its_step(tmp_path):
    write(tmp_path, range(1, 8))
    write(tmp_path, range(5, 7), restored=4)
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]


def test_a_fresh_start_takes_back_all_lines(tmp_path):
    write(tmp_path, range(1, 4))
    write(tmp_path, (1,))
    assert steps(tmp_path) == [1]


def test_a_line_cut_by_a_kill_is_left_out_and_healed(tmp_path):
    write(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-9])
    assert steps(tmp_path) == [1, 2]
    write(tmp_path, (3, 4), restored=2)
    assert steps(tmp_path) == [1, 2, 3, 4]
    assert all(json.loads(text) for text in path.read_text().splitlines())


@pytest.mark.parametrize(
    "damage",
    [b"{half", b"[1, 2]", b"17", b'{"loss": 1.0}', b'{"step": "2"}', b'{"step": 2, "\xff": 1}',
     b'{"step": 2, "a": ' + b"[" * 100_000],
)  # fmt: skip
def test_a_damaged_line_in_the_middle_is_named(tmp_path, damage):
    write(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], damage, lines[2]]) + b"\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2 is damaged"):
        read_metrics(path)


def test_values_that_are_not_finite_are_words(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.write(1, {"a": math.nan, "b": math.inf, "c": -math.inf})
    writer.close()
    text = (tmp_path / "metrics.jsonl").read_text()

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(text, parse_constant=refuse) == {
        "step": 1,
        "a": "nan",
        "b": "inf",
        "c": "-inf",
    }


def test_no_file_has_no_lines(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_tensorboard_events_are_written(tmp_path):
    write(tmp_path, (1,))
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))


def test_no_events_are_written_where_none_are_wanted(tmp_path):
    writer = MetricWriter(tmp_path, tensorboard=False)
    writer.write(1, {"loss": 1.0})
    writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


class FakeWandb(ModuleType):
    """Keeps what it is told."""

    def __init__(self):
        super().__init__("wandb")
        self.started, self.logged = [], []

    def init(self, **arguments):
        self.started.append(arguments)
        return self

    def log(self, metrics, step):
        self.logged.append((step, metrics))

    def finish(self):
        self.logged.append("finished")


def test_weights_and_biases_gets_every_line_and_goes_on_in_the_same_run(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for restored in (0, 1):
        (tmp_path / "mine").mkdir(exist_ok=True)
        writer = MetricWriter(tmp_path / "mine", restored, wandb="hearts")
        writer.write(restored + 1, {"loss": 0.5})
        writer.close()
    (tmp_path / "other").mkdir()
    MetricWriter(tmp_path / "other", wandb="hearts").close()
    first, second, other = fake.started
    assert first == second and first["resume"] == "allow" and first["name"] == "mine"
    assert first["project"] == "hearts" and other["id"] != first["id"]
    assert fake.logged[:3] == [(1, {"loss": 0.5}), "finished", (2, {"loss": 0.5})]


def test_a_package_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        MetricWriter(tmp_path, wandb="hearts")


def test_a_process_that_does_not_write_leaves_the_file_alone(tmp_path):
    write(tmp_path, (1, 2))
    writer = MetricWriter(tmp_path, writes=False)
    writer.write(3, {"loss": 3.0})
    writer.close()
    assert steps(tmp_path) == [1, 2]
