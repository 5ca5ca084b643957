"""Questions with their token ids and recordings, by index."""

import hashlib
from collections.abc import Sequence

import numpy as np

from medalign_jax.audio import io as audio_io
from medalign_jax.data.questions.prompts import SequenceBuilder, Sequences, build_sequences
from medalign_jax.data.questions.question import SAMPLE_RATE, Question
from medalign_jax.data.recordings.manifest import Problem
from medalign_jax.data.recordings.sources import CACHE_BYTES, CachedSource, FileSource

_SLACK = 2 * 1152 * SAMPLE_RATE // 8000  # samples: an mp3's header may promise two frames more


class QuestionData:
    """Questions with their token ids and recordings, by index.

    Attributes:
      questions: those that make an example.
      sequences: their token ids.
      problems: why others make none.
      pad_ids: what fills the student's and the teacher's ids up; never looked at.
      clips: most clips of a question, K.
    """

    def __init__(
        self,
        questions: Sequence[Question],
        sequences: Sequence[Sequences],
        pad_ids: tuple[int, int] = (0, 0),
        problems: Sequence[Problem] = (),
        cache_bytes: int = CACHE_BYTES,
    ):
        self.questions, self.sequences = tuple(questions), tuple(sequences)
        self.problems, self.pad_ids = tuple(problems), pad_ids
        self.clips = max(len(each.samples) for each in self.sequences)
        self.has_teacher = self.sequences[0].teacher_prompt is not None
        paths = dict.fromkeys(path for q in self.questions for path in q.audio)
        self._position = {path: n for n, path in enumerate(paths)}
        self._source = CachedSource(FileSource(tuple(paths), SAMPLE_RATE, None), cache_bytes)

    def __len__(self) -> int:
        return len(self.questions)

    def waveform(self, index: int, clip: int) -> np.ndarray:
        """A clip of a question, (samples,) float32 at 16 kHz, as long as its tokens say.

        Raises:
          AudioError: the file cannot be read, or is not the one of which the length was taken.
        """
        path = self.questions[index].audio[clip]
        promised = int(self.sequences[index].samples[clip])
        waveform = self._source.clip(self._position[path]).waveform()
        if abs(len(waveform) - promised) > _SLACK:
            raise audio_io.AudioError(
                path,
                f"has {len(waveform)} samples at 16 kHz and had {promised} when it was opened; "
                "the file has changed: start again",
            )
        return np.pad(waveform[:promised], (0, max(0, promised - len(waveform))))

    def fingerprint(self) -> str:
        """Hex digest of all token ids and lengths."""
        digest = hashlib.blake2b(digest_size=16)
        for each in self.sequences:
            for array in (each.prompt, each.teacher_prompt, each.response, each.samples):
                array = np.zeros(0, np.int32) if array is None else array
                digest.update(len(array).to_bytes(8, "little") + array.astype("<i4").tobytes())
        return digest.hexdigest()

    def with_cache(self, cache_bytes: int) -> "QuestionData":
        """The same questions, keeping at most so many bytes of waveforms in memory."""
        return QuestionData(
            self.questions, self.sequences, self.pad_ids, self.problems, cache_bytes
        )

    @property
    def cache_bytes(self) -> int:
        """Memory for waveforms."""
        return self._source.cache_bytes


def clip_samples(path: str) -> int:
    """Samples of a file at 16 kHz, from its header: what resampling gives, without doing it.

    Raises:
      AudioError: the header cannot be read.
    """
    info = audio_io.probe(path)
    return (2 * info.frames * SAMPLE_RATE + info.sample_rate) // (2 * info.sample_rate)


def open_questions(
    questions: Sequence[Question],
    builder: SequenceBuilder,
    *,
    max_bad_fraction: float = 0.01,
    cache_bytes: int = CACHE_BYTES,
) -> QuestionData:
    """Makes the token ids of all questions; recordings are decoded when a batch asks for them.

    Args:
      questions: from a reader.
      builder: makes token ids.
      max_bad_fraction: share of questions that may make no example.
      cache_bytes: memory for waveforms; what does not fit is decoded again when asked for.

    Raises:
      AudioError: a recording cannot be read.
      QuestionsError: see `prompts.build_sequences`.
    """
    samples: list[list[int]] = [[] for _ in questions]
    if builder.audio_tokens is not None:
        length = {path: 0 for q in questions for path in q.audio}
        length = {path: clip_samples(path) for path in length}
        samples = [[length[path] for path in q.audio] for q in questions]
    built = build_sequences(builder, questions, samples, max_bad_fraction)
    pads = (builder.student.pad_id, builder.teacher.pad_id if builder.teacher else 0)
    kept = [questions[n] for n in built.kept]
    return QuestionData(kept, built.sequences, pads, built.problems, cache_bytes)
