"""Parts that other packages bring along, each of one file and one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from medalign_jax.core.errors import UserError
from medalign_jax.core.registry import Registry

ROOT = Path(__file__).resolve().parents[2]
POINTS = """
[medalign_jax.encoders]
band_means = theirs.encoder:ENTRY
[medalign_jax.front_ends]
bands = theirs.front_end:Bands
[medalign_jax.data_sets]
their_set = theirs.data_set:convert
[medalign_jax.alignment_losses]
apart = theirs.loss:apart
[medalign_jax.language_models]
mistral = theirs.language_model:mistral
[medalign_jax.methods]
count = theirs.method:run
"""
FRONT_END = """
import dataclasses
import jax.numpy as jnp

@dataclasses.dataclass(frozen=True)
class Bands:
    sample_rate: int = 8000
    hop: int = 100
    def __call__(self, waveforms):
        frames = waveforms.reshape(waveforms.shape[0], -1, self.hop)
        return jnp.stack([frames.mean(2), jnp.abs(frames).mean(2)], axis=2)
    def frames(self, samples):
        return samples // self.hop
    def samples(self, frames):
        return frames * self.hop
"""
ENCODER = """
import dataclasses
import flax.linen as nn
from medalign_jax.models import EncoderEntry, Window
from medalign_jax.weights.table import LINEAR, Rule, Table

@dataclasses.dataclass(frozen=True)
class Config:
    width: int = 3
    depth: int = 1
    layer_widths: tuple = (3,)
    prefix_tokens: int = 0
    mels: int = 2
    frames: int = 80
    most_frames: int | None = None

CONFIG = Config()

class BandMeans(nn.Module):
    config: Config
    def setup(self):
        self.out = nn.Dense(self.config.width)
    def __call__(self, features):
        return self.embed(features)
    def embed(self, features):
        tokens = self.out(features)
        return tokens.mean(1), {"block00": tokens, "tokens": tokens}

RULES = (Rule("linear.weight", "out/kernel", LINEAR), Rule("linear.bias", "out/bias"))
TABLE = Table("band_means", RULES)
SHARDING = ((r".*", ()),)
ENTRY = EncoderEntry("theirs.encoder:CONFIG", "theirs.encoder:BandMeans", "theirs.encoder:TABLE",
                     "bands", Window(1.0))
"""
DATA_SET = """
from medalign_jax.datasets.published import Converted

def convert(root, options):
    rows = [{"audio_path": str(p), "subject_id": p.stem} for p in sorted(root.glob("*.wav"))]
    return Converted(("audio_path", "subject_id"), rows, ())
"""
LOSS = """
def apart(audio, text, report, mask, options):
    return (audio * text).mean()
"""
LANGUAGE_MODEL = """
from dataclasses import replace
from medalign_jax.models.language.decoder_config import llama_config

def mistral(config):
    own = {"model_type", "sliding_window"}
    read = llama_config({k: v for k, v in config.items() if k not in own})
    return replace(read, sliding=(True,) * read.depth, window=config["sliding_window"])
"""
METHOD = """
def run(config, workdir, defaults=None, restart=False):
    print("counted to", config.count, "in", workdir)
"""
CONFIG = """
from ml_collections import ConfigDict

def get_config():
    return ConfigDict({"method": "count", "count": 3})
"""
USE = """
import numpy as np
import medalign_jax

weights = {"linear.weight": np.eye(3, 2, dtype="float32"), "linear.bias": np.float32([0, 0, 1])}
encoder = medalign_jax.load_encoder("band_means", weights)
wave = np.where(np.arange(8000) % 2, -0.25, 0.75).astype("float32")
np.testing.assert_allclose(encoder.embed([wave], 8000), [[0.25, 0.5, 1.0]], atol=1e-6)

from medalign_jax.losses.alignments import ALIGNMENTS
from medalign_jax.methods.acula import AculaConfig

assert ALIGNMENTS[AculaConfig(align="apart").align](wave, wave, wave, None, None) == 0.3125
"""

ALIGNMENT = """
import jax
from ml_collections import ConfigDict
from configs import acula
from medalign_jax.runs.checks import check_training
from medalign_jax.runs.parts.alignment import acula_config
from medalign_jax.runs.parts.audio import architecture_of, audio_student_of

config = acula.get_config("small")
config.encoder.name, config.loss.align, config.loss.ssm_weight = "band_means", "apart", 0.0
config.encoder.overrides = config.encoder.front_end = ConfigDict()
config.loss.options = ConfigDict({"margin": 0.5})
config.data.seconds = 1.0
made = architecture_of(config)
check_training(config, made, self_supervised=False)
assert acula_config(config).options == {"margin": 0.5}
student = audio_student_of(config, made, None)
params = student.initial(jax.random.key(0))
assert [*params] == ["encoder"] and student.feature_shape == (80, 2)
"""
LANGUAGE_MODEL_USE = """
import numpy as np
import torch
import transformers
import medalign_jax
from medalign_jax.language_model import load_language_model
from medalign_jax.text.tokenizers import FolderTokenizer
from medalign_jax.text.word_tokenizer import write_word_tokenizer

torch.manual_seed(0)
words = ["a", "murmur", "is", "heard", "systolic", "loud", "no"]
write_word_tokenizer("mistral", words)
config = transformers.MistralConfig(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, sliding_window=4,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64)
reference = transformers.MistralForCausalLM(config).eval()
reference.save_pretrained("mistral")
teacher = medalign_jax.load_teacher("mistral", max_tokens=32, layer=1)
text = "a loud systolic murmur is heard no murmur is heard"
ids = torch.tensor(FolderTokenizer("mistral").encode([text], 32))
assert ids.shape[1] > 4  # longer than the window
with torch.no_grad():
    states = reference.model(ids, output_hidden_states=True).hidden_states[1]
np.testing.assert_allclose(teacher.embed([text])[0], states[0].mean(0), atol=1e-5)
model = medalign_jax.load_language_model("mistral")
params, mask = {"params": model.params}, np.ones(ids.shape, bool)
last, _ = model.module.apply(params, ids.numpy(), mask)
logits = model.module.apply(params, last, method="logits")
with torch.no_grad():
    np.testing.assert_allclose(logits, reference(ids).logits, atol=1e-5)
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder as pip leaves it, with a package that is not ours."""
    folder = tmp_path_factory.mktemp("site")
    info, package = folder / "theirs-1.0.dist-info", folder / "theirs"
    info.mkdir()
    package.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(POINTS)
    texts = {"__init__": "", "front_end": FRONT_END, "encoder": ENCODER, "data_set": DATA_SET,
             "loss": LOSS, "language_model": LANGUAGE_MODEL}  # fmt: skip
    for name, text in (texts | {"method": METHOD, "config": CONFIG}).items():
        (package / f"{name}.py").write_text(text)
    return folder


def run(site, *arguments):
    path = os.pathsep.join([str(ROOT), str(site)])
    return subprocess.run(
        [sys.executable, *arguments], cwd=site, env=os.environ | {"PYTHONPATH": path}, text=True,
        capture_output=True,
    )  # fmt: skip


def test_a_part_costs_one_file_and_one_line(site):
    """Beside its test; what CONTRIBUTING says. Ours cost the same lines in our own registries."""
    lines = [line for line in POINTS.splitlines() if "=" in line]
    files = {line.split("=")[1].split(":")[0].strip() for line in lines}
    assert len(lines) == len(files) == 6
    written = {path.stem for path in (site / "theirs").glob("*.py")} - {"__init__", "config"}
    assert {f"theirs.{name}" for name in written} == files


def test_their_encoder_front_end_and_loss_are_taken_like_ours(site):
    done = run(site, "-c", USE)
    assert done.returncode == 0, done.stderr


def test_their_encoder_and_loss_are_aligned_like_ours(site):
    """At 8 kHz, with an option of the loss, and no self-supervised term to ask for a token grid."""
    done = run(site, "-c", ALIGNMENT)
    assert done.returncode == 0, done.stderr


def test_their_language_models_are_taken_like_ours(site):
    """A family whose tensors are named as the others' are: a reader of its config.json."""
    done = run(site, "-c", LANGUAGE_MODEL_USE)
    assert done.returncode == 0, done.stderr


def test_their_data_set_is_converted_like_ours(site):
    (site / "set").mkdir()
    (site / "set" / "one.wav").write_bytes(b"")
    done = run(site, "-m", "medalign_jax", "convert", "--format=their_set", "--root=set",
               "--out=set.csv")  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = (site / "set.csv").read_text().split()
    assert told == ["audio_path,subject_id", "set/one.wav,one"]


def test_their_method_is_run_like_ours(site):
    done = run(site, "-m", "medalign_jax.main", "--config=theirs/config.py", "--config.count=5",
               "--workdir=there")  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "counted to 5 in there\n"), done.stderr


def test_what_they_bring_wrongly_is_told_by_their_name(site, monkeypatch):
    monkeypatch.syspath_prepend(str(site))
    entries = Registry("medalign_jax.encoders", {"own": 1}, int)
    assert list(entries) == ["own", "band_means"] and len(entries) == 2 and "band_means" in entries
    assert entries["own"] == 1
    with pytest.raises(UserError, match=r"'band_means' of the package theirs .* is a EncoderEntry"):
        entries["band_means"]
    with pytest.raises(KeyError):
        entries["nobody"]
    with pytest.warns(UserWarning, match=r"the package theirs calls a part .*'band_means'"):
        assert [*Registry("medalign_jax.encoders", {"band_means": 1}).loaded()] == [
            ("band_means", 1)
        ]
    (site / "theirs" / "data_set.py").write_text("1 / 0")
    monkeypatch.delitem(sys.modules, "theirs.data_set", raising=False)
    with pytest.raises(UserError, match=r"does not load .*: ZeroDivisionError: division by zero"):
        Registry("medalign_jax.data_sets", {})["their_set"]
    with pytest.warns(UserWarning, match=r"'their_set' of the package theirs does not load"):
        assert [*Registry("medalign_jax.data_sets", {"own": 1}).loaded()] == [("own", 1)]
