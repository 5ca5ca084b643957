"""Small real tokenisers of Qwen's kind: byte-level BPE, ChatML, audio placeholders."""

import functools
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

TEXTS = (
    "The recording holds a systolic murmur over the aortic valve.",
    "Which emotion does the speaker express? Choose one of these options: angry, happy, sad.",
    "Description of the recording: a man speaks in a neutral voice. Which sound is it? Woman.",
    "<THINK>\n<PLANNING>\n<CAPTION>\n<REASONING>\n<SUMMARY>\n<RESPONSE> The answer is this.",
)
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
AUDIO = ("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>")
PLAIN_TEMPLATE = """{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{%- if mode is defined %}{{ mode }}{% endif %}{% endif -%}"""
PARTS_TEMPLATE = """{%- if messages[0]['role'] != 'system' -%}
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif -%}
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['content'] is string -%}{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'audio' -%}{{ '<|audio_bos|><|AUDIO|><|audio_eos|>' }}
{%- else -%}{{ part['text'] }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}"""


@functools.cache
def _base() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer.to_str()


def write_tokenizer(
    folder: Path,
    special: tuple[str, ...] = CHATML + AUDIO,
    template: str | None = PARTS_TEMPLATE,
    added: tuple[str, ...] = (),
) -> Path:
    """Saves a tokeniser of 320 text tokens, then the special and the added ones."""
    return _save(folder, Tokenizer.from_str(_base()), special, template, added)


def write_word_tokenizer(folder: Path) -> Path:
    """Another family: whole words, in their own order."""
    words = sorted({word for text in TEXTS for word in text.split()})
    vocabulary = {word: id for id, word in enumerate([*words, "?"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _save(folder, tokenizer, CHATML, PLAIN_TEMPLATE, ())


def _save(
    folder: Path,
    tokenizer: Tokenizer,
    special: tuple[str, ...],
    template: str | None,
    added: tuple[str, ...],
) -> Path:
    from transformers import PreTrainedTokenizerFast

    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in special])
    tokenizer.add_tokens([AddedToken(text, special=False) for text in added])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=special[-1], pad_token=special[0]
    )
    fast.chat_template = template
    fast.save_pretrained(folder)
    return folder


def write_teacher(folder: Path) -> Path:
    """One of Qwen3's kind: the same text tokens and turn marks, then tokens of its own."""
    special = (*CHATML, "<|object_ref_start|>", "<|object_ref_end|>")
    return write_tokenizer(folder, special, PLAIN_TEMPLATE, ("<think>", "</think>"))
