"""One flipped bit anywhere in what a run keeps: refused by name, or nothing changes.

By hand with more of them: ``FLIPS=200 python -m pytest tests/test_flips.py -n 0 -s``.
"""

import collections
import os
import random
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medalign_jax.core.errors import UserError
from medalign_jax.data import open_dataset
from medalign_jax.data.recordings import prepare
from medalign_jax.encoder import Encoder, open_encoder
from medalign_jax.evaluate.embeddings import EmbeddingStore
from medalign_jax.runs.export import export_encoder, export_heads
from medalign_jax.teachers.embedding_cache import EmbeddingCache
from medalign_jax.teachers.state_cache import StateCacheWriter, open_state_cache
from medalign_jax.train.checkpoint import Checkpoints
from medalign_jax.weights.source import resolve
from tests.data import manifests
from tests.evaluate.test_embeddings import Plain
from tests.teachers import test_embedding_cache as test_cache
from tests.teachers import test_state_cache
from tests.toy_encoders import toy

FLIPS = int(os.environ.get("FLIPS", 8))  # of each kind


class CheckpointFolder:
    """Two checkpoints with metrics; what is read may be either of them, whole."""

    def __init__(self, folder: Path):
        checkpoints = Checkpoints(folder / "checkpoints", ("valid/cka", "max"))
        for step in (1, 2):
            checkpoints.save(step, self.state(step), {"batch": step}, {"valid/cka": step / 10})
        checkpoints.close()

    @staticmethod
    def state(step: int):
        w = jax.random.normal(jax.random.key(step), (40, 30))
        return {"params": {"w": w}, "step": jnp.asarray(step)}

    def read(self, folder: Path):
        checkpoints = Checkpoints(folder / "checkpoints", ("valid/cka", "max"))
        try:
            step, state, position = checkpoints.restore_newest(self.state(0))
            best = checkpoints.best(), checkpoints.metrics(step)
        finally:
            checkpoints.close()
        return step, jax.device_get(state), position, best

    def same(self, found, before) -> bool:
        if found[0] == 1:  # the newest was damaged, in words
            before = 1, jax.device_get(self.state(1)), {"batch": 1}, (1, {"valid/cka": 0.1})
        return equal(found, before)


class Plainly:
    """What is read has to be what was read before."""

    def same(self, found, before) -> bool:
        return equal(found, before)


class Export(Plainly):
    def __init__(self, folder: Path):
        made = toy("vit_mae_small")
        shapes = made.abstract_params()
        rng = np.random.default_rng(0)
        params = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), shapes)
        export_encoder(folder, Encoder(made, params, 8_000, pad="zero", trim=False))
        heads = {"text": {part: {"kernel": rng.standard_normal((3, 3)), "bias": np.zeros(3)}
                          for part in ("hidden", "out")}}  # fmt: skip
        export_heads(folder, heads)

    def read(self, folder: Path):
        source, settings = open_encoder(folder)
        heads = resolve(folder / "heads.safetensors")
        return settings, *({n: weights[n].read() for n in weights} for weights in (source, heads))


class TeacherCache(Plainly):
    texts = tuple(map(str, range(20)))

    def __init__(self, folder: Path):
        self.read(folder)

    def read(self, folder: Path):
        teacher = test_cache.Fake()
        teacher.width = 8
        return EmbeddingCache(folder, shard_texts=8).embeddings(teacher, self.texts)


class StateCache(Plainly):
    def __init__(self, folder: Path):
        with StateCacheWriter(folder, test_state_cache.LAST, shard_examples=3) as writer:
            for n in range(7):
                writer.add(test_state_cache.key(n), test_state_cache.example(n))

    def read(self, folder: Path):
        cache = open_state_cache(folder, test_state_cache.LAST)
        return [cache.read(test_state_cache.key(n), 8) for n in range(7)]


class Prepared(Plainly):
    def __init__(self, folder: Path):
        rows = manifests.rows_of(folder.parent, 20, samples=400)
        manifest = manifests.write_csv(folder.parent / "m.csv", rows)
        assert prepare.main([f"--manifest={manifest}", f"--out={folder}"]) == 0

    def read(self, folder: Path):
        data = open_dataset(folder)
        told = [(row.subject_id, row.split, row.label, row.report) for row in data.rows]
        return told, data.sounds, [data.waveform(i) for i in range(len(data))]


class Embeddings(Plainly):
    def __init__(self, folder: Path):
        rows = manifests.rows_of(folder.parent, 10, samples=400)
        self.manifest = manifests.write_csv(folder.parent / "e.csv", rows)
        self.read(folder)

    def read(self, folder: Path):
        data = open_dataset(self.manifest)
        return EmbeddingStore(folder, shard_recordings=4).embed({"plain": Plain()}, data)


def equal(a, b) -> bool:
    leaves = [jax.tree.leaves(x) for x in (a, b)]
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.array_equal(x, y) for x, y in zip(*leaves, strict=True)
    )


KINDS = (CheckpointFolder, Export, TeacherCache, StateCache, Prepared, Embeddings)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_no_flipped_bit_changes_anything_in_silence(kind, tmp_path, capsys):
    whole, rng, outcomes = tmp_path / "whole", random.Random(3), collections.Counter()
    store = kind(whole)
    before = store.read(whole)
    files = sorted(p.relative_to(whole) for p in whole.rglob("*") if p.is_file())
    sizes = [(whole / name).stat().st_size for name in files]
    for number in range(FLIPS):
        # Half by size, as a disk would; half any file, so that the small ones have their turn.
        (name,) = rng.choices(files, sizes) if number % 2 else [rng.choice(files)]
        copy = tmp_path / f"copy {number}"
        shutil.copytree(whole, copy)
        content = bytearray((copy / name).read_bytes())
        if not content:
            continue
        bit = rng.randrange(8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
        (copy / name).write_bytes(content)
        try:
            found = store.read(copy)
        except UserError as error:
            outcomes["refused"] += 1
            assert str(copy) in str(error), (name, bit, str(error))
            continue
        finally:
            shutil.rmtree(copy)
        assert store.same(found, before), (name, bit)
        outcomes["nothing changed, or another whole one was taken"] += 1
    with capsys.disabled():
        if FLIPS > 8:
            print(f"\n{kind.__name__}: {dict(outcomes)}")
    assert sum(outcomes.values()) > FLIPS // 2
