"""The alignments of one run: the one that its config says, or several named changes of it.

`config.arms` maps a name to changes of the config. All start from the same encoder and read the
same caches; two arms whose configs come out equal are trained once. An arm that says nothing in
this run (no loss is left, it is the run's own alignment again, its layers are not there) is left
out with a word: the arms of `configs/acula.py` are combined with encoders of all kinds.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping

from ml_collections import ConfigDict

from medalign_jax.core.errors import UserError

BLOCKS = ("teacher", "reports", "loss", "augment", "train", "optimizer", "encoder")
ROLES = ("encoder", "control", "candidate")
MAIN = "after"  # stage of the config's own alignment


@dataclasses.dataclass(frozen=True)
class Arm:
    """One alignment.

    Attributes:
      name: of its stage.
      config: the whole config with the arm's changes.
      role: "encoder" for what is claimed, "control" for what must not gain, "candidate" for what
        may stand in the place of the run's own alignment, fold by fold (`choosing`).
      identity: equal for arms that would train the same.
      changes: of the config, as JSON.
    """

    name: str
    config: ConfigDict
    role: str
    identity: str
    changes: str = "{}"

    @property
    def folder(self) -> str:
        """Below the workdir; "" for the run's own alignment."""
        if self.name == MAIN:
            return ""
        return "arms/" + re.sub(r"[^A-Za-z0-9.]+", "_", self.name).strip("_")


def arms_of(config: ConfigDict, depth: int) -> tuple[Arm, ...]:
    """The run's own alignment first, then one with each other teacher, then the arms by name.

    Args:
      config: of the run.
      depth: blocks of its encoder.

    Raises:
      UserError: changes of a key that is not there or may not differ between arms, or a run whose
        own alignment cannot be trained.
    """
    main = _arm(MAIN, config, {}, "encoder")
    if reason := _untrainable(main.config, depth):
        raise UserError(f"config.loss: {reason}")
    arms = []
    for source in config.teacher.others:
        arms.append(_arm(f"teacher {source}", config, {"teacher": {"source": source}}, "encoder"))
    for name, changes in config.arms.items():
        changes = dict(changes)
        role = changes.pop("role", "control")
        arms.append(_arm(name, config, changes, role))
    folders = [arm.folder for arm in arms]
    if len(set(folders)) < len(folders):
        raise UserError(f"config.arms: names {list(config.arms)} are too much alike for folders")
    return (main, *(arm for arm in arms if _says_something(arm, main, depth)))


def _says_something(arm: Arm, main: Arm, depth: int) -> bool:
    reason = _untrainable(arm.config, depth)
    if arm.identity == main.identity:
        reason = "it is the run's own alignment"
    if reason:
        print(f"arm {arm.name!r} is left out: {reason}", flush=True)
    return not reason


def _untrainable(config: ConfigDict, depth: int) -> str:
    """Why an alignment with this loss cannot be; "" where it can."""
    loss = config.loss
    if not loss.align_weight and not loss.ssm_weight:
        return "align_weight and ssm_weight are both 0, so that nothing would be trained"
    if lacking := [layer for layer in loss.layers if not -1 <= layer < depth]:
        return (
            f"layers names {lacking}, and the encoder has {depth} blocks, 0 to {depth - 1} (-1 "
            "for its pooled output)"
        )
    return ""


def _arm(name: str, config: ConfigDict, changes: Mapping, role: str) -> Arm:
    block = config.copy_and_resolve_references()
    if role not in ROLES:
        raise UserError(f"config.arms.{name}.role is {role!r}; it is one of {', '.join(ROLES)}")
    for key, values in changes.items():
        if key not in BLOCKS:
            raise UserError(
                f"config.arms.{name} changes {key!r}; arms may differ in {', '.join(BLOCKS)}"
            )
        if key == "encoder" and (other := sorted(set(values) - {"random"})):
            raise UserError(
                f"config.arms.{name}.encoder changes {other}; all arms have the run's encoder, and "
                "may start from random weights (random) only"
            )
        unknown = sorted(set(values) - set(block[key]))
        if unknown:
            raise UserError(f"config.arms.{name}.{key} changes {unknown}, which is not there")
        block[key].update(values)
    settings = {key: json.loads(block[key].to_json_best_effort()) for key in BLOCKS}
    own = json.dumps({key: dict(values) for key, values in changes.items()}, sort_keys=True)
    return Arm(name, block, role, json.dumps(settings, sort_keys=True), own)
