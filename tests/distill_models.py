"""An audio-conditioned student, a text-only teacher and questions; they compile in seconds."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
import soundfile

from medalign_jax.core.mesh import path_name
from medalign_jax.data.questions.batches import QuestionBatchSpec, make_question_iterator
from medalign_jax.data.questions.prompts import PromptFormat, SequenceBuilder
from medalign_jax.data.questions.question import Question
from medalign_jax.data.questions.source import QuestionData, open_questions
from medalign_jax.language_model import LanguageModel, abstract_params, build_module
from medalign_jax.methods.distill import Distill, DistillConfig
from medalign_jax.methods.text_teacher import LIVE
from medalign_jax.models.layers.lora import LoraConfig
from medalign_jax.runs.parts.distillation import audio_lm_student_of, text_teacher_of
from medalign_jax.text.chat import AUDIO_TOKEN, ChatTokenizer
from medalign_jax.text.word_tokenizer import write_word_tokenizer

WORDS = ("murmur", "systolic", "diastolic", "wheeze", "crackle", "normal", "mitral", "aortic")
FORMAT = PromptFormat(description="Heard: {description} ")
STUDENT_DEPTH, TEACHER_DEPTH = 3, 4
STUDENT_WIDTH, TEACHER_WIDTH = 24, 32
LORA = LoraConfig(rank=2, alpha=4.0, modules=(r"text/layers/attention/(query|value)/kernel$",))


def questions(folder: Path, count: int) -> list[Question]:
    """Clips of 0.2 to 0.4 s, responses of 1 to 6 words; the third question is about two clips."""
    folder.mkdir(parents=True, exist_ok=True)
    found: list[Question] = []
    for n in range(count):
        rng = np.random.default_rng(n)
        path = folder / f"{n}.wav"
        samples = 3200 + 160 * int(rng.integers(21))
        tone = np.sin(2 * np.pi * rng.uniform(100, 4000) * np.arange(samples) / 16_000)
        soundfile.write(path, 0.3 * tone + 0.05 * rng.standard_normal(samples), 16_000)
        audio = (str(path), found[-1].audio[0]) if n == 2 else (str(path),)
        said, answer = (" ".join(rng.choice(WORDS, rng.integers(1, top))) for top in (9, 6))
        found.append(Question(f"q{n}", audio, "Which sound ?", (), answer, description=said))
    return found


@dataclass(frozen=True, eq=False)
class World:
    """Models and questions of a test module."""

    student: LanguageModel
    teacher: LanguageModel
    builder: SequenceBuilder
    data: QuestionData

    def method(
        self, form: str = LIVE, lora: LoraConfig | None = None, every: int = 2, **loss
    ) -> Distill:
        """Distillation with the given loss; `every` second layer by default."""
        config = DistillConfig(**({"every": every, "chunk": 3} | loss))
        teacher = text_teacher_of(self.teacher, self.builder, form) if config.text_weight else None
        return Distill(audio_lm_student_of(self.student, lora), config, teacher)

    def batches(self, size: int, extras=None, **changes) -> Iterator[dict[str, np.ndarray]]:
        """Batches in the order of the questions, of one shape."""
        spec = QuestionBatchSpec(size, **({"shuffle": False, "epochs": 1} | changes))
        return make_question_iterator(self.data, spec, extras=extras)

    def batch(self, size: int) -> dict[str, np.ndarray]:
        """The first questions."""
        return next(self.batches(size))


def world(folder: Path, count: int = 6) -> World:
    """Everything, made anew; the same numbers each time."""
    asked = questions(folder / "clips", count)
    words = sorted({w for q in asked for w in (FORMAT.described(q) + " " + q.answer).split()})
    student, teacher = (
        ChatTokenizer(write_word_tokenizer(folder / name, words, (), more))
        for name, more in (("student", ("<|own|>",)), ("teacher", ("<think>", "</think>")))
    )
    student_model = _random(student_json(student), student, 0)
    teacher_model = _random(teacher_json(teacher), teacher, 1)
    builder = SequenceBuilder(
        student, teacher, student_model.audio_tokens, 64, max_samples=student_model.max_samples,
        format=FORMAT,
    )  # fmt: skip
    return World(student_model, teacher_model, builder, open_questions(asked, builder))


def _random(config: dict, tokenizer: ChatTokenizer, seed: int) -> LanguageModel:
    """A random model; its numbers are drawn on the host, which compiles nothing."""
    module = build_module(config)
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: _leaf(path_name(path), leaf.shape, seed), abstract_params(module)
    )
    return LanguageModel(module, params, tokenizer, config, f"random {seed}")


def _leaf(path: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    if path.endswith("scale"):
        return np.ones(shape, np.float32)
    rng = np.random.default_rng([seed, zlib.crc32(path.encode())])
    fan_in = shape[-1] if path.endswith("embedding") else int(np.prod(shape[-2:-1]))
    size = 0.02 if path.endswith("bias") else fan_in**-0.5
    return (size * rng.standard_normal(shape)).astype(np.float32)


def student_json(tokenizer: ChatTokenizer) -> dict:
    """A config.json of Qwen2.5-Omni's thinker."""
    return {
        "model_type": "qwen2_5_omni_thinker",
        "audio_token_index": tokenizer.ids(AUDIO_TOKEN)[0],
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "qwen2_5_omni_text",
            "vocab_size": len(tokenizer.tokens()),
            "hidden_size": STUDENT_WIDTH,
            "intermediate_size": 32,
            "num_hidden_layers": STUDENT_DEPTH,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 128,
            "rope_scaling": {"rope_type": "default", "mrope_section": [2, 2, 2]},
        },
        "audio_config": {
            "model_type": "qwen2_5_omni_audio_encoder",
            "num_mel_bins": 16,
            "d_model": 16,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "n_window": 50,
            "output_dim": STUDENT_WIDTH,
        },
    }


def teacher_json(tokenizer: ChatTokenizer) -> dict:
    """A config.json of Qwen3."""
    return {
        "model_type": "qwen3",
        "vocab_size": len(tokenizer.tokens()),
        "hidden_size": TEACHER_WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": TEACHER_DEPTH,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
    }


def moved(params, seed: int = 3, size: float = 0.05):
    """The parameters after an arbitrary step, so that nothing is at its start any more."""
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(
        tree, [x + size * rng.standard_normal(x.shape).astype(x.dtype) for x in leaves]
    )


def with_dtype(model: LanguageModel, dtype) -> LanguageModel:
    """The same model, computing in another type."""
    return replace(model, module=model.module.clone(dtype=dtype))
