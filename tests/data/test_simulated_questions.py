"""Simulated questions: true answers, options that hold them, words that a tokeniser needs."""

import numpy as np
import pytest

from medalign_jax.data import simulated_questions as world
from medalign_jax.data.chat import ChatTokenizer
from medalign_jax.data.prompts import PromptFormat
from medalign_jax.data.reasoning import parse_response
from medalign_jax.data.simulate import write_dataset
from medalign_jax.data.word_tokenizer import SPECIAL, write_word_tokenizer
from medalign_jax.evaluate.answers import matches


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("hearts"), 12, 3, seconds=2.0, kinds=("heart",))


@pytest.fixture(scope="module")
def recorded(manifest):
    return world.recorded_questions(manifest, 0, topics=2)


@pytest.mark.parametrize(
    ("site", "phase", "diagnosis"),
    [
        ("AV", "systolic", "aortic stenosis"),
        ("AV", "diastolic", "aortic regurgitation"),
        ("PV", "systolic", "pulmonary stenosis"),
        ("PV", "diastolic", "pulmonary regurgitation"),
        ("MV", "systolic", "mitral regurgitation"),
        ("MV", "diastolic", "mitral stenosis"),
        ("TV", "systolic", "tricuspid regurgitation"),
        ("TV", "diastolic", "tricuspid stenosis"),
        ("TV", "", "normal heart"),
    ],
)
def test_diagnoses_are_those_of_the_textbook(site, phase, diagnosis):
    case = world.Case(site, phase, "low" if phase else "", "loud" if phase else "")
    assert case.diagnosis == diagnosis
    assert diagnosis in world.DIAGNOSES


def test_cases_are_those_of_the_recordings(manifest):
    for case, row in world.read_cases(manifest):
        label = f"{case.phase} murmur" if case.phase else "normal"
        assert row["label"] == label
        if case.phase:
            assert case.site == row["most_audible_location"]
            assert row[f"{case.phase}_murmur_pitch"].lower() == case.pitch
        assert case.rate == round(float(row["heart_rate"]))


def test_every_recording_is_asked_in_all_ways(recorded):
    tasks = [question.task for question in recorded]
    assert {name: tasks.count(name) for name in set(tasks)} == {
        "acoustic": 12, "plain": 12, "reasoning": 24,
    }  # fmt: skip
    assert len({question.id for question in recorded}) == len(recorded)
    for question in recorded:
        assert question.answer in question.choices
        assert matches(question.answer, question.answer, question.choices)
        wrong = [choice for choice in question.choices if choice != question.answer]
        assert not any(matches(choice, question.answer, question.choices) for choice in wrong)
        assert question.subject_id and question.split in ("train", "valid", "test")


def test_reasoning_leads_to_the_answer_and_the_description_hides_the_pitch(recorded):
    for question in recorded:
        if question.task != "reasoning":
            continue
        response = PromptFormat().response(question)
        stages, answer = parse_response(response)
        assert answer == question.answer and stages.summary.endswith(f": {answer} .")
        assert 2 <= len(question.choices) <= 4
        assert not set(world.PITCHES) & set(question.description.split())


def test_textual_questions_cover_every_topic_and_diagnosis():
    questions = world.textual_questions(300, seed=1)
    assert {q.sub_category for q in questions} == set(world.TOPICS)
    asked = {q.answer for q in questions if q.sub_category == "diagnosis"}
    assert asked == set(world.DIAGNOSES)
    assert all(not q.audio and q.description for q in questions)
    assert questions[:20] == world.textual_questions(20, seed=1)[:20]


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
