"""Prompts as transformers' own processors write them, token by token."""

import json

import numpy as np
import pytest
import transformers
from transformers.models.qwen2_5_omni.processing_qwen2_5_omni import Qwen2_5OmniProcessor
from transformers.models.qwen2_audio.processing_qwen2_audio import Qwen2AudioProcessor

from medalign_jax.data.questions.prompts import PromptFormat, SequenceBuilder
from medalign_jax.data.questions.question import Question
from medalign_jax.language_model import chat_tokenizer
from medalign_jax.models.encoders.qwen_omni_audio import pooled_tokens
from medalign_jax.weights.load import save
from medalign_jax.weights.source import resolve
from tests.text import chat_tokenizers as toy

# What Qwen2.5-Omni's tokenizer_config.json calls its marks.
MARKS = {
    "image_token": "<|IMAGE|>", "audio_token": "<|AUDIO|>", "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>", "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>",
}  # fmt: skip
SAMPLES = (16_000, 5_431, 8_000)


def opened(folder, model_type, template, special=toy.CHATML + toy.AUDIO):
    """A folder of weights with a tokenizer, opened."""
    toy.write_tokenizer(folder, special=special, template=template)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    save(folder / "model.safetensors", {"w": np.zeros(1, np.float32)})
    return resolve(folder)


def in_tokenizer_config(folder):
    """Puts the folder's template where older releases wrote it."""
    path = folder / "tokenizer_config.json"
    template = (folder / "chat_template.jinja").read_text()
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    (folder / "chat_template.jinja").unlink()


def qwen2_audio(folder, template=None):
    weights = opened(folder, "qwen2_audio", template)
    if template is not None:
        in_tokenizer_config(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
    extractor = transformers.WhisperFeatureExtractor(feature_size=8)
    return weights, Qwen2AudioProcessor(extractor, tokenizer)


def qwen2_audio_with_chatml(folder):
    return qwen2_audio(folder, toy.PLAIN_TEMPLATE)


def omni(folder):
    special = (*toy.CHATML, *MARKS.values())
    weights = opened(folder, "qwen2_5_omni", None, special)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": toy.PARTS_TEMPLATE}))
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), extra_special_tokens=MARKS)
    extractor = transformers.WhisperFeatureExtractor(feature_size=8)
    with pytest.MonkeyPatch.context() as patch:
        # What it sees with needs packages of its own, and says nothing about prompts of audio.
        name = "check_argument_for_proper_class"
        patch.setattr(transformers.ProcessorMixin, name, lambda self, *_: None)
        return weights, Qwen2_5OmniProcessor(None, None, extractor, tokenizer, toy.PARTS_TEMPLATE)


FAMILIES = {each.__name__: each for each in (qwen2_audio, qwen2_audio_with_chatml, omni)}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    return FAMILIES[request.param](tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("system", [None, "You answer briefly."])
@pytest.mark.parametrize("clips", [0, 1, 3])
def test_a_prompt_is_that_of_transformers_processor(family, clips, system):
    weights, processor = family
    tokenizer = chat_tokenizer(weights)
    text = "What's that sound?"
    parts = [{"type": "audio", "audio": f"{n}.wav"} for n in range(clips)]
    turns = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
    if system is not None:
        turns = [{"role": "system", "content": system}, *turns]
    expected = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert tokenizer.prompt(text, clips, system) == expected
    if not clips:
        return
    waves = [np.full(length, 0.1, np.float32) for length in SAMPLES[:clips]]
    ids = processor(text=expected, audio=waves, sampling_rate=16_000)["input_ids"]
    builder = SequenceBuilder(
        tokenizer, None, lambda n: pooled_tokens(-(-n // 160)), 500,
        format=PromptFormat(system=system),
    )  # fmt: skip
    question = Question(
        id="q", audio=tuple(f"{n}.wav" for n in range(clips)), question=text, answer="", choices=()
    )
    ours = builder.prompt(question, SAMPLES[:clips])
    assert ours == np.asarray(ids).reshape(-1).tolist()


def test_the_official_prompt_of_qwen2_audio(tmp_path):
    weights = opened(tmp_path, "qwen2_audio", None)
    assert chat_tokenizer(weights).prompt("What's that sound?", clips=1) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nAudio 1: <|audio_bos|><|AUDIO|><|audio_eos|>\nWhat's that sound?"
        "<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("file", ["processor_config.json", "chat_template.json", "jinja"])
def test_a_template_of_the_folders_processor_goes_first(tmp_path, file):
    weights = opened(tmp_path, "qwen2_audio", None)
    if file == "jinja":
        (tmp_path / "chat_template.jinja").write_text(toy.PARTS_TEMPLATE)
    else:
        (tmp_path / file).write_text(json.dumps({"chat_template": toy.PARTS_TEMPLATE}))
    assert "user\n<|audio_bos|>" in chat_tokenizer(weights).prompt("x", clips=1)
