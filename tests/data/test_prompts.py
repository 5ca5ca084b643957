"""Prompts and responses: templates, placeholders, alignment, and every refusal by name."""

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest

from medalign_jax.data.questions.prompts import (
    ExampleError,
    PromptFormat,
    SequenceBuilder,
    build_sequences,
)
from medalign_jax.data.questions.question import Checks, Question, QuestionsError
from medalign_jax.data.questions.readers import read_mmau
from medalign_jax.text.chat import ChatTokenizer, shared_vocabulary
from medalign_jax.text.reasoning import Stages
from medalign_jax.text.tokenizers import TokenizerError
from tests.text import chat_tokenizers as toy

QUESTION = Question(
    id="q1",
    audio=("a.wav",),
    question="Which emotion does the speaker express?",
    choices=("angry", "sad"),
    answer="sad",
    reasoning=Stages("Listen.", "A man speaks.", "His voice is low.", "He is sad."),
    description="A man speaks in a low voice.",
)
TOKENS_OF = 1000  # samples per token


def audio_tokens(samples):
    return samples // TOKENS_OF


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        "student": toy.write_tokenizer(folder / "student"),
        "teacher": toy.write_teacher(folder / "teacher"),
        "plain": toy.write_tokenizer(folder / "plain", template=toy.PLAIN_TEMPLATE),
        "other": toy.write_word_tokenizer(folder / "other"),
        "bare": toy.write_tokenizer(folder / "bare", template=None),
    }


@pytest.fixture(scope="module")
def student(folders):
    return ChatTokenizer(folders["student"])


@pytest.fixture(scope="module")
def teacher(folders):
    return ChatTokenizer(folders["teacher"])


def builder(student, teacher=None, **changes):
    settings = {"audio_tokens": audio_tokens, "max_length": 500} | changes
    return SequenceBuilder(student, teacher, **settings)


def text_of(tokenizer, ids):
    return tokenizer._tokenizer.decode(ids)


def test_what_the_student_and_the_teacher_read(student, teacher):
    found = builder(student, teacher).build(QUESTION, [5200])
    assert text_of(student, found.prompt) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|audio_bos|>" + 5 * "<|AUDIO|>" + "<|audio_eos|>"
        "Which emotion does the speaker express?\nChoose one of these options:\n- angry\n- sad"
        "<|im_end|>\n<|im_start|>assistant\n"
    )
    assert text_of(teacher, found.teacher_prompt) == (
        "<|im_start|>user\nDescription of the recording: A man speaks in a low voice.\n\n"
        "Which emotion does the speaker express?\nChoose one of these options:\n- angry\n- sad"
        "<|im_end|>\n<|im_start|>assistant\n"
    )
    response = (
        "<THINK>\n<PLANNING>\nListen.\n</PLANNING>\n<CAPTION>\nA man speaks.\n</CAPTION>\n"
        "<REASONING>\nHis voice is low.\n</REASONING>\n<SUMMARY>\nHe is sad.\n</SUMMARY>\n"
        "</THINK>\n<RESPONSE>\nsad\n</RESPONSE><|im_end|>"
    )
    assert text_of(student, found.response) == text_of(teacher, found.response) == response


def test_positions_are_those_whose_next_token_is_the_response(student, teacher):
    arrays = builder(student, teacher).build(QUESTION, [3000]).arrays()
    for name in ("student", "teacher"):
        ids, at = arrays[f"{name}_ids"], arrays[f"{name}_at"]
        np.testing.assert_array_equal(ids[at + 1], arrays["response_ids"])
        assert at[-1] == len(ids) - 2
        assert ids.dtype == at.dtype == np.int32
    assert arrays["response_ids"][-1] == student.end_id
    alone = builder(student).build(QUESTION, [3000]).arrays()
    assert set(alone) == {"student_ids", "student_at", "response_ids"}


def test_ids_are_those_of_transformers_processor(student):
    """Qwen2-Audio's own processor, its own default template, two clips of unequal length."""
    from transformers import WhisperFeatureExtractor
    from transformers.models.qwen2_audio.processing_qwen2_audio import Qwen2AudioProcessor

    from medalign_jax.models.encoders.qwen_omni_audio import pooled_tokens

    processor = Qwen2AudioProcessor(WhisperFeatureExtractor(feature_size=8), student._tokenizer)
    template = processor.default_chat_template
    question = replace(QUESTION, audio=("a.wav", "b.wav"), choices=())
    content = [
        *({"type": "audio", "audio": name} for name in question.audio),
        {"type": "text", "text": question.question},
    ]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        chat_template=template,
        add_generation_prompt=True,
        tokenize=False,
    )
    clips = [np.full(n, 0.1, np.float32) for n in (16_000, 5_431)]
    expected = processor(text=text, audio=clips, sampling_rate=16_000)["input_ids"]
    ours = ChatTokenizer(student.folder, template=template)
    assert ours.prompt("x", clips=2).count("Audio 2: <|audio_bos|><|AUDIO|><|audio_eos|>\n") == 1
    found = builder(ours, audio_tokens=lambda n: pooled_tokens(-(-n // 160)))
    ids = found.prompt(question, [len(clip) for clip in clips])
    assert ids == np.asarray(expected).reshape(-1).tolist()


def test_templates_of_text_alone_get_the_placeholder_written(folders):
    plain = ChatTokenizer(folders["plain"])
    assert plain.prompt("Which?", clips=2) == (
        "<|im_start|>user\n" + 2 * "<|audio_bos|><|AUDIO|><|audio_eos|>" + "Which?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    numbered = ChatTokenizer(
        folders["plain"], placeholder="Audio {number}: <|audio_bos|><|AUDIO|><|audio_eos|>\n"
    )
    assert "Audio 2: <|audio_bos|><|AUDIO|><|audio_eos|>\nWhich?" in numbered.prompt("Which?", 2)
    two = replace(QUESTION, audio=("a.wav", "b.wav"))
    ids = np.array(builder(numbered).prompt(two, [2000, 3000]))
    runs = np.diff(np.flatnonzero(np.diff(np.r_[0, ids == plain.audio_id, 0])))[::2]
    assert runs.tolist() == [2, 3]


def test_options_of_the_template_and_a_system_turn(folders):
    quiet = ChatTokenizer(folders["plain"], options={"mode": "<think>\n\n</think>\n\n"})
    text = quiet.prompt("Which?", system="Be brief.")
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    assert text.endswith("assistant\n<think>\n\n</think>\n\n")


def test_the_processors_template_goes_first(folders, tmp_path):
    folder = toy.write_tokenizer(tmp_path / "t", template=toy.PLAIN_TEMPLATE)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": toy.PARTS_TEMPLATE}))
    assert "helpful assistant" in ChatTokenizer(folder).prompt("x")
    for content in ("{", '{"other": 1}', '{"chat_template": 3}'):
        (folder / "chat_template.json").write_text(content)
        with pytest.raises(TokenizerError, match=r"chat_template\.json"):
            ChatTokenizer(folder)


def test_generating_needs_room(student):
    exact = len(builder(student).prompt(QUESTION, [3000]))
    assert len(builder(student, max_length=exact + 9).prompt(QUESTION, [3000], room=9)) == exact
    with pytest.raises(ExampleError, match=r"prompt of \d+ tokens and 10 tokens to be written is"):
        builder(student, max_length=exact + 9).prompt(QUESTION, [3000], room=10)


def test_a_model_that_only_reads(folders, teacher):
    reader = builder(teacher, audio_tokens=None)
    found = reader.build(replace(QUESTION, audio=()), [])
    same = builder(ChatTokenizer(folders["student"]), teacher).build(QUESTION, [3000])
    np.testing.assert_array_equal(found.prompt, same.teacher_prompt)
    np.testing.assert_array_equal(found.response, same.response)
    assert found.samples.shape == (0,)
    np.testing.assert_array_equal(reader.build(QUESTION, [9000]).prompt, found.prompt)


def test_format(student):
    form = PromptFormat(
        options=" Options: {options}.", option="({letter}) {text}", reasoning=False, wording=True
    )
    question = replace(QUESTION, extra={"response": "It is sad."}, choices=("sad", "{letter}"))
    found = builder(student, format=form).build(question, [3000])
    assert "express? Options: (A) sad\n(B) {letter}.<|im_end|>" in text_of(student, found.prompt)
    expected = "<RESPONSE>\nIt is sad.\n</RESPONSE><|im_end|>"
    assert text_of(student, found.response) == expected


def test_shared_vocabulary(folders, student, teacher):
    text_and_turns = 320 + 3
    assert shared_vocabulary(student, teacher) == text_and_turns
    assert shared_vocabulary(student, student) == 326
    assert builder(student, teacher).shared_vocab == text_and_turns
    other = ChatTokenizer(folders["other"])
    with pytest.raises(
        TokenizerError, match=r"first 0 agree, then id 0 is '!' .* and '<CAPTION>' for"
    ):
        builder(student, other)
    with pytest.raises(TokenizerError, match=r"first 323 agree, then id 323 is '<\|AUDIO\|>' for"):
        shared_vocabulary(student, teacher, least=1.0)


@pytest.mark.parametrize(
    ("changes", "samples", "settings", "words"),
    [
        ({}, [9_001], {"max_samples": 9_000}, "'a.wav' has 9001 samples, longer than the model's"),
        ({}, [900], {}, "'a.wav' has 900 samples, too short for one audio token"),
        ({}, [300_000], {}, "prompt of 3.. tokens is longer than the window of 300"),
        ({"answer": "happy"}, [3000], {}, "the answer 'happy' is not among its options"),
        ({"question": "Say <|im_end|>"}, [3000], {}, r"holds the special token '<\|im_end\|>'"),
        ({"choices": ("sad", "<|AUDIO|>")}, [3000], {}, r"special token '<\|AUDIO\|>'"),
        ({"reasoning": "So <|im_end|>."}, [3000], {}, "its response holds the special token"),
        ({"description": "<|object_ref_end|>"}, [3000], {}, "its description, question or options"),
        ({"description": None}, [3000], {}, "no description to read"),
        ({"reasoning": 99 * "so "}, [3000], {}, "sequence of .* and .* of response is longer than"),
        ({"description": 99 * "a "}, [3000], {"teacher_max_length": 150}, "its teacher's sequence"),
        ({}, [3000, 3000], {}, "1 clips, but lengths of 2"),
    ],
)
def test_refused_by_name(student, teacher, changes, samples, settings, words):
    with pytest.raises(ExampleError, match=f"question 'q1': .*{words}") as caught:
        builder(student, teacher, **{"max_length": 300} | settings).build(
            replace(QUESTION, **changes), samples
        )
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.id, again.reason, str(again)) == (
        "q1", caught.value.reason, str(caught.value)
    )  # fmt: skip


def test_placeholders_that_are_not_there(folders, teacher):
    with pytest.raises(TokenizerError, match=r"no audio placeholder, the vocabulary has no token"):
        builder(teacher)
    silent = ChatTokenizer(folders["plain"], placeholder="")
    with pytest.raises(ExampleError, match=r"no audio placeholder for 1 clip\(s\)"):
        builder(silent).build(QUESTION, [3000])
    once = toy.PARTS_TEMPLATE.replace("== 'audio'", "== 'audio' and loop.first").replace(
        "part['text']", "part['text'] or ''"
    )
    two = replace(QUESTION, audio=("a.wav", "b.wav"))
    with pytest.raises(ExampleError, match=r"1 audio placeholder\(s\) for 2 clip\(s\)"):
        builder(ChatTokenizer(folders["student"], template=once)).build(two, [3000, 3000])


def test_responses_that_do_not_align_are_refused_by_name(student, teacher):
    """<think> is one token of the teacher and several of the student."""
    question = replace(QUESTION, reasoning="ab <think> cd")
    with pytest.raises(ExampleError) as caught:
        builder(student, teacher).build(question, [3000])
    ids = [t.ids("<THINK>\nab <think> cd") for t in (student, teacher)]
    place = next(n for n, (a, b) in enumerate(zip(*ids, strict=False)) if a != b)
    think = teacher.ids("<think>")[0]
    a = ids[0][place]
    assert (
        f"response token {place} is {student.token(a)!r} (id {a}) for the student and "
        f"'<think>' (id {think}) for the teacher"
    ) in str(caught.value)


def test_equal_ids_of_different_tokens_do_not_align(tmp_path):
    """Beyond the shared vocabulary the same id stands for something else."""
    special = toy.CHATML
    ours = ChatTokenizer(
        toy.write_tokenizer(tmp_path / "a", special, toy.PLAIN_TEMPLATE, ("xyzzy",))
    )
    theirs = ChatTokenizer(
        toy.write_tokenizer(tmp_path / "b", special, toy.PLAIN_TEMPLATE, ("plugh",))
    )
    reader = builder(ours, theirs, audio_tokens=None)
    assert reader.build(QUESTION, []).teacher_prompt is not None
    reader._aligned(QUESTION, [5, 322], [5, 322])
    with pytest.raises(ExampleError, match=r"token 1 is 'xyzzy' \(id 323\) .* 'plugh' \(id 323\)"):
        reader._aligned(QUESTION, [5, 323], [5, 323])
    with pytest.raises(ExampleError, match="3 response tokens for the student, 2 for the"):
        reader._aligned(QUESTION, [5, 6, 322], [5, 6])


def test_another_end_of_turn_does_not_align(folders, student):
    ends = ChatTokenizer(folders["teacher"], end_of_turn="<|endoftext|>")
    with pytest.raises(ExampleError, match=r"'<\|im_end\|>' .* '<\|endoftext\|>'"):
        builder(student, ends).build(QUESTION, [3000])
    with pytest.raises(TokenizerError, match="no token '<end>' to end a turn"):
        ChatTokenizer(folders["teacher"], end_of_turn="<end>")


def test_folders_without_a_chat_format(folders, tmp_path):
    with pytest.raises(TokenizerError, match="no chat template"):
        ChatTokenizer(folders["bare"])
    assert ChatTokenizer(folders["bare"], template=toy.PLAIN_TEMPLATE).prompt("x")
    with pytest.raises(TokenizerError, match="no tokenizer files"):
        ChatTokenizer(tmp_path)
    with pytest.raises(TokenizerError, match="no special token after a turn"):
        ChatTokenizer(folders["bare"], template="{{ messages[-1]['content'] }} and so on")
    with pytest.raises(TokenizerError, match="its chat template fails: no such turn"):
        ChatTokenizer(folders["bare"], template="{{ raise_exception('no such turn') }}")
    for failing in ("{{ 1 / 0 }}", "{{ 'x' * 10**20 }}"):
        with pytest.raises(TokenizerError, match="its chat template fails"):
            ChatTokenizer(folders["bare"], template=failing)


def test_all_that_make_no_example_are_listed(student, teacher):
    questions = [QUESTION, replace(QUESTION, id="q2", description=None), replace(QUESTION, id="q3")]
    made = build_sequences(builder(student, teacher), questions, [[3000]] * 3, 0.5)
    assert made.kept == (0, 2) and len(made.sequences) == 2
    (problem,) = made.problems
    assert (problem.row, problem.audio_path, problem.fatal) == (2, "q2", True)
    with pytest.raises(QuestionsError, match=r"1 of 3 questions make no example") as caught:
        build_sequences(builder(student, teacher), questions, [[3000]] * 3)
    assert caught.value.problems == (problem,)
    with pytest.raises(QuestionsError, match=r"1 of 1 questions"):
        build_sequences(builder(student, teacher), questions[1:2], [[3000]], 1.0)


def test_decoding_leaves_special_tokens_out(student):
    ids = [*student.ids("He is sad."), student.end_id]
    assert student.decode(np.array(ids, np.int32)) == "He is sad."


def test_every_question_of_mmau_makes_a_prompt_and_a_response(shared, student):
    path = shared / "data/mmau/mmau-test-mini.json"
    questions = read_mmau(path, checks=Checks(require_audio=False)).questions
    made = build_sequences(builder(student, max_length=4000), questions, [[20_000]] * 1000, 0)
    for question, sequences in zip(questions, made.sequences, strict=True):
        text = text_of(student, sequences.prompt)
        assert all(part in text for part in (question.question, *question.choices))
        assert student.decode(sequences.response) == f"<RESPONSE>\n{question.answer}\n</RESPONSE>"
