import numpy as np
import pytest

from medalign_jax.teachers import TeacherError, load_teacher
from medalign_jax.teachers.words import WIDTH


@pytest.fixture(scope="module")
def teacher():
    return load_teacher("words", layer=3)


def test_texts_are_alike_as_far_as_they_have_the_same_words(teacher):
    texts = ["A systolic murmur.", "a SYSTOLIC murmur", "no murmur", "wheezes"]
    one, same, part, other = teacher.embed(texts)
    np.testing.assert_array_equal(one, same)
    assert one.sum() == 5, "three words and two pairs"
    assert 0 < one @ part < one @ one and one @ other == 0


def test_the_order_of_words_counts_by_pairs(teacher):
    first, second = teacher.embed(["murmur no wheeze", "wheeze no murmur"])
    assert 0 < np.abs(first - second).sum() <= 4


def test_vectors_are_the_same_in_every_process(teacher):
    assert np.flatnonzero(teacher.embed(["murmur"])).tolist() == [852]
    assert teacher.embed(["murmur"]).shape == (1, WIDTH)
    assert len(teacher.fingerprint) == 64


def test_nothing_to_read_is_refused(teacher):
    with pytest.raises(TeacherError, match="text 1 is empty"):
        teacher.embed(["a", " "])
    with pytest.raises(TeacherError, match=r"teacher\.mode=cached"):
        teacher.tokenize(["a"])
