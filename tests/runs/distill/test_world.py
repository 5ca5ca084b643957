"""The demo of distillation at toy size, on real speech's place in it as well."""

import json

import numpy as np
import pytest
import soundfile
from ml_collections import ConfigDict

from configs.distill import get_config
from medalign_jax.core.errors import UserError
from medalign_jax.core.mesh import make_mesh
from medalign_jax.runs.distill import run as distill
from medalign_jax.runs.distill.world import simulated_setting

pytestmark = pytest.mark.slow

EMOTIONS = ("anger", "happiness", "sadness", "neutral")


def speech(folder, split_of):
    """A table of 16 beeps of four speakers."""
    lines = ["audio_path,subject_id,emotion,split"]
    for n in range(16):
        soundfile.write(folder / f"{n}.wav", 0.3 * np.sin(np.arange(8000) * 0.02 * (n + 1)), 16_000)
        lines.append(f"{n}.wav,s{n // 4},{EMOTIONS[n % 4]},{split_of(n)}")
    table = folder / "speech.csv"
    table.write_text("\n".join(lines) + "\n")
    return table


@pytest.fixture
def config():
    config = get_config("demo")
    config.world.update({"base": 6, "reasoning": 8, "valid": 2, "test": 4, "texts": 12, "read": 4})
    small = {"width": 24, "mlp_width": 32, "depth": 2, "heads": 2}
    config.world.teacher.update(small)
    config.world.student.update(small | {"mels": 16, "audio_width": 16, "audio_depth": 1})
    config.data.buckets = ()
    for stage in config.stages.values():
        stage.update({"steps": 2, "batch_size": 4})
    config.train.update({"batch_size": 4, "steps": 2, "eval_every": 2})
    config.evaluate.update({"max_new_tokens": 4, "batch_size": 8})
    config.arms = ConfigDict({"layers + acoustic": {}})
    config.seeds = (0,)
    return config


def test_the_demo_goes_through_with_speech_as_its_acoustic_task(config, tmp_path):
    table = speech(tmp_path, lambda n: "test" if n >= 12 else "train")
    table.write_text(table.read_text() + "nowhere.wav,s0,anger,train\n")
    config.data.emodb, config.data.max_bad_fraction = str(table), 0.1
    workdir = tmp_path / "run"
    distill.run(config, workdir)
    results = json.loads((workdir / "evaluation.json").read_text())["results"]
    assert {r["task"].split(":")[0] for r in results} >= {"reasoning", "plain", "emotion"}
    answers = json.loads((workdir / "before" / "answers.json").read_text())
    assert {name: len(given) for name, given in answers.items()} == {
        "reasoning": 8, "plain": 8, "emotion": 4,
    }  # fmt: skip
    exported = workdir / "arms" / "layers___acoustic_0" / "export" / "model.safetensors"
    assert exported.is_file() and (workdir / "report.html").is_file()
    assert "nowhere.wav" in (workdir / "unusable_emotion.jsonl").read_text()
    setting = simulated_setting(config, workdir, make_mesh())  # read back, nothing is trained
    assert {q.task for q in setting.train} == {"reasoning", "plain"}
    assert len(setting.train) == 32


@pytest.mark.parametrize(
    ("split_of", "said"),
    [
        (lambda n: "test" if n % 2 else "train", "a subject is in more than one split"),
        (lambda n: "test", "leaves others to learn from"),
    ],
)
def test_speech_without_speakers_held_out_is_refused(config, tmp_path, split_of, said):
    config.data.emodb = str(speech(tmp_path, split_of))
    with pytest.raises(UserError, match=said):
        simulated_setting(config, tmp_path / "run", make_mesh())


@pytest.mark.parametrize("key", ["data.mmau", "data.iemocap", "student.source", "teacher.source"])
def test_what_a_simulated_world_would_not_look_at_is_refused(config, tmp_path, key):
    config.update_from_flattened_dict({key: "somewhere"})
    with pytest.raises(UserError, match=rf"config.{key} goes with config.data.questions"):
        simulated_setting(config, tmp_path / "run", make_mesh())
