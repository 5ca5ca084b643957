"""Orbax checkpoints of a run: state, iterator, metrics; the newest and the best are kept.

Every checkpoint is sealed (`core.seals`) before it gets its name, and compared with its checksums
before it is accepted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

from medalign_jax.core.errors import UserError
from medalign_jax.core.seals import DamagedError, check_seal, seal

Tree = Any
KEEP = 2  # newest checkpoints: where one is damaged there is another
_TIMES = "_CHECKPOINT_METADATA"  # in which Orbax notes the time when a checkpoint gets its name
DAMAGED = "damaged_checkpoints"  # beside the folder of the others


class Checkpoints:
    """Checkpoints under ``workdir/checkpoints``, saved in the background, committed atomically.

    A save that is killed half-way is not seen as a checkpoint; the next start removes its remains.
    """

    def __init__(self, folder: Path, select: tuple[str, str], keep_latest: int = KEEP):
        """`select` is (metric name, "max" or "min") of the best checkpoint, which is kept too.

        Raises:
          UserError: the metrics of every checkpoint are damaged.
        """
        self.folder = Path(folder).absolute()
        self._metric, self._mode = select
        self._saving: int | None = None
        self._check_metrics()
        keep = [
            policies.LatestN(keep_latest),
            policies.BestN(get_metric_fn=self._score, n=1, keep_checkpoints_without_metrics=False),
        ]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(keep),
            best_fn=self._score,  # without it Orbax does not store the metrics
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
            # Called when all files are written, before the checkpoint gets its name.
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._seal),
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def _score(self, metrics: dict[str, float]) -> float:
        value = metrics.get(self._metric)
        if value is None or not np.isfinite(value):
            return -float("inf")
        return value if self._mode == "max" else -value

    def _seal(self) -> None:
        if jax.process_index() == 0:
            (unfinished,) = self.folder.glob(f"{self._saving}.orbax-checkpoint-tmp*")
            seal(unfinished, but=(_TIMES,))

    def _check_metrics(self) -> None:
        """Sets aside checkpoints with damaged metrics: the choice of the best goes by them."""
        failed, steps = {}, steps_in(self.folder)
        for step in steps:
            try:
                _check(self.folder / str(step), under="metrics/")
            except DamagedError as error:
                failed[step] = error
        self._set_aside(failed, [step for step in steps if step not in failed])

    def save(self, step: int, state: Tree, iterator: Any, metrics: dict[str, float]) -> None:
        """Starts an asynchronous save; `iterator` is JSON-able, `metrics` plain floats."""
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), iterator=ocp.args.JsonSave({"state": iterator})
        )
        self.wait()  # Orbax would too; the number of the save before is needed until then
        self._saving = step
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
          DamagedError: files of the checkpoint are not as they were saved, or numbers in it are
            not finite; names them.
          UserError: it is of another model; names the folder.
        """
        place = self.folder / str(step)
        if not _check(place):
            print(f"checkpoint {place} has no checksums (an earlier version saved it): damage to "
                  "it may go unnoticed", flush=True)  # fmt: skip
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract_state), iterator=ocp.args.JsonRestore()
        )
        try:
            restored = self._manager.restore(step, args=items)
            position = restored.iterator["state"]
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise UserError(
                f"checkpoint {place} cannot be restored into this model: {error}"
            ) from error
        if not _all_finite(restored.state):
            raise DamagedError(f"checkpoint {place} holds numbers that are not finite")
        return restored.state, position

    def restore_newest(self, abstract_state: Tree) -> tuple[int, Tree, Any] | None:
        """(step, state, iterator state) of the newest whole checkpoint; None where there is none.

        Damaged ones are reported, and moved to ``damaged_checkpoints`` beside the folder of the
        others, so that training can pass their steps again.

        Raises:
          UserError: no checkpoint can be restored, be it damaged or of another model.
        """
        failed: dict[int, UserError] = {}
        found = None
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                found = step, *self.restore(step, abstract_state)
                break
            except UserError as error:
                failed[step] = error
        self._set_aside(failed, [found[0]] if found else [])
        if failed:
            self._manager.reload()
        return found

    def restore_best(self, step: int, state: Tree) -> tuple[int, Tree]:
        """(step, state) of the best whole checkpoint; damaged ones are reported and moved away.

        Args:
          step: of the newest checkpoint.
          state: as it is in memory: what there is without reading. Others are laid out like it.
        """
        template = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
        )
        while (best := self.best()) != step:
            try:
                return best, self.restore(best, template)[0]
            except UserError as error:
                self._set_aside({best: error}, [step])
                self._manager.reload()
        return step, state

    def _set_aside(self, failed: Mapping[int, UserError], whole: Sequence[int]) -> None:
        """Moves checkpoints away and says so; refuses where no whole one is left."""
        if failed and not whole:
            raise UserError(
                "; ".join(map(str, failed.values())) + ". No other checkpoint is there: begin anew "
                "with --restart, or in another --workdir"
            )
        place = self.folder.parent / DAMAGED
        _together("checkpoints are looked at")
        for step, error in failed.items() if jax.process_index() == 0 else ():
            place.mkdir(exist_ok=True)
            taken = [int(p.suffix[1:]) for p in place.glob(f"{step}.*") if p.suffix[1:].isdigit()]
            target = place / f"{step}.{max(taken, default=0) + 1}"
            (self.folder / str(step)).rename(target)
            print(f"{error}. It was moved to {target}; step {max(whole)} is the newest other one",
                  flush=True)  # fmt: skip
        _together("damaged checkpoints were moved")

    def wait(self) -> None:
        """Returns when every started save is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Finishes saves and releases the manager."""
        self._manager.close()


def steps_in(folder: Path) -> list[int]:
    """Steps of the committed checkpoints in a ``checkpoints`` folder, in order."""
    # A save gets its number as its name when it is whole; other folders may be called so too.
    found = Path(folder).iterdir() if Path(folder).is_dir() else ()
    return sorted(int(p.name) for p in found if re.fullmatch(r"\d+", p.name) and _is_save(p))


def _is_save(folder: Path) -> bool:
    return (folder / "state").is_dir()


def _check(place: Path, under: str = "") -> bool:
    """Whether a checkpoint has checksums, and agrees with them: each process reads a share.

    Raises:
      DamagedError: on all processes, where any has found damage.
    """
    found, sealed = None, False
    try:
        sealed = check_seal(place, under, (jax.process_index(), jax.process_count()))
    except DamagedError as error:
        found = error
    if jax.process_count() > 1:
        bad = np.asarray(multihost_utils.process_allgather(np.array(found is not None)))
        if bad.any() and found is None:
            found = DamagedError(f"{place} is damaged, as process {int(bad.argmax())} found")
    if found is not None:
        raise DamagedError(f"checkpoint {place} cannot be restored: {found}") from found
    return sealed


def _together(what: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def _all_finite(tree: Tree) -> bool:
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    if not leaves:
        return True
    return bool(jax.jit(lambda xs: jnp.stack([jnp.isfinite(x).all() for x in xs]).all())(leaves))
