"""MTEB's protocol: batches of sounds and of texts, as its loaders give them."""

import numpy as np
import pytest

import medalign_jax
from medalign_jax.audio import read
from medalign_jax.core.errors import UserError
from medalign_jax.mteb import MtebEncoder
from medalign_jax.search.common_space import load_space

pytestmark = pytest.mark.slow

RATE = 16_000


@pytest.fixture(scope="module")
def sounds(finished):
    return [read(path, RATE) for path in sorted((finished / "simulated").rglob("*.wav"))[:5]]


@pytest.fixture(scope="module")
def batches(sounds):
    items = [{"array": sound, "sampling_rate": RATE} for sound in sounds]
    return [{"audio": items[:3], "label": [0, 1, 0]}, {"audio": items[3:]}]


def test_sounds_are_embedded_in_their_order(finished, sounds, batches):
    encoder = medalign_jax.load_encoder(None, finished)
    model = MtebEncoder(encoder, "hearts")
    found = model.encode(batches, task_metadata=None, hf_split="test", hf_subset="default")
    np.testing.assert_allclose(found, encoder.embed(sounds, RATE), atol=1e-5)
    assert model.name == "medalign_jax/hearts"
    stereo = [{"audio": [{"array": np.stack([sounds[0]] * 2), "sampling_rate": RATE}]}]
    np.testing.assert_allclose(model.encode(stereo)[0], found[0], atol=1e-5)


def test_an_aligned_one_takes_texts_and_compares_them(finished, sounds, batches):
    space = load_space(finished)
    model, texts = MtebEncoder(space, "org/hearts"), ["a systolic murmur", "no murmur"]
    audio, words = model.encode(batches), model.encode([{"text": texts}])
    np.testing.assert_allclose(
        model.similarity(audio, words), space.compare(sounds, RATE, texts), atol=1e-5
    )
    pairs = model.similarity_pairwise(audio[:2], words)
    np.testing.assert_allclose(pairs, np.diag(model.similarity(audio[:2], words)), atol=1e-6)


def test_what_it_does_not_take_is_refused(finished):
    model = MtebEncoder(medalign_jax.load_encoder(None, finished), "hearts")
    with pytest.raises(UserError, match="has no words"):
        model.encode([{"text": ["a"]}])
    with pytest.raises(UserError, match="takes audio and text, not image"):
        model.encode([{"image": [None]}])
    assert model.encode([]).shape[0] == 0


def test_the_benchmark_itself_takes_its_description(finished):
    pytest.importorskip("mteb", reason="mteb is not installed: pip install mteb")
    encoder = medalign_jax.load_encoder(None, finished)
    meta = MtebEncoder(encoder, "hearts").mteb_model_meta
    assert meta.name == "medalign_jax/hearts" and meta.embed_dim == encoder.width
