"""metrics.jsonl and TensorBoard events of a run."""

from __future__ import annotations

import json
import math
from pathlib import Path

from medalign_jax.core.errors import UserError
from medalign_jax.core.files import write_whole


class MetricWriter:
    """Appends one JSON object per logged step to ``metrics.jsonl``, and writes TensorBoard events.

    After a restart the lines past the restored step are removed: a step has one line of training
    metrics and, where it was evaluated, one of held-out metrics.
    """

    def __init__(self, workdir: Path, restored_step: int = 0, writes: bool = True):
        """`writes` is False in all processes of a run but one."""
        self._path = Path(workdir) / "metrics.jsonl"
        self._writes = writes
        if not writes:
            return
        self._keep_until(restored_step)
        from tensorboardX import SummaryWriter  # imported late: PyTorch, where it is, comes along

        self._events = SummaryWriter(
            str(Path(workdir) / "tensorboard"), purge_step=restored_step + 1, flush_secs=10
        )

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
        for name, value in metrics.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes the events."""
        if self._writes:
            self._events.close()


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
