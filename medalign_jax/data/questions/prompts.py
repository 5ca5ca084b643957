"""From questions to token ids: chat prompts, response tokens, and where the two models meet.

Student and teacher read different prompts, audio against description, and then the very same
response tokens. A prompt and a response are tokenised apart and joined as ids, as in generation:
a response never changes the tokens of its prompt, and a response token has the same id on both
sides, which is verified for every example. Chat formatting is that of the tokenizer folder's own
template.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from medalign_jax.core.errors import UserError
from medalign_jax.data.questions.question import Question, QuestionsError
from medalign_jax.data.recordings.manifest import LINES_IN_MESSAGE, Problem, problem_table
from medalign_jax.text.chat import ChatTokenizer, shared_vocabulary
from medalign_jax.text.options import find_option
from medalign_jax.text.reasoning import format_response
from medalign_jax.text.tokenizers import TokenizerError


class ExampleError(UserError):
    """A question that makes no example.

    Attributes:
      id: the question's.
      reason: what is wrong and what to do, without the id.
    """

    def __init__(self, id: str, reason: str):
        super().__init__(f"question '{id}': {reason}")
        self.id, self.reason = id, reason

    def __reduce__(self):
        """Lets the error cross from one process to another."""
        return type(self), (self.id, self.reason)


@dataclass(frozen=True)
class PromptFormat:
    """The words around a question.

    Attributes:
      system: first turn; None leaves it to the template.
      description: before the question, for a text-only model; with ``{description}``.
      options: after a question with options; with ``{options}``.
      option: each of them; with ``{text}`` and, if wanted, ``{letter}``. MMAU's rule counts a
        letter in an answer as a word, so there are none by default.
      reasoning: whether a response holds the reasoning, or the answer alone.
      wording: answer in the record's own words (``extra["response"]``) where it has them.
    """

    system: str | None = None
    description: str = "Description of the recording: {description}\n\n"
    options: str = "\nChoose one of these options:\n{options}"
    option: str = "- {text}"
    reasoning: bool = True
    wording: bool = False

    def user_text(self, question: Question) -> str:
        """The question with its options."""
        if not question.choices:
            return question.question
        lines = [self.option.replace("{letter}", chr(ord("A") + n)).replace("{text}", choice)
                 for n, choice in enumerate(question.choices)]  # fmt: skip
        return question.question + self.options.replace("{options}", "\n".join(lines))

    def described(self, question: Question) -> str:
        """The description of the recording, then the question with its options."""
        words = self.description.replace("{description}", question.description or "")
        return words + self.user_text(question)

    def response(self, question: Question) -> str:
        """What a model is to answer."""
        answer = question.extra.get("response", "") if self.wording else ""
        reasoning = question.reasoning if self.reasoning else None
        return format_response(reasoning, answer or question.answer)


@dataclass(frozen=True, eq=False)
class Sequences:
    """The token ids of an example, each (n,) int32.

    Attributes:
      prompt: of the student, one audio token for each embedding of audio.
      teacher_prompt: None without a teacher.
      response: the very same for both, the end of the turn included.
      samples: (K,) of each clip.
    """

    prompt: np.ndarray
    teacher_prompt: np.ndarray | None
    response: np.ndarray
    samples: np.ndarray

    def arrays(self) -> dict[str, np.ndarray]:
        """student_ids (T,), response_ids (R,), student_at (R,), and the teacher's if there is one.

        `..._at` are the positions whose *next* token is the response's: the first is the last of
        the prompt.
        """
        found = {"response_ids": self.response}
        for name, prompt in (("student", self.prompt), ("teacher", self.teacher_prompt)):
            if prompt is not None:
                found[f"{name}_ids"] = np.concatenate([prompt, self.response])
                at = len(prompt) - 1 + np.arange(len(self.response))
                found[f"{name}_at"] = at.astype(np.int32)
        return found


class SequenceBuilder:
    """Makes a question's token ids, or says by name why it makes none.

    Args:
      student: the audio language model's tokeniser; it has an audio token.
      teacher: the text-only model's, or None.
      audio_tokens: embeddings of audio for so many samples at 16 kHz (the model's front end and
        tower decide, see `models.encoders.qwen_omni_audio.pooled_tokens`); None for a text-only
        model: its prompt holds the description in place of the recordings.
      max_length: longest sequence of the student, prompt and response.
      teacher_max_length: of the teacher; `max_length` by default.
      max_samples: longest clip that the model takes; None for no limit.
      format: the words around a question.

    Attributes:
      shared_vocab: ids that mean the same on both sides; None without a teacher.

    Raises:
      TokenizerError: no audio token, or no vocabulary in common.
    """

    def __init__(
        self,
        student: ChatTokenizer,
        teacher: ChatTokenizer | None,
        audio_tokens: Callable[[int], int] | None,
        max_length: int,
        *,
        teacher_max_length: int | None = None,
        max_samples: int | None = None,
        format: PromptFormat | None = None,
    ):
        if audio_tokens is not None and student.audio_id is None:
            raise TokenizerError(
                f"{student.folder}: no audio placeholder, the vocabulary has no token "
                f"'{student.audio_token}'. Take the tokenizer of an audio language model"
            )
        self.student, self.teacher, self.audio_tokens = student, teacher, audio_tokens
        self.max_length = max_length
        self.teacher_max_length = teacher_max_length or max_length
        self.max_samples = max_samples
        self.format = format or PromptFormat()
        self.shared_vocab = None if teacher is None else shared_vocabulary(student, teacher)

    def prompt(self, question: Question, samples: Sequence[int], room: int = 0) -> list[int]:
        """The student's prompt, to generate from.

        Args:
          question: a question with one or more clips.
          samples: of each clip, at 16 kHz.
          room: tokens that are to be written after it.

        Raises:
          ExampleError: see `build`.
        """
        if self.audio_tokens is None or not question.audio:
            ids = self._read_prompt(question, self.student)
        else:
            ids = self._heard_prompt(question, samples)
        if len(ids) + room > self.max_length:
            more = f" and {room} tokens to be written" if room else ""
            raise ExampleError(
                question.id,
                f"its prompt of {len(ids)} tokens{more} is longer than the window of "
                f"{self.max_length}; cut the recording or the text, or make max_length larger",
            )
        return ids

    def build(self, question: Question, samples: Sequence[int]) -> Sequences:
        """The sequences to train on.

        Args:
          question: a question with one or more clips, and a description if there is a teacher.
          samples: of each clip, at 16 kHz.

        Raises:
          ExampleError: audio longer than the model's limit or too short for a token, a number
            of placeholders other than that of clips, text that holds a special token, an
            answer that is not among the options, no description for the teacher, response
            tokens that differ between student and teacher, or a sequence longer than the
            window.
        """
        if question.choices and find_option(question.answer, question.choices) is None:
            raise ExampleError(
                question.id, f"the answer '{question.answer}' is not among its options"
            )
        prompt = self.prompt(question, samples)
        text = self.format.response(question)
        self._no_special(question, self.student, "response", text)
        response = [*self.student.ids(text), self.student.end_id]
        self._fits(question, "", prompt, response, self.max_length)
        teacher_ids = None
        if self.teacher is not None:
            teacher_ids = self._read_prompt(question, self.teacher)
            self._aligned(question, response, [*self.teacher.ids(text), self.teacher.end_id])
            self._fits(question, "teacher's ", teacher_ids, response, self.teacher_max_length)
            teacher_ids = np.array(teacher_ids, np.int32)
        clip_samples = samples if self.audio_tokens else ()
        return Sequences(np.array(prompt, np.int32), teacher_ids, np.array(response, np.int32),
                         np.array(clip_samples, np.int32))  # fmt: skip

    def _heard_prompt(self, question: Question, samples: Sequence[int]) -> list[int]:
        text = self.format.user_text(question)
        self._no_special(question, self.student, "question or options", text)
        ids = self.student.ids(
            self.student.prompt(text, clips=len(question.audio), system=self.format.system)
        )
        return self._with_audio(question, ids, samples)

    def _with_audio(self, question: Question, ids: list[int], samples: Sequence[int]) -> list[int]:
        """Each placeholder once for every embedding of its clip."""
        if len(samples) != len(question.audio):
            raise ExampleError(
                question.id, f"{len(question.audio)} clips, but lengths of {len(samples)}"
            )
        marks = ids.count(self.student.audio_id)
        if marks != len(samples):
            what = "no audio placeholder" if not marks else f"{marks} audio placeholder(s)"
            raise ExampleError(
                question.id,
                f"its prompt has {what} for {len(samples)} clip(s); mend the chat template or "
                "placeholder= of the student's tokenizer",
            )
        counts = iter([self._count(question, n, each) for n, each in enumerate(samples)])
        found: list[int] = []
        for id in ids:
            found.extend([id] * next(counts) if id == self.student.audio_id else [id])
        return found

    def _count(self, question: Question, number: int, samples: int) -> int:
        if self.max_samples is not None and samples > self.max_samples:
            raise ExampleError(
                question.id,
                f"'{question.audio[number]}' has {samples} samples, longer than the model's limit "
                f"of {self.max_samples}; cut it or leave it out",
            )
        count = int(self.audio_tokens(samples))
        if count < 1:
            raise ExampleError(
                question.id,
                f"'{question.audio[number]}' has {samples} samples, too short for one audio token",
            )
        return count

    def _read_prompt(self, question: Question, tokenizer: ChatTokenizer) -> list[int]:
        if not question.description:
            raise ExampleError(
                question.id,
                "no description to read in place of its recordings; put them into words first "
                "(configs/textualize.py)",
            )
        text = self.format.described(question)
        self._no_special(question, tokenizer, "description, question or options", text)
        return tokenizer.ids(tokenizer.prompt(text, system=self.format.system))

    def _no_special(
        self, question: Question, tokenizer: ChatTokenizer, what: str, text: str
    ) -> None:
        """Such a token in a text would end a turn or stand for audio that is not there."""
        if found := sorted(token for token in tokenizer.special_tokens if token in text):
            raise ExampleError(
                question.id, f"its {what} holds the special token '{found[0]}'; remove it"
            )

    def _fits(
        self, question: Question, whose: str, prompt: list[int], response: list[int], longest: int
    ) -> None:
        if len(prompt) + len(response) > longest:
            raise ExampleError(
                question.id,
                f"its {whose}sequence of {len(prompt)} tokens of prompt and {len(response)} of "
                f"response is longer than the window of {longest}; cut the text, or make the "
                "window larger",
            )

    def _aligned(self, question: Question, ours: list[int], theirs: list[int]) -> None:
        for n, (a, b) in enumerate(zip(ours, theirs, strict=False)):
            if a != b or a >= self.shared_vocab:
                raise ExampleError(
                    question.id,
                    f"student and teacher do not align: response token {n} is "
                    f"{self.student.token(a)!r} (id {a}) for the student and "
                    f"{self.teacher.token(b)!r} (id {b}) for the teacher; reword the response",
                )
        if len(ours) != len(theirs):
            raise ExampleError(
                question.id,
                f"student and teacher do not align: {len(ours)} response tokens for the student, "
                f"{len(theirs)} for the teacher; reword the response",
            )


@dataclass(frozen=True)
class Built:
    """Examples, where each is in the list of questions, and why the others made none."""

    kept: tuple[int, ...]
    sequences: tuple[Sequences, ...]
    problems: tuple[Problem, ...]


def build_sequences(
    builder: SequenceBuilder,
    questions: Sequence[Question],
    samples: Sequence[Sequence[int]],
    max_bad_fraction: float = 0.01,
) -> Built:
    """Builds every example; those that cannot be are listed, not dropped without a word.

    Args:
      builder: see `SequenceBuilder`.
      questions: N questions; problems count them from 1.
      samples: N lists of the clips' lengths, at 16 kHz.
      max_bad_fraction: share of the questions that may make no example.

    Raises:
      QuestionsError: more than that, or none left. `.problems` has all of them.
    """
    kept, sequences, problems = [], [], []
    for n, (question, lengths) in enumerate(zip(questions, samples, strict=True)):
        try:
            sequences.append(builder.build(question, lengths))
            kept.append(n)
        except ExampleError as error:
            problems.append(Problem(n + 1, question.id, error.reason, fatal=True))
    if not kept or len(problems) > max_bad_fraction * len(questions):
        table = problem_table(problems, limit=LINES_IN_MESSAGE)
        raise QuestionsError(
            f"{len(problems)} of {len(questions)} questions make no example (max_bad_fraction "
            f"is {max_bad_fraction:g}). Mend or remove them:\n{table}",
            tuple(problems),
        )
    return Built(tuple(kept), tuple(sequences), tuple(problems))
