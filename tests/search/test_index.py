"""Search by example, against brute force."""

import numpy as np
import pytest

from medalign_jax.search.index import EmbeddingIndex, SearchError


@pytest.fixture(scope="module")
def vectors():
    return np.random.default_rng(0).standard_normal((3000, 7)).astype(np.float32) + 5


def test_hits_are_those_of_the_centred_cosine_best_first(vectors):
    index = EmbeddingIndex(vectors, {"audio_path": [f"{n}.wav" for n in range(3000)]})
    queries = vectors[:1500] + 0.1  # more than are searched at a time
    centred = vectors - vectors.mean(0)
    asked = queries - vectors.mean(0)
    cosines = (asked @ centred.T) / np.outer(*(np.linalg.norm(x, axis=1) for x in (asked, centred)))
    for row, hits in zip(cosines, index.similar(queries, 4), strict=True):
        assert [hit.row for hit in hits] == np.argsort(-row)[:4].tolist()
        np.testing.assert_allclose([h.similarity for h in hits], np.sort(row)[::-1][:4], atol=1e-5)
        assert hits[0].path == f"{hits[0].row}.wav"


def test_a_common_part_of_all_embeddings_counts_for_nothing():
    far = np.array([[1000.0, 0, 1], [1000, 0, -1], [1000, 1, 0]])
    (
        (
            best,
            *_,
        ),
    ) = [h for h in EmbeddingIndex(far).similar(far[:1], 3)]
    assert best.row == 0 and best.similarity == pytest.approx(1)
    assert EmbeddingIndex(far).similar(far[:1], 3)[0][-1].similarity < 0


def test_equals_come_in_the_order_of_the_index_and_all_of_them_where_fewer_are_there():
    index = EmbeddingIndex(np.array([[0.0, 1], [1, 0], [0, 1]]))
    (hits,) = index.similar(np.array([0.0, 1]), 9)
    assert [hit.row for hit in hits] == [0, 2, 1] and len(index) == 3


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda x: EmbeddingIndex(x[:0]), "takes finite embeddings"),
        (lambda x: EmbeddingIndex(x * np.nan), "takes finite embeddings"),
        (lambda x: EmbeddingIndex(x, {"label": ["a"]}), "'label' has 1 of 3000 rows"),
        (lambda x: EmbeddingIndex(x).similar(x[:1, :3]), "embeddings of 7 numbers.* of 3"),
        (lambda x: EmbeddingIndex(x).similar(x[:1], 0), "a count of 1 or more"),
        (lambda x: EmbeddingIndex(x).similar(x[:1] * np.inf), "finite embeddings"),
    ],
)
def test_what_cannot_be_searched_is_said(vectors, make, words):
    with pytest.raises(SearchError, match=words):
        make(vectors)
