"""Which of several options a text names: by its words, else by a letter ("B", "(b) ...").

One rule for right answers and for what models write.
"""

import re
from collections.abc import Sequence

_CUE = re.compile(
    r"\b(?:answer|option|choice)\b\s*(?:is\b|[:=])\s*:?\s*(?:option\s+|choice\s+)?", re.IGNORECASE
)
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
_MARKS = re.compile(r"\*\*|__|`|\$|\\text(?:bf|rm)?\{([^{}]*)\}")
_OPENING = " \t\r\n*_\"'\u201c\u2018"
_ENCLOSED = re.compile(r"[(\[]\s*([A-Za-z])\s*[)\]](?!['\u2019\w])")
_CAPITAL, _ANY_LETTER = re.compile(r"([A-Z])"), re.compile(r"([A-Za-z])")
_SEPARATOR = re.compile(r"[)\].:,]+\s*|\s*[-\u2013\u2014]\s+")
_JOIN = re.compile(r"\s*(?:,\s*(?:or|and)\b|[,/&]|\b(?:or|and)\b)\s*", re.IGNORECASE)
# What may follow an option's name: the end of a word, of a statement, or whatever stops it.
_WORD_ENDS = r"(?!\w|['\u2019-]\w|[.,]\d)"
_TEXT_ENDS = r"(?=[\s.!*_\"'\u201d\u2019)\]]*$|[,;]?\s+because\b)"
_STOPS = rf"(?:{_TEXT_ENDS}|(?=[.,;:!?)\]}}\"\u201d*](?!\w)|\s+[-\u2013\u2014]\s))"


def find_option(text: str, choices: Sequence[str]) -> str | None:
    """The option that a text *is*: the same but for case and surrounding blanks."""
    wanted = text.strip()
    if wanted in choices:
        return wanted
    same = {choice for choice in choices if choice.casefold() == wanted.casefold()}
    return same.pop() if len(same) == 1 else None


def named_option(text: str, choices: Sequence[str]) -> str | None:
    """The one option that a text names, see `claimed_options`; None for none and for several."""
    claimed = claimed_options(text, choices)
    return claimed[0] if len(claimed) == 1 and claimed[0] in choices else None


def claimed_options(text: str, choices: Sequence[str]) -> tuple[str, ...]:
    """Every option that a text may be said to name, in their order: more than one is ambiguous.

    A text names an option by being it, or in what it says after a cue ("... the answer is",
    "Answer:", "\\boxed{"): there the option whose text stands first, and only where none does the
    letter. So "The answer is D major" is D major, whatever the fourth option. A letter counts if
    nothing but the end, punctuation, "because" or its option's text comes after it ("B", "(b)",
    "**B**", "B. Woman"), after a cue as a capital or in brackets. A letter beside another option's
    text claims both, and a letter that no option has claims itself.
    """
    if (same := find_option(text, choices)) is not None:
        return (same,)
    text = _unmarked(text)
    claims = _claims(text, choices, whole=True)
    for found in _CUE.finditer(text):
        claims |= _claims(text[found.end() :], choices, whole=False)
    for found in _BOXED.finditer(text):
        claims |= _claims(found[1], choices, whole=True)
    known = tuple(dict.fromkeys(choice for choice in choices if choice in claims))
    return known + tuple(sorted(claims.difference(choices)))


def _unmarked(text: str) -> str:
    """Without Markdown's bold and code and LaTeX's text."""
    return _MARKS.sub(lambda mark: mark[1] or "", text).strip()


def _claims(text: str, choices: Sequence[str], whole: bool) -> set[str]:
    """Options that are named where a text begins; `whole`: and nothing else is said."""
    text = text.lstrip(_OPENING)
    found, end = _by_text(text, choices, _TEXT_ENDS if whole else _WORD_ENDS)
    if not found:
        found, end = _by_letter(text, choices, whole)
    joined = _JOIN.match(text, end) if found and not whole else None
    return found | (_claims(text[joined.end() :], choices, whole) if joined else set())


def _by_text(text: str, choices: Sequence[str], after: str) -> tuple[set[str], int]:
    """The longest options that a text begins with, and where they end.

    An option of one letter has to end as letters do: "A" does not begin "A systolic murmur".
    """
    found: dict[str, int] = {}
    for choice in choices:
        plain = _unmarked(choice).rstrip(".")
        ends = _STOPS if len(plain) == 1 and after == _WORD_ENDS else after
        if plain and (match := re.match(re.escape(plain) + ends, text, re.IGNORECASE)):
            found[choice] = match.end()
    longest = max(found.values(), default=0)
    return {choice for choice, end in found.items() if end == longest}, longest


def _by_letter(text: str, choices: Sequence[str], whole: bool) -> tuple[set[str], int]:
    """The option of the letter that a text begins with, and that of a text beside the letter."""
    enclosed = _ENCLOSED.match(text)
    letter = enclosed or (_ANY_LETTER if whole else _CAPITAL).match(text)
    if letter is None:
        return set(), 0
    claim, end = {_at(letter[1], choices) or letter[1].upper()}, letter.end()
    if (gap := _SEPARATOR.match(text, end)) or enclosed:
        rest = text[gap.end() if gap else end :].lstrip(_OPENING)
        beside, _ = _by_text(rest, choices, _TEXT_ENDS if whole else _STOPS)
        if beside:
            return claim | beside, end
    if (enclosed and not whole) or re.match(_TEXT_ENDS if whole else _STOPS, text[end:]):
        return claim, end
    joined = None if whole else _JOIN.match(text, end)
    if joined and _claims(text[joined.end() :], choices, whole):
        return claim, end
    return set(), 0


def _at(letter: str, choices: Sequence[str]) -> str | None:
    place = ord(letter.lower()) - ord("a")
    return choices[place] if place < len(choices) else None
