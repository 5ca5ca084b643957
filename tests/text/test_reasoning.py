"""Responses in four stages: written, read strictly, and read as models write them."""

import pytest

from medalign_jax.text.options import claimed_options, named_option
from medalign_jax.text.reasoning import (
    ReasoningError,
    Stages,
    final_answer,
    format_response,
    parse_response,
)

STAGES = Stages("Plan it.", "A man speaks.", "His voice is low.", "He is sad.")
RESPONSE = format_response(STAGES, "The man is sad. The answer is B.")


def test_stages_survive_writing_and_reading():
    answer = "The man is sad. The answer is B."
    assert parse_response(RESPONSE) == (STAGES, answer)
    published = RESPONSE.replace("THINK>", "think>").replace("\n</CAPTION>", "</CAPTION>")
    assert parse_response(published) == (STAGES, answer)
    assert format_response(None, " sad ") == "<RESPONSE>\nsad\n</RESPONSE>"
    assert format_response("Low.", "sad").startswith("<THINK>\nLow.\n</THINK>\n<RESPONSE>")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("<CAPTION>", "", "<CAPTION> is missing"),
        ("</SUMMARY>", "", "</SUMMARY> is missing"),
        ("</THINK>", "", "</THINK> is missing"),
        ("<RESPONSE>", "", "<RESPONSE> is missing"),
        ("<PLANNING>", "<PLANNING><PLANNING>", "<PLANNING> is there 2 times"),
        ("Plan it.", " ", "stage PLANNING is empty"),
        ("<THINK>", "So: <THINK>", "text stands outside <THINK> and <RESPONSE>: 'So:'"),
        ("</RESPONSE>", "</RESPONSE> Bye.", "text stands outside .*: 'Bye.'"),
        ("<CAPTION>", "Hm. <CAPTION>", "text stands in <THINK> before <CAPTION>: 'Hm.'"),
        ("</SUMMARY>", "</SUMMARY> Hm.", "text stands in <THINK> after </SUMMARY>: 'Hm.'"),
        ("The man is sad. The answer is B.", " ", "<RESPONSE> is empty"),
    ],
)
def test_malformed_stages_are_named(old, new, words):
    assert old in RESPONSE
    with pytest.raises(ReasoningError, match=words):
        parse_response(RESPONSE.replace(old, new))


def test_stages_in_another_order():
    swapped = (
        RESPONSE.replace("PLANNING", "X").replace("CAPTION", "PLANNING").replace("X>", "CAPTION>")
    )
    with pytest.raises(ReasoningError, match=r"before <PLANNING>|out of order"):
        parse_response(swapped)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (RESPONSE, "The man is sad. The answer is B."),
        ("<THINK>hm</THINK>\n<response>sad", "sad"),
        ("<think>hm</think> sad", "sad"),
        ("<THINK> no end: sad", ""),
        (" sad ", "sad"),
        ("<RESPONSE>a</RESPONSE><RESPONSE>b</RESPONSE>", "b"),
        ("<THINK>İİİ</THINK><RESPONSE>İ", "İ"),  # longer in lower case
        ("<THINK>hm</THINK> sad</RESPONSE> so", "sad"),
        ("", ""),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "option"),
    [
        ("Woman", "woman"), (" woman ", "woman"), ("B", "woman"), ("(b)", "woman"), ("b.", "woman"),
        ("B. Woman", "woman"), ("A. Woman", None), ("(C) a dog", "a dog"), ("E", None),
        ("It barks. The answer is C.", "a dog"), ("The answer is (a)", "man"),
        ("The answer is a dog", "a dog"), ("the answer is: option A", "man"), ("", None),
        ("The answer is A. No, the answer is B.", None), ("The answer is A's", None),
    ],
)  # fmt: skip
def test_named_option(text, option):
    assert named_option(text, ["man", "woman", "a dog", "Robot"]) == option


def test_an_option_that_is_a_letter_goes_first():
    assert named_option("A", ["B", "A"]) == "A"
    assert named_option("C", ["B", "A", "D"]) == "D"


KEYS = ["G major", "D major", "A major", "E minor"]
SOUNDS = ["A normal heart", "A systolic murmur"]
LUNGS = ["Consolidation", "B lines", "A lines"]
RHYTHMS = ["Sinus rhythm", "Flutter", "Ectopy", "A-fib"]


@pytest.mark.parametrize(
    ("text", "choices", "option"),
    [
        ("The answer is D major.", KEYS, "D major"),
        ("The answer is A major, as its third is C sharp.", KEYS, "A major"),
        ("The answer is D.", KEYS, "E minor"),
        ("A systolic murmur", SOUNDS, "A systolic murmur"),
        ("The answer is A systolic murmur.", SOUNDS, "A systolic murmur"),
        ("The answer is A diastolic murmur.", SOUNDS, None),
        ("The answer is B lines.", LUNGS, "B lines"),
        ("The answer is A lines", LUNGS, "A lines"),
        ("The answer is A-fib.", RHYTHMS, "A-fib"),
        ("The answer is A-flutter.", RHYTHMS, None),
        ("The answer is A woman.", ["A man", "A woman"], "A woman"),
        ("The answer is A woman.", ["Man", "Woman"], None),
        ("The answer is 1.5", ["1", "1.5"], "1.5"),
        ("The answer is no murmur at all", ["no", "no murmur"], "no murmur"),
        ("**B**", SOUNDS, "A systolic murmur"),
        ("**Answer:** (B)", SOUNDS, "A systolic murmur"),
        ("Answer: (C)", KEYS, "A major"),
        ("So it is \\boxed{C}", KEYS, "A major"),
        ("The answer is $\\boxed{\\text{E minor}}$.", KEYS, "E minor"),
        ("The answer is **B** because it is bright", KEYS, "D major"),
        ("B because it is bright", KEYS, "D major"),
        ("The answer is [B]", KEYS, "D major"),
        ("The answer is B. A lines are seen in health.", LUNGS, "B lines"),
        ("I hear a B flat.", KEYS, None),
    ],
)
def test_an_options_text_goes_before_a_letter(text, choices, option):
    assert named_option(text, choices) == option


@pytest.mark.parametrize(
    ("text", "choices", "claimed"),
    [
        ("A. Woman", ["man", "woman"], ("man", "woman")),
        ("The answer is A. Woman.", ["man", "woman"], ("man", "woman")),
        ("The answer is A or B.", KEYS, ("G major", "D major")),
        ("The answer is D major or E minor", KEYS, ("D major", "E minor")),
        ("The answer is A. No, the answer is B.", KEYS, ("G major", "D major")),
        ("FIG", ["Fig", "fig"], ("Fig", "fig")),
        ("(E) Woman", ["man", "woman"], ("woman", "E")),
        ("It barks.", ["man", "woman"], ()),
    ],
)
def test_an_answer_that_two_options_could_claim_names_none(text, choices, claimed):
    assert claimed_options(text, choices) == claimed
    assert named_option(text, choices) is None
