"""Orbax checkpoints of a run: state, iterator, metrics; the latest and the best are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from medalign_jax.errors import UserError

Tree = Any


class Checkpoints:
    """Checkpoints under ``workdir/checkpoints``, saved in the background, committed atomically.

    A save that is killed half-way is not seen as a checkpoint; the next start removes its remains.
    """

    def __init__(self, folder: Path, select: tuple[str, str], keep_latest: int = 1):
        """`select` is (metric name, "max" or "min") of the best checkpoint, kept besides."""
        self.folder = Path(folder).absolute()
        self._metric, self._mode = select
        keep = [
            policies.LatestN(keep_latest),
            policies.BestN(get_metric_fn=self._score, n=1, keep_checkpoints_without_metrics=False),
        ]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(keep),
            best_fn=self._score,  # without it Orbax does not store the metrics
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def _score(self, metrics: dict[str, float]) -> float:
        value = metrics.get(self._metric)
        if value is None or not np.isfinite(value):
            return -float("inf")
        return value if self._mode == "max" else -value

    def save(self, step: int, state: Tree, iterator: Any, metrics: dict[str, float]) -> None:
        """Starts an asynchronous save; `iterator` is JSON-able, `metrics` plain floats."""
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), iterator=ocp.args.JsonSave({"state": iterator})
        )
        self._manager.save(step, args=items, metrics=metrics, force=True)

    def latest(self) -> int | None:
        """Step of the newest whole checkpoint."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """Step whose saved metric is best; the latest where none has it."""
        scored = {
            step: self._score(dict(metrics))
            for step in self._manager.all_steps()
            if (metrics := self._manager.metrics(step))
        }
        scored = {step: score for step, score in scored.items() if np.isfinite(score)}
        return max(scored, key=lambda step: (scored[step], -step)) if scored else self.latest()

    def metrics(self, step: int) -> dict[str, float]:
        """Metrics saved with a step."""
        return dict(self._manager.metrics(step) or {})

    def restore(self, step: int, abstract_state: Tree) -> tuple[Tree, Any]:
        """State (laid out as `abstract_state` says) and iterator state of a step.

        Raises:
          UserError: the checkpoint is of another model or damaged; names the folder.
        """
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract_state), iterator=ocp.args.JsonRestore()
        )
        try:
            restored = self._manager.restore(step, args=items)
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise UserError(
                f"checkpoint {self.folder / str(step)} cannot be restored into this model: {error}"
            ) from error
        return restored.state, restored.iterator["state"]

    def wait(self) -> None:
        """Returns when every started save is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Finishes saves and releases the manager."""
        self._manager.close()


def restore_params(folder: Path, step: int | None = None) -> tuple[Tree, int]:
    """Parameters alone, on the host's first device, from ``checkpoints/`` of a finished run.

    Args:
      folder: the ``checkpoints`` folder.
      step: which; the newest if None.

    Raises:
      UserError: no whole checkpoint there.
    """
    folder = Path(folder).absolute()
    # A save gets its number as its name when it is whole; other folders may be called so too.
    found = folder.iterdir() if folder.is_dir() else ()
    steps = sorted(int(p.name) for p in found if p.name.isdigit() and (p / "state").is_dir())
    if not steps or (step is not None and step not in steps):
        raise UserError(f"{folder} has no checkpoint{'' if step is None else f' {step}'}: {steps}")
    step = steps[-1] if step is None else step
    with ocp.StandardCheckpointer() as reader:
        path = folder / str(step) / "state"
        tree = reader.metadata(path).item_metadata.tree
        abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
        return reader.restore(path, abstract)["params"], step
