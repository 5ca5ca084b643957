"""Responses that reason in four stages and then answer, as text and as parts.

The form is that of CoTA (Audio-Reasoner, arXiv 2503.02318):

    <THINK>
    <PLANNING> ... </PLANNING>
    <CAPTION> ... </CAPTION>
    <REASONING> ... </REASONING>
    <SUMMARY> ... </SUMMARY>
    </THINK>
    <RESPONSE> ... </RESPONSE>

Tags are read in any case. Reading a data set (`parse_response`) is strict, reading what a model
wrote (`final_answer`) is lenient.
"""

import re
from dataclasses import dataclass, fields

from medalign_jax.core.errors import UserError

STAGES = ("PLANNING", "CAPTION", "REASONING", "SUMMARY")


class ReasoningError(UserError):
    """A response whose stages are not what they have to be; the message says which and how."""


@dataclass(frozen=True)
class Stages:
    """The four stages of a reasoning trace; none is empty."""

    planning: str
    caption: str
    reasoning: str
    summary: str

    def __post_init__(self):
        for field in fields(self):
            if not getattr(self, field.name).strip():
                raise ReasoningError(f"the stage {field.name.upper()} is empty")


def parse_response(text: str) -> tuple[Stages, str]:
    """Takes a response with four stages apart.

    Returns:
      The stages, and the text of <RESPONSE>.

    Raises:
      ReasoningError: a tag is missing, comes twice, is not closed, stands in another order, is
        empty, or there is text outside of all.
    """
    think, after = _element("THINK", text, 0)
    before = text[: think.start].strip()
    response, end = _element("RESPONSE", text, after)
    between = text[after : response.start] + text[end:]
    if before or between.strip():
        outside = (before or between.strip())[:40]
        raise ReasoningError(f"text stands outside <THINK> and <RESPONSE>: {outside!r}")
    parts, position = [], 0
    for name in STAGES:
        stage, stop = _element(name, think.text, position)
        if gap := think.text[position : stage.start].strip():
            raise ReasoningError(f"text stands in <THINK> before <{name}>: {gap[:40]!r}")
        parts.append(stage.text.strip())
        position = stop
    if rest := think.text[position:].strip():
        raise ReasoningError(f"text stands in <THINK> after </SUMMARY>: {rest[:40]!r}")
    if not response.text.strip():
        raise ReasoningError("<RESPONSE> is empty")
    return Stages(*parts), response.text.strip()


@dataclass(frozen=True)
class _Element:
    text: str
    start: int


def _element(name: str, text: str, position: int) -> tuple[_Element, int]:
    """The one element of a name, and where it ends."""
    opened = [m for m in re.finditer(f"<{name}>", text, re.IGNORECASE)]
    closed = [m for m in re.finditer(f"</{name}>", text, re.IGNORECASE)]
    for tags, tag in ((opened, f"<{name}>"), (closed, f"</{name}>")):
        if len(tags) != 1:
            how = "missing" if not tags else f"there {len(tags)} times"
            raise ReasoningError(f"{tag} is {how}; stages are {', '.join(STAGES)}, each once")
    if closed[0].start() < opened[0].end():
        raise ReasoningError(f"</{name}> stands before <{name}>")
    if opened[0].start() < position:
        raise ReasoningError(f"<{name}> is out of order; stages are {', '.join(STAGES)}")
    inner = text[opened[0].end() : closed[0].start()]
    return _Element(inner, opened[0].start()), closed[0].end()


def format_response(reasoning: Stages | str | None, answer: str) -> str:
    """Writes the response that a model is to learn; `parse_response` reads it back.

    Args:
      reasoning: four stages, a free text, or None for an answer without reasoning.
      answer: the text of <RESPONSE>.
    """
    if isinstance(reasoning, Stages):
        parts = zip(STAGES, (reasoning.planning, reasoning.caption, reasoning.reasoning,
                             reasoning.summary), strict=True)  # fmt: skip
        thought = "\n".join(f"<{name}>\n{text.strip()}\n</{name}>" for name, text in parts)
    else:
        thought = (reasoning or "").strip()
    think = f"<THINK>\n{thought}\n</THINK>\n" if thought else ""
    return f"{think}<RESPONSE>\n{answer.strip()}\n</RESPONSE>"


def final_answer(text: str) -> str:
    """What a model's response answers; "" where it was cut off while it still reasoned.

    The text of the last <RESPONSE> (closed or not); without one, what comes after </THINK>;
    without that either, the whole text.
    """
    for tag in ("<RESPONSE>", "</THINK>"):
        if found := list(re.finditer(tag, text, re.IGNORECASE)):
            rest = text[found[-1].end() :]
            return re.split("</RESPONSE>", rest, maxsplit=1, flags=re.IGNORECASE)[0].strip()
    return "" if re.search("<THINK>", text, re.IGNORECASE) else text.strip()
