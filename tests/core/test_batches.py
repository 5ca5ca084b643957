"""What batches hold: the list of names and shapes, and that what makes batches keeps to it."""

import numpy as np

from medalign_jax.core.batches import AudioBatch, QuestionBatch, mismatches, shapes


def test_differences_are_told_in_words():
    right = {"waveform": np.zeros((2, 8), np.float32), "length": np.zeros(2, np.int32)}
    assert mismatches(right | {"mine": np.zeros(3)}, AudioBatch) == []
    wrong = {
        "waveform": np.zeros((2, 1, 8), np.float32),
        "samples": np.zeros((2, 3), np.int32),
        "student_ids": np.zeros(4, np.int32),
        "student_at": np.zeros((3, 5), np.int64),
    }
    assert mismatches(wrong, QuestionBatch) == [
        "student_at is int64, not int32",
        "student_at has B = 3, where others have 2",
        "student_ids has shape (4,), not (B T)",
        "waveform has K = 1, where others have 3",
    ]


def test_shapes_of_the_sizes_that_are_given():
    found = shapes(AudioBatch, {"B": 2, "S": 8})
    assert {name: (x.shape, str(x.dtype)) for name, x in found.items()} == {
        "waveform": ((2, 8), "float32"),
        "length": ((2,), "int32"),
        "index": ((2,), "int32"),
        "label": ((2,), "int32"),
    }
    assert mismatches(found, AudioBatch) == []
