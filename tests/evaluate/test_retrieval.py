import numpy as np
import pytest

from medalign_jax.evaluate import retrieval
from medalign_jax.evaluate.retrieval import RetrievalError


def pairs(n=80, width=6, noise=0.05, seed=0):
    """Text embeddings and a rotated, shifted, noisy copy of them as audio."""
    rng = np.random.default_rng(seed)
    rotation = np.linalg.qr(np.random.default_rng(99).standard_normal((width, width)))[0]
    text = rng.standard_normal((n, width))
    audio = (text + noise * rng.standard_normal((n, width))) @ rotation.T + 3.0
    return audio, text, rotation


@pytest.mark.parametrize("kind", ["procrustes", "ridge"])
def test_map_recovers_a_hidden_rotation_for_new_pairs(kind):
    audio, text, rotation = pairs()
    mapping = retrieval.fit_map(audio, text, kind, ridge=1e-3)
    np.testing.assert_allclose(mapping.matrix, rotation, atol=0.05)
    new_audio, new_text, _ = pairs(40, seed=1)
    ids = range(40)
    blind = retrieval.retrieve(new_audio, new_text, ids)
    seen = retrieval.retrieve(new_audio, new_text, ids, mapping)
    assert blind.audio_to_report.recall(1) < 0.2
    assert seen.audio_to_report.recall(1) > 0.95
    assert seen.report_to_audio.recall(1) > 0.95
    assert seen.audio_to_report.median_rank == 1
    assert seen.audio_to_report.chance_rank == 20.5


def test_procrustes_is_orthogonal_and_takes_different_widths():
    audio, text, _ = pairs()
    mapping = retrieval.fit_map(audio, text, "procrustes")
    np.testing.assert_allclose(mapping.matrix @ mapping.matrix.T, np.eye(6), atol=1e-10)
    narrow = retrieval.fit_map(audio, text[:, :4])
    np.testing.assert_allclose(narrow.matrix.T @ narrow.matrix, np.eye(4), atol=1e-10)


def test_ridge_solves_its_normal_equations():
    audio, text, _ = pairs()
    mapping = retrieval.fit_map(audio, text, "ridge", ridge=0.5)
    a, t = audio - audio.mean(0), text - text.mean(0)
    penalty = 0.5 * np.mean(np.sum(a**2, axis=0))
    gradient = a.T @ (a @ mapping.matrix - t) + penalty * mapping.matrix
    np.testing.assert_allclose(gradient, 0, atol=1e-9)


def test_no_map_leaves_embeddings_alone():
    audio, text, _ = pairs()
    mapping = retrieval.fit_map(audio, text, "none")
    assert np.array_equal(mapping.audio(audio), audio)
    assert np.array_equal(mapping.text(text), text)
    with pytest.raises(RetrievalError, match="widths"):
        retrieval.fit_map(audio, text[:, :3], "none")


def test_nearest_sentence_by_hand():
    classes = np.array([[1.0, 0.0], [0.0, 2.0]])
    result = retrieval.nearest_sentence(np.array([[3.0, 1.0], [1.0, 5.0], [2.0, -1.0]]), classes)
    assert result.predicted.tolist() == [0, 1, 0]
    assert result.scores[0, 0] == pytest.approx(3 / np.sqrt(10))
    assert result.hits(np.array([0, 0, 1])).tolist() == [1, 0, 0]


def test_equal_sentences_share_a_hit_evenly():
    classes = np.array([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    result = retrieval.nearest_sentence(np.array([[1.0, 0.0], [0.0, 1.0]]), classes)
    assert result.hits(np.array([1, 2])).tolist() == [0.5, 1.0]
    assert result.hits(np.array([0, 0])).tolist() == [0.5, 0.0]


def test_nearest_sentence_averages_wordings_as_directions():
    wordings = np.array([[[100.0, 0.0], [0.0, 1.0]], [[-1.0, 0.0], [-2.0, 0.0]]])
    result = retrieval.nearest_sentence(np.array([[1.0, 1.0]]), wordings)
    assert result.scores[0, 0] == pytest.approx(1.0)
    assert result.predicted.tolist() == [0]


def test_retrieval_by_hand_with_identical_reports():
    """Recordings 0 and 1 share report "a"; 2 has "b", 3 has "c"."""
    text = np.array([[1.0, 0, 0], [1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]])
    audio = np.array([[0.9, 0.1, 0.0], [0.3, 0.8, 0.1], [0.2, 0.9, 0.1], [0.5, 0.4, 0.3]])
    result = retrieval.retrieve(audio, text, ["a", "a", "b", "c"], ks=(1, 2, 3))
    assert result.reports == ("a", "b", "c")
    assert result.similarity.shape == (4, 3)
    forward, back = result.audio_to_report, result.report_to_audio
    assert forward.ranks.tolist() == [1, 2, 1, 3]
    assert forward.hits[1].tolist() == [1, 0, 1, 0]
    assert forward.recall(2) == 0.75
    assert forward.chance == pytest.approx({1: 1 / 3, 2: 2 / 3, 3: 1.0})
    assert back.ranks.tolist() == [1, 1, 1, 1]  # "c" is nearest to recording 3
    # report "a" has two right answers of four: 1/2 and 1 - 2/4 * 1/3; the others 1/4 and 1/2
    assert back.chance[1] == pytest.approx((0.5 + 0.5 + 0.25 + 0.25) / 4)
    assert back.chance[2] == pytest.approx((2 * 5 / 6 + 2 * 0.5) / 4)


def test_collapsed_embeddings_score_exactly_chance():
    audio, (_, text, _) = np.ones((20, 6)), pairs(20)
    result = retrieval.retrieve(audio, np.ones((20, 6)), list(range(10)) * 2)
    for direction in (result.audio_to_report, result.report_to_audio):
        for k in (1, 5, 10):
            assert direction.recall(k) == pytest.approx(direction.chance[k])
        assert direction.median_rank == pytest.approx(direction.chance_rank)
    same_audio = retrieval.retrieve(audio, text, range(20))
    assert same_audio.report_to_audio.recall(5) == pytest.approx(0.25)


def test_chance_agrees_with_random_embeddings():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 12, 60)
    text = rng.standard_normal((12, 16))[ids]
    recalls = {k: [] for k in (1, 5, 10)}
    for _ in range(60):
        result = retrieval.retrieve(rng.standard_normal((60, 16)), text, ids.tolist())
        for k in recalls:
            recalls[k].append(result.report_to_audio.recall(k))
    for k, values in recalls.items():
        error = np.std(values) / np.sqrt(len(values))
        assert abs(np.mean(values) - result.report_to_audio.chance[k]) < 4 * error


def test_what_cannot_be_compared_is_refused():
    audio, text, _ = pairs()
    with pytest.raises(RetrievalError, match="80, 80, 3"):
        retrieval.retrieve(audio, text, [1, 2, 3])
    with pytest.raises(RetrievalError, match=r"embedding \[4\] is zero"):
        retrieval.nearest_sentence(np.where(np.arange(80)[:, None] == 4, 0, audio), text[:3])
    with pytest.raises(RetrievalError, match="embedding 2 is not finite"):
        retrieval.nearest_sentence(np.where(np.arange(80)[:, None] == 2, np.inf, audio), text[:3])
    with pytest.raises(RetrievalError, match="all embeddings of one side are the same"):
        retrieval.fit_map(np.ones((5, 3)), text[:5])
    with pytest.raises(RetrievalError, match="unknown map"):
        retrieval.fit_map(audio, text, "cca")
