"""`AudioDataset`: recordings with their rows, from a manifest or a prepared folder."""

import dataclasses
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from medalign_jax.core.local_paths import local
from medalign_jax.data.recordings import records
from medalign_jax.data.recordings.manifest import (
    SPLIT_ALIASES,
    ManifestError,
    Problem,
    Row,
    check,
    read_manifest,
)
from medalign_jax.data.recordings.sources import CACHE_BYTES, CachedSource, Clip, FileSource
from medalign_jax.data.recordings.subjects import plain_subject
from medalign_jax.reports import templates as reports

MAX_SECONDS = 120.0


class AudioDataset:
    """Recordings by index. Selections share their parent's files and memory.

    Attributes:
      rows: what the manifest says of each recording.
      problems: what was wrong with rows left out, and notes (`manifest.write_problems`).
      sample_rate: samples per second of every waveform.
    """

    def __init__(
        self,
        rows: Iterable[Row],
        clips: Iterable[tuple[CachedSource, int]],
        problems: Iterable[Problem] = (),
        sounds: Iterable[str] | None = None,
    ):
        """`clips[i]` is the source of recording i, and its position there.

        `sounds[i]` is its `sources.Clip.sound`, where that is known already.

        Raises:
          ManifestError: no recordings, or sources of different sample rates.
        """
        self.rows = tuple(rows)
        self.problems = tuple(problems)
        self._clips = tuple(clips)
        self._sounds = None if sounds is None else tuple(sounds)
        if not self.rows or len(self.rows) != len(self._clips):
            raise ManifestError(f"{len(self.rows)} rows for {len(self._clips)} recordings")
        rates = sorted({source.sample_rate for source, _ in self._clips})
        if len(rates) > 1:
            raise ManifestError(f"recordings at different sample rates: {rates}; open all at one")
        self.sample_rate = rates[0]

    def __len__(self) -> int:
        return len(self.rows)

    def clip(self, index: int) -> Clip:
        """Recording `index` as 16-bit samples and their scale."""
        source, position = self._clips[index]
        return source.clip(position)

    def waveform(self, index: int) -> np.ndarray:
        """Recording `index`, (samples,) float32, mono, at `sample_rate`.

        The values are 16-bit integers times a power of two chosen for the clip
        (`sources.quantise`), the same from a manifest, a prepared folder, or memory.

        Raises:
          AudioError: the file has become unreadable since it was checked.
        """
        return self.clip(index).waveform()

    @property
    def sounds(self) -> tuple[str, ...]:
        """What each recording sounds like, in short: equal for equal waveforms.

        Known from the check of a manifest or from a prepared folder; else all are read once.
        """
        if self._sounds is None:
            self._sounds = tuple(self.clip(i).sound() for i in range(len(self)))
        return self._sounds

    def reports(
        self, index: int, count: int, seed: int, leave_out: Sequence[str] = ()
    ) -> tuple[str, ...]:
        """The manifest's own report, or up to `count` wordings of the metadata.

        Args:
          index: of the recording.
          count: how many wordings are wanted.
          seed: of their choice.
          leave_out: columns of the metadata of which nothing is said. A recording whose other
            columns say nothing has one that says just that it is a recording.

        Raises:
          ManifestError: something is to be left out of a report that is the manifest's own.
          ReportError: there is no report and the metadata says nothing.
        """
        row = self.rows[index]
        if not leave_out:
            return (row.report,) if row.report else reports.wordings(row.metadata, count, seed)
        if row.report is not None:
            raise ManifestError(
                f"row {row.row} ('{row.audio_path}'): {', '.join(leave_out)} cannot be left out of "
                "a written report; remove it, or leave nothing out"
            )
        return reports.wordings_without(row.metadata, leave_out, count, seed)

    def select(self, which: Sequence[int] | np.ndarray | Callable[[Row], bool]) -> "AudioDataset":
        """The recordings at these indices (in their order), or whose row passes a predicate.

        Raises:
          ManifestError: none is left.
        """
        if callable(which):
            indices = [i for i, row in enumerate(self.rows) if which(row)]
        else:
            indices = [int(i) for i in which]
        if not indices:
            raise ManifestError(f"no row is left of {len(self)} after filtering")
        sounds = self._sounds and [self._sounds[i] for i in indices]
        clips = [self._clips[i] for i in indices]
        return AudioDataset([self.rows[i] for i in indices], clips, self.problems, sounds)

    def with_splits(self, splits: Sequence[str]) -> "AudioDataset":
        """The same recordings in other splits, one name each; "" is in none."""
        pairs = zip(self.rows, splits, strict=True)
        rows = [dataclasses.replace(row, split=split) for row, split in pairs]
        return AudioDataset(rows, self._clips, self.problems, self._sounds)

    def with_subjects(self, subjects: Sequence[str]) -> "AudioDataset":
        """The same recordings of other subjects, one name each; "" is not named."""
        pairs = zip(self.rows, subjects, strict=True)
        rows = [dataclasses.replace(row, subject_id=subject) for row, subject in pairs]
        return AudioDataset(rows, self._clips, self.problems, self._sounds)

    def splits(self) -> dict[str, int]:
        """Number of recordings by split."""
        return dict(Counter(row.split for row in self.rows))

    def split(self, name: str) -> "AudioDataset":
        """The recordings of one split ("train", "valid", "test"; usual other names are known).

        Raises:
          ManifestError: the split has no row.
        """
        name = SPLIT_ALIASES.get(name, name)
        if name not in self.splits():
            there = ", ".join(f"{split}: {count}" for split, count in self.splits().items())
            raise ManifestError(f"no row is left in split '{name}'; rows there are: {there}")
        return self.select(lambda row: row.split == name)

    @property
    def cache_bytes(self) -> int:
        """Memory for the waveforms of each source."""
        return max(source.cache_bytes for source, _ in self._clips)

    def with_cache(self, cache_bytes: int) -> "AudioDataset":
        """The same recordings, keeping at most so many bytes of each source in memory."""
        sources = {id(source): source for source, _ in self._clips}
        renewed = {key: CachedSource(s.source, cache_bytes) for key, s in sources.items()}
        clips = [(renewed[id(source)], position) for source, position in self._clips]
        return AudioDataset(self.rows, clips, self.problems, self._sounds)


def concatenate(datasets: Sequence[AudioDataset]) -> AudioDataset:
    """All recordings of several data sets, in order.

    Raises:
      ManifestError: nothing to join, different sample rates, or a subject in two splits.
    """
    rows = [row for dataset in datasets for row in dataset.rows]
    clips = [clip for dataset in datasets for clip in dataset._clips]
    problems = dict.fromkeys(problem for dataset in datasets for problem in dataset.problems)
    splits: dict[str, str] = {}
    for row in rows:
        subject = _subject(row)
        if splits.setdefault(subject, row.split) != row.split:
            raise ManifestError(
                f"subject '{subject}' is in split '{splits[subject]}' of one data set and in "
                f"'{row.split}' of another; make their subject names distinct"
            )
    sounds = [sound for dataset in datasets for sound in dataset.sounds]
    return AudioDataset(rows, clips, problems, sounds)


def check_joined(base: AudioDataset, added: AudioDataset) -> None:
    """Refuses recordings that must not join a training split.

    Args:
      base: all recordings of a data set, whatever their split.
      added: what is to be trained on beside its training split.

    Raises:
      ManifestError: a subject of another split than "train" (also in another spelling, see
        `data.recordings.subjects`), or, sample for sample, a recording of any split is among
        them; names the first.
    """
    held = {_plain_subject(row): row for row in base.rows if row.split != "train"}
    sounds = {_digest(base, i): row for i, row in enumerate(base.rows)}
    sounds.pop(None, None)
    for i, row in enumerate(added.rows):
        if (other := held.get(_plain_subject(row))) is not None:
            spelt = "" if other.subject_id == row.subject_id else f" as '{other.subject_id}'"
            raise ManifestError(
                f"'{row.audio_path}' cannot be trained on: its subject '{row.subject_id}' is in "
                f"split '{other.split}'{spelt} ('{other.audio_path}'); leave it out"
            )
        if (other := sounds.get(_digest(added, i))) is not None:
            raise ManifestError(
                f"'{row.audio_path}' cannot be added: it is, sample for sample, "
                f"'{other.audio_path}' of split '{other.split}'; leave it out"
            )


def _subject(row: Row) -> str:
    """A recording that is its own subject is known by its whole path: two sets may both have an
    "audio/1.wav"."""
    own = row.audio_path.endswith(os.path.normpath(row.subject_id))
    return row.audio_path if own else row.subject_id


def _plain_subject(row: Row) -> str:
    """The same whatever the spelling; a path has only one."""
    subject = _subject(row)
    return subject if subject == row.audio_path else plain_subject(subject)


def _digest(data: AudioDataset, index: int) -> bytes | None:
    """Of the samples; None of silence, which is not a copy of other silence."""
    samples = data.clip(index).samples
    return hashlib.sha256(samples.tobytes()).digest() if samples.any() else None


def open_dataset(
    path: str | Path,
    *,
    targets: Sequence[str] = (),
    max_seconds: float | None = MAX_SECONDS,
    sample_rate: int = 16_000,
    max_bad_fraction: float = 0.01,
    reports_required: bool = True,
    cache_bytes: int = CACHE_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> AudioDataset:
    """Opens a manifest file, every recording checked, or a folder that `prepare` has written.

    Args:
      path: manifest (CSV, JSONL, Parquet) or prepared folder.
      targets: further columns to keep in `Row.targets`.
      max_seconds: what is read of a longer recording; None reads all of it.
      sample_rate: samples per second to resample to; a prepared folder has to have it.
      max_bad_fraction: share of a manifest's rows that may be unusable.
      reports_required: whether a row has to have a report or metadata for one.
      cache_bytes: memory for waveforms; what does not fit is decoded again when asked for.
      progress: called with (files checked, files in all) of a manifest.

    Raises:
      ManifestError: see `manifest.read_manifest`, `manifest.check`, `records.open_records`.
    """
    path = local(path)
    if path.is_dir():
        found = records.open_records(path, targets, max_seconds, sample_rate)
        cached = CachedSource(found.source, cache_bytes)
        clips = [(cached, n) for n in found.numbers]
        return AudioDataset(_with_organ(found.rows), clips, found.problems, found.sounds)
    rows, problems = read_manifest(path, targets, reports_required=reports_required)
    paths = [row.audio_path for row in rows]
    cached = CachedSource(FileSource(paths, sample_rate, max_seconds), cache_bytes)
    position = {row.row: i for i, row in enumerate(rows)}
    sounds: dict[int, str] = {}

    def digest_sound(row: Row) -> bytes:
        """Fills the memory that the first epoch reads from."""
        clip = cached.clip(position[row.row])
        digest = clip.digest()
        sounds[row.row] = clip.sound(digest)
        return digest

    checked = check(
        rows,
        problems,
        max_bad_fraction=max_bad_fraction,
        max_seconds=max_seconds,
        digest_sound=digest_sound,
        progress=progress,
    )
    clips = [(cached, position[row.row]) for row in checked.rows]
    digests = [sounds[row.row] for row in checked.rows]
    return AudioDataset(_with_organ(checked.rows), clips, checked.problems, digests)


def _with_organ(rows: Iterable[Row]) -> list[Row]:
    """Rows that say only "normal" learn from the whole set which organ was listened to."""
    rows = list(rows)
    diagnoses = {row.metadata.get("diagnosis", "") for row in rows} - {""}
    organ = reports.infer_organ(diagnoses)
    return [
        dataclasses.replace(row, metadata={**row.metadata, "organ": organ})
        if organ and row.metadata.get("diagnosis") and not row.metadata.get("organ")
        else row
        for row in rows
    ]
