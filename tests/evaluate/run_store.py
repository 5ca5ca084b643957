"""Run by test_embeddings.py: a store that is killed, or that two processes share."""

import json
import sys
from pathlib import Path

import jax
import numpy as np


def kill(manifest: str, folder: str, after: str) -> None:
    """Embeds until so many recordings have been seen, then kills itself."""
    embedder = Plain(fail_at=int(after))
    EmbeddingStore(folder, shard_recordings=3).embed({"x": embedder}, open_dataset(manifest))


def share(manifest: str, folder: str, address: str, number: str) -> None:
    """Embeds together with another process: all, all again, and what one has lost."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, num_processes=2, process_id=int(number))
    dataset = open_dataset(manifest)
    mine = Path(folder) / "own" / number  # no shared folder
    seen, found = [], []

    def embed(store):
        embedder = Plain()
        found.append(store.embed({"x": embedder}, dataset)["x"])
        seen.append(embedder.seen)

    embed(EmbeddingStore(mine))
    embed(EmbeddingStore(mine))
    shared = EmbeddingStore(Path(folder) / "shared")
    shared.embed({"x": Plain()}, dataset.select(range(6)))
    embed(shared)
    error = ""
    try:
        broken = {"x": Plain(name="broken")} if number == "1" else {"x": Broken(name="broken")}
        EmbeddingStore(None).embed(broken, dataset)
    except UserError as problem:
        error = str(problem)
    np.save(Path(folder) / f"{number}.npy", np.stack(found))
    (Path(folder) / f"{number}.json").write_text(json.dumps({"seen": seen, "error": error}))


if __name__ == "__main__":
    from medalign_jax.core.errors import UserError
    from medalign_jax.data.recordings.dataset import open_dataset
    from medalign_jax.evaluate.embeddings import EmbeddingStore
    from tests.evaluate.test_embeddings import Plain

    class Broken(Plain):
        """Gives no numbers."""

        def stream(self, recordings):
            for row in super().stream(recordings):
                yield row * np.nan

    {"kill": kill, "share": share}[sys.argv[1]](*sys.argv[2:])
