"""metrics.jsonl and TensorBoard events of a run."""

from __future__ import annotations

import hashlib
import importlib
import json
import math
from pathlib import Path
from types import ModuleType

from medalign_jax.core.errors import UserError
from medalign_jax.core.files import write_whole


class MetricWriter:
    """Appends one JSON object per logged step to ``metrics.jsonl``, and sends them to trackers.

    After a restart the lines past the restored step are removed: a step has one line of training
    metrics and, where it was evaluated, one of held-out metrics.
    """

    def __init__(
        self,
        workdir: Path,
        restored_step: int = 0,
        writes: bool = True,
        tensorboard: bool = True,
        wandb: str = "",
    ):
        """Opens the files.

        Args:
          workdir: where they lie.
          restored_step: that training goes on from.
          writes: False in all processes of a run but one.
          tensorboard: whether events go to WORKDIR/tensorboard.
          wandb: project at Weights & Biases, or "".
        """
        self._path = Path(workdir) / "metrics.jsonl"
        self._writes = writes
        self._trackers: list[_TensorBoard | _WeightsAndBiases] = []
        if not writes:
            return
        self._keep_until(restored_step)
        if tensorboard:
            self._trackers.append(_TensorBoard(Path(workdir), restored_step))
        if wandb:
            self._trackers.append(_WeightsAndBiases(Path(workdir), wandb))

    def _keep_until(self, step: int) -> None:
        kept = [line for line in read_metrics(self._path) if line["step"] <= step]
        write_whole(self._path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """One line; values that are not finite are written as strings, as JSON has none."""
        if not self._writes:
            return
        line = {name: v if math.isfinite(v) else str(v) for name, v in sorted(metrics.items())}
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step} | line) + "\n")
        for tracker in self._trackers:
            tracker.write(step, metrics)

    def close(self) -> None:
        """Flushes what trackers hold."""
        for tracker in self._trackers:
            tracker.close()


class _TensorBoard:
    def __init__(self, workdir: Path, restored_step: int):
        from tensorboardX import SummaryWriter  # imported late: PyTorch, where it is, comes along

        self._events = SummaryWriter(
            str(workdir / "tensorboard"), purge_step=restored_step + 1, flush_secs=10
        )

    def write(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        self._events.close()


class _WeightsAndBiases:
    """One run there per workdir: its id follows from the path, so that it goes on after a stop."""

    def __init__(self, workdir: Path, project: str):
        wandb = import_wandb()
        place = workdir.resolve()
        self._run = wandb.init(
            project=project,
            name=place.name,
            id=hashlib.sha256(str(place).encode()).hexdigest()[:16],
            resume="allow",
            dir=str(workdir),
        )

    def write(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log(metrics, step=step)

    def close(self) -> None:
        self._run.finish()


def import_wandb() -> ModuleType:
    """The package of Weights & Biases.

    Raises:
      UserError: it is not installed.
    """
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise UserError(
            f"train.wandb needs a package ({error}): pip install wandb, and log in with "
            "wandb login, or set WANDB_MODE=offline"
        ) from error


def read_metrics(path: Path) -> list[dict]:
    """Lines of a metrics file; a last line cut by a kill is left out.

    Raises:
      UserError: another line is damaged; names it.
    """
    lines: list[dict] = []
    texts = path.read_bytes().splitlines() if path.exists() else []
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):  # bytes that are not text among them
            line = None
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
        elif number < len(texts):
            found = text[:80].decode(errors="backslashreplace")
            raise UserError(
                f"{path}, line {number} is damaged: {found!r}. Remove that line, or start in "
                "another workdir"
            )
    return lines
