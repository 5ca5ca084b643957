"""A word-level tokeniser in the published file layout, for small models that are trained here.

It has what Qwen's tokenisers have besides their words: the turns of ChatML, a chat template, and
the marks that stand for audio. So a tiny model goes through the very code of a published one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|audio_bos|>",
    "<|AUDIO|>",
    "<|audio_eos|>",
)
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'audio' %}"
    "<|audio_bos|><|AUDIO|><|audio_eos|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_word_tokenizer(
    folder: str | Path, words: Sequence[str], marks: Sequence[str] = (), more: Sequence[str] = ()
) -> Path:
    """Writes tokenizer.json and tokenizer_config.json; texts are split at white space.

    Args:
      folder: made if need be.
      words: the vocabulary, in the order of its ids, after `SPECIAL` and `marks`.
      marks: words that are split off wherever they stand, as ``<THINK>``.
      more: further special tokens after the words, as a teacher's table may have; models of the
        same words still share all ids before these.

    Returns:
      The folder.
    """
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    roles = [word for word in ("user", "assistant", "system") if word not in words]
    table = {word: i for i, word in enumerate((*SPECIAL, *marks, "<unk>", *roles, *words, *more))}
    made = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens([AddedToken(t, normalized=False) for t in (*SPECIAL, *more)])
    made.add_tokens([AddedToken(t, normalized=False) for t in marks])
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "chat_template": _TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")
    return folder
