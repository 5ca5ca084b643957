"""Simulated questions: true answers, options that hold them, words that a tokeniser needs."""

import numpy as np
import pytest

from medalign_jax.data.questions.prompts import PromptFormat
from medalign_jax.datasets.simulated import questions as world
from medalign_jax.datasets.simulated.cases import NOISES, read_cases, write_cases
from medalign_jax.evaluate.answers import matches
from medalign_jax.text.chat import ChatTokenizer
from medalign_jax.text.reasoning import parse_response
from medalign_jax.text.word_tokenizer import SPECIAL, write_word_tokenizer


@pytest.fixture(scope="module")
def listing(tmp_path_factory):
    return write_cases(tmp_path_factory.mktemp("hearts"), 12, 3, 2.0)


@pytest.fixture(scope="module")
def recorded(listing):
    return world.recorded_questions(listing, 0, topics=2, facts=2)


def test_every_recording_is_asked_in_all_ways(recorded):
    tasks = [question.task for question in recorded]
    assert {name: tasks.count(name) for name in set(tasks)} == {
        "acoustic": 12, "plain": 24, "reasoning": 24,
    }  # fmt: skip
    assert len({question.id for question in recorded}) == len(recorded)
    for question in recorded:
        assert question.answer in question.choices
        assert matches(question.answer, question.answer, question.choices)
        wrong = [choice for choice in question.choices if choice != question.answer]
        assert not any(matches(choice, question.answer, question.choices) for choice in wrong)
        assert question.subject_id


def test_reasoning_leads_to_the_answer_and_the_description_hides_the_noise(recorded):
    for question in recorded:
        if question.task != "reasoning":
            continue
        response = PromptFormat().response(question)
        stages, answer = parse_response(response)
        assert answer == question.answer and stages.summary.endswith(f": {answer} .")
        assert 2 <= len(question.choices) <= 4
        assert not set(NOISES) & set(question.description.split())


def test_textual_questions_cover_every_topic_and_diagnosis():
    questions = world.textual_questions(300, seed=1)
    assert {q.sub_category for q in questions} == {*world.TOPICS, *world.FACTS}
    asked = {q.answer for q in questions if q.sub_category == "diagnosis"}
    assert asked == set(world.DIAGNOSES)
    assert all(not q.audio and q.description for q in questions)
    assert questions[:20] == world.textual_questions(20, seed=1)[:20]


def test_label_noise_concludes_as_from_another_murmur_and_keeps_the_findings(listing):
    clean = world.recorded_questions(listing, 0)
    wrong = world.recorded_questions(listing, 0, label_noise=1.0)
    asked = zip(read_cases(listing), *([q for q in each if q.task == "reasoning"]
                for each in (clean, wrong)), strict=True)  # fmt: skip
    for (case, _), right, wrong in asked:
        assert right.reasoning.summary.startswith(f"{case.diagnosis} :")
        assert not wrong.reasoning.summary.startswith(f"{case.diagnosis} :")
        assert wrong.reasoning.summary.endswith(f": {wrong.answer} .")
        assert wrong.answer in wrong.choices and wrong.question == right.question
        heard = case.pitch or "no murmur"
        for question in (right, wrong):
            assert heard in question.reasoning.caption
            assert case.pitch in question.description


def test_the_tokeniser_reads_back_all_that_is_written(recorded, tmp_path):
    format = PromptFormat()
    words = world.words(recorded, format)
    student = ChatTokenizer(write_word_tokenizer(tmp_path / "a", words, world.MARKS))
    teacher = ChatTokenizer(write_word_tokenizer(tmp_path / "b", words, world.MARKS, ("<x>",)))
    unknown = student.ids("<unk>")[0]
    for question in recorded:
        for text in (format.described(question), format.response(question)):
            ids = student.ids(text)
            assert unknown not in ids
            assert student.decode(ids).split() == text.split()
            assert teacher.ids(text) == ids
    prompt = student.prompt("Which diagnosis", clips=1)
    assert student.ids(prompt).count(student.audio_id) == 1
    assert student.token(student.end_id) == "<|im_end|>"
    assert teacher.tokens()[: len(SPECIAL)] == list(SPECIAL)
    assert len(teacher.tokens()) == len(student.tokens()) + 1
    assert np.unique(student.tokens()).size == len(student.tokens())
