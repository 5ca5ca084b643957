"""Encoders, methods and batches small enough to compile in seconds, for tests of all rooms."""

import jax
import numpy as np
from jax.sharding import Mesh

from medalign_jax.audio.augment import Augment
from medalign_jax.audio.frontend import LogMel
from medalign_jax.methods.acula import Acula, AculaConfig
from medalign_jax.methods.student import AudioStudent
from medalign_jax.models.encoders.vit_mae import ViTMAE, ViTMAEConfig
from medalign_jax.models.language.bert import BertConfig
from medalign_jax.teachers.reading import Reading
from medalign_jax.teachers.teacher import Teacher
from medalign_jax.testing import random_teacher
from medalign_jax.weights.tables.opera_gt import SHARDING
from tests.quick import OPTIONS

ENCODER = ViTMAEConfig(
    frames=16, patch=(4, 16), width=32, depth=1, heads=2,
    decoder_width=32, decoder_depth=1, decoder_heads=2,
)  # fmt: skip
FRONT_END = LogMel()
SAMPLES = FRONT_END.samples(ENCODER.frames)
TEXT_WIDTH = 24
AUGMENT = Augment(noise=0.5, frame_mask=0.5)
TEACHER = BertConfig(
    vocab_size=64, width=TEXT_WIDTH, depth=1, heads=2, mlp_width=32, max_positions=16
)
WORDS = ("murmur", "systolic", "diastolic", "wheeze", "crackle", "normal", "mitral", "aortic")


def quick_jit(function, **options):
    """jit with the options of `tests.quick`, which only the CPU's compiler knows."""
    known = OPTIONS if jax.default_backend() == "cpu" else None
    return jax.jit(function, compiler_options=known, **options)


def student(config: ViTMAEConfig = ENCODER, augment: Augment = AUGMENT, params=None):
    """The tiny encoder with its front end, on clips of full length."""
    samples = FRONT_END.samples(config.frames)
    return AudioStudent(ViTMAE(config), FRONT_END, samples, augment, params)


def acula(side: AudioStudent | None = None, teacher: Teacher | None = None, **changes) -> Acula:
    """AcuLa on the tiny encoder; with a teacher, that one is in the step."""
    config = AculaConfig(**({"hidden": 32, "out": 16} | changes))
    online = {}
    if teacher is not None:
        online = {
            "frozen": teacher.params,
            "frozen_rules": teacher.sharding_rules,
            "teacher_apply": teacher.apply,
        }
    return Acula(side or student(), TEXT_WIDTH, config, SHARDING, **online)


def teacher(mesh: Mesh | None = None) -> Teacher:
    """A random language model of one layer."""
    return random_teacher(TEACHER, reading=Reading(max_tokens=16), mesh=mesh)


def texts(count: int, seed: int = 0) -> list[str]:
    """Short made-up reports."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(2, 7))) for _ in range(count)]


def waveforms(count: int, seed: int = 0, samples: int = SAMPLES) -> np.ndarray:
    """(count, samples) float32: a tone of its own in noise for each."""
    rng = np.random.default_rng(seed)
    time = np.arange(samples) / FRONT_END.sample_rate
    tones = np.sin(2 * np.pi * rng.uniform(100, 4000, (count, 1)) * time)
    return (0.3 * tones + 0.05 * rng.standard_normal((count, samples))).astype(np.float32)


def batch(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Waveforms and text vectors for the cached form of AcuLa."""
    text = np.random.default_rng([seed, 1]).standard_normal((count, TEXT_WIDTH))
    return {"waveform": waveforms(count, seed), "text": text.astype(np.float32)}
