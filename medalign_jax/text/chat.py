"""Chat formats: the template of a tokenizer folder, audio placeholders, the end of a turn."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from medalign_jax.text.tokenizers import FolderTokenizer, TokenizerError

AUDIO_TOKEN = "<|AUDIO|>"
PLACEHOLDER = "<|audio_bos|><|AUDIO|><|audio_eos|>"
# Qwen2-Audio's folders hold no template of their processor, or ChatML, which knows no audio: its
# prompt is fixed by transformers' processor. Clips are counted, and each has a line of its own.
QWEN2_AUDIO_TEMPLATE = """
{%- set heard = namespace(clips=0) -%}
{%- for turn in messages -%}
  {%- if loop.first and turn.role != 'system' -%}
    {{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' -}}
  {%- endif -%}
  {{- '<|im_start|>' + turn.role + '\n' -}}
  {%- for part in ([{'text': turn.content}] if turn.content is string else turn.content) -%}
    {%- if 'audio' in part or 'audio_url' in part or part.type == 'audio' -%}
      {%- set heard.clips = heard.clips + 1 -%}
      {{- 'Audio %d: <|audio_bos|><|AUDIO|><|audio_eos|>\n' % heard.clips -}}
    {%- elif 'text' in part -%}
      {{- part.text -}}
    {%- endif -%}
  {%- endfor -%}
  {{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\n' -}}
{%- endif -%}
"""


class ChatTokenizer(FolderTokenizer):
    """A tokeniser that knows its model's chat format; no remote code, no network.

    The template is the first of: `template`, the processor's (in `processor_config.json`,
    `chat_template.json` or `chat_template.jinja`), `default_template`, and the tokeniser's own (in
    `tokenizer_config.json`), as transformers' processors choose. Where it takes a turn
    in parts, audio is a part and the template writes the placeholders (Qwen2.5-Omni, and
    Qwen2-Audio's processor); where it takes text alone, `placeholder` is written before the text.

    Args:
      folder: of the published tokeniser.
      template: a Jinja chat template, in place of the folder's.
      default_template: that of the model's processor where the folder has none, e.g.
        `QWEN2_AUDIO_TEMPLATE`.
      options: further variables of the template, such as ``{"enable_thinking": False}``.
      audio_token: stands for one embedding of audio.
      placeholder: of one clip, for templates of text alone; ``{number}`` counts the clips
        (Qwen2-Audio: ``"Audio {number}: <|audio_bos|><|AUDIO|><|audio_eos|>\\n"``).
      end_of_turn: token that ends a turn; by default what the template writes after one.

    Attributes:
      audio_id: id of `audio_token`, None for a tokeniser that has none.
      end_id: id of the token that ends a turn.

    Raises:
      TokenizerError: no readable tokeniser or template, or no token that ends a turn.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        template: str | None = None,
        default_template: str | None = None,
        options: Mapping[str, object] | None = None,
        audio_token: str = AUDIO_TOKEN,
        placeholder: str = PLACEHOLDER,
        end_of_turn: str | None = None,
    ):
        super().__init__(folder)
        self._template = template or _processor_template(self.folder) or default_template
        if self._template is None and not self._tokenizer.chat_template:
            raise TokenizerError(
                f"{folder}: no chat template (chat_template.json, chat_template.jinja, or in "
                "tokenizer_config.json). Take the folder of a chat model, or give template="
            )
        self._options = dict(options or {})
        self.audio_token, self.placeholder = audio_token, placeholder
        self._vocabulary = self._tokenizer.get_vocab()
        self.audio_id = self._vocabulary.get(audio_token)
        added = self._tokenizer.added_tokens_decoder
        self.special_tokens = frozenset(t.content for t in added.values() if t.special)
        self._special_ids = frozenset(i for i, t in added.items() if t.special)
        self._takes_parts = self._probe_parts()
        self.end_id = self._end_of_turn(end_of_turn)

    def prompt(self, text: str, clips: int = 0, system: str | None = None) -> str:
        """The user's turn with so many clips before the text, up to where the answer begins.

        Raises:
          TokenizerError: the template refuses it.
        """
        return self._render(self._messages(text, clips, system), add_generation_prompt=True)

    def ids(self, text: str) -> list[int]:
        """Ids of a text as it stands: special tokens in it are read, none are added."""
        return self._ids(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated ids, without special tokens."""
        return self._tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens=True)

    def token(self, id: int) -> str:
        """The token of an id, as the vocabulary writes it; "" for an id that has none."""
        return self._tokenizer.convert_ids_to_tokens(int(id)) or ""

    def tokens(self) -> list[str | None]:
        """Every id's token, None for ids that have none."""
        tokens: list[str | None] = [None] * (max(self._vocabulary.values()) + 1)
        for token, id in self._vocabulary.items():
            tokens[id] = token
        return tokens

    def _messages(self, text: str, clips: int, system: str | None) -> list[dict[str, object]]:
        content: object = text
        if clips and self._takes_parts:
            audio = [{"type": "audio", "audio": f"clip {n + 1}"} for n in range(clips)]
            content = [*audio, {"type": "text", "text": text}]
        elif clips:
            marks = [self.placeholder.replace("{number}", str(n + 1)) for n in range(clips)]
            content = "".join(marks) + text
        first = [] if system is None else [{"role": "system", "content": system}]
        return [*first, {"role": "user", "content": content}]

    def _render(self, messages: list[dict[str, object]], add_generation_prompt: bool) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                messages,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self._options,
            )
        except Exception as error:  # a template is a program: it may fail in any way
            raise TokenizerError(f"{self.folder}: its chat template fails: {error}") from error

    def _probe_parts(self) -> bool:
        parts = [{"type": "audio", "audio": "clip 1"}, {"type": "text", "text": "Which?"}]
        try:
            text = self._render([{"role": "user", "content": parts}], add_generation_prompt=True)
        except TokenizerError:  # a template that joins texts
            return False
        return text.count(self.audio_token) == 1

    def _end_of_turn(self, token: str | None) -> int:
        if token is not None:
            if token not in self._vocabulary:
                raise TokenizerError(f"{self.folder}: no token '{token}' to end a turn")
            return self._vocabulary[token]
        turns = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "This."}]
        text = self._render(turns, add_generation_prompt=False)
        after = self.ids(text.rpartition("This.")[2])
        if not after or after[0] not in self._special_ids:
            raise TokenizerError(
                f"{self.folder}: its chat template writes no special token after a turn; "
                "give end_of_turn="
            )
        return after[0]


def _processor_template(folder: Path) -> str | None:
    """The template of a folder's processor; None if it has none."""
    for name, required in (("processor_config.json", False), ("chat_template.json", True)):
        path = folder / name
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            template = content["chat_template"] if required else content.get("chat_template")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise TokenizerError(f"{path}: holds no chat template: {error!r}") from error
        if template is not None and not isinstance(template, str):
            kind = type(template).__name__
            raise TokenizerError(f"{path}: its chat_template is a {kind}, no text")
        if template is not None:
            return template
    path = folder / "chat_template.jinja"
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else None
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path}: no UTF-8 text: {error}") from error


def shared_vocabulary(student: ChatTokenizer, teacher: ChatTokenizer, least: float = 0.5) -> int:
    """How many ids, from 0 on, mean the same token on both sides.

    Qwen2.5 and Qwen3 share 151,646: all text tokens and the marks of turns; from there on each
    has tokens of its own. Next-token distributions are compared over these alone.

    Args:
      student, teacher: the two tokenisers.
      least: share of the smaller vocabulary that has to be common.

    Raises:
      TokenizerError: less is common; the message shows where they part.
    """
    ours, theirs = student.tokens(), teacher.tokens()
    count = 0
    for a, b in zip(ours, theirs, strict=False):
        if a != b or a is None:
            break
        count += 1
    if count < least * min(len(ours), len(theirs)):
        a, b = (tokens[count] if count < len(tokens) else None for tokens in (ours, theirs))
        raise TokenizerError(
            f"student and teacher share no vocabulary: of {len(ours)} and {len(theirs)} tokens the "
            f"first {count} agree, then id {count} is {a!r} for the student ({student.folder}) and "
            f"{b!r} for the teacher ({teacher.folder}). Take a teacher of the student's family"
        )
    return count
