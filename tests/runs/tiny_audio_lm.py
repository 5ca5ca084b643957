"""Tiny models of the published architectures, saved as folders, and questions for them."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from medalign_jax.data.questions.prompts import PromptFormat
from medalign_jax.data.questions.question import Question
from medalign_jax.datasets.simulated import questions as world
from medalign_jax.datasets.simulated.cases import write_cases
from medalign_jax.datasets.simulated.simulate import SPLIT_CYCLE
from medalign_jax.language_model import LanguageModel, abstract_params, build_module
from medalign_jax.text.chat import AUDIO_TOKEN, ChatTokenizer
from medalign_jax.text.word_tokenizer import write_word_tokenizer
from medalign_jax.weights.source import resolve

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 1024,
}


def reasoning_questions(folder: Path, recordings: int = 12) -> list[Question]:
    """One question with description, reasoning and split for each of some recordings of 2 s."""
    listing = write_cases(folder, recordings, seed=3, seconds=2.0)
    asked = [q for q in world.recorded_questions(listing, 3) if q.task == "reasoning"]
    return [
        replace(question, split=SPLIT_CYCLE[n % len(SPLIT_CYCLE)])
        for n, question in enumerate(asked)
    ]


def identity_of(folder: Path) -> str:
    """Of the weights that a saved model was loaded from, without what only transformers needs."""
    source, beside = resolve(folder), ("visual.", "audio_tower.audio_bos_eos_token.")
    return source.identity_of(name for name in source if not name.startswith(beside))


def undescribed(questions: list[Question]) -> list[Question]:
    """The same before textualisation."""
    return [replace(question, description=None) for question in questions]


def vocabulary(questions: list[Question]) -> list[str]:
    """Their words, and others, so that a random model seldom ends an answer at its first token."""
    return world.words(questions, PromptFormat()) + [f"word{n}" for n in range(400)]


def save_listener(folder: Path, words: list[str]) -> Path:
    """A random Qwen2.5-Omni thinker."""
    tokenizer = ChatTokenizer(write_word_tokenizer(folder / "words", words, world.MARKS))
    rope = {"rope_type": "default", "mrope_section": [4, 2, 2]}
    config = {
        "model_type": "qwen2_5_omni_thinker",
        "audio_token_index": tokenizer.ids(AUDIO_TOKEN)[0],
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "qwen2_5_omni_text",
            "vocab_size": len(tokenizer.tokens()),
            "rope_scaling": rope,
        }
        | TEXT,
        "audio_config": {
            "model_type": "qwen2_5_omni_audio_encoder",
            "num_mel_bins": 16,
            "d_model": 32,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 64,
            "n_window": 50,
            "output_dim": 32,
        },
    }
    return _save(folder / "model", config, tokenizer)


def save_reader(folder: Path, words: list[str], more: tuple[str, ...] = ("<think>",)) -> Path:
    """A random Qwen3; `more` are tokens after those of the listener."""
    tokenizer = ChatTokenizer(write_word_tokenizer(folder / "words", words, world.MARKS, more))
    size = {"vocab_size": len(tokenizer.tokens()), "head_dim": 16, "tie_word_embeddings": True}
    return _save(folder / "model", {"model_type": "qwen3"} | TEXT | size, tokenizer)


def _save(folder: Path, config: dict, tokenizer: ChatTokenizer) -> Path:
    """Random numbers from the host: initialisation would take its time to compile."""
    module, rng = build_module(config), np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32), abstract_params(module)
    )
    folder.mkdir()
    return LanguageModel(module, params, tokenizer, config).save(folder)
