"""A run's folder: its config, its recordings, where everything came from; no two runs are mixed.

``config.json`` has the config in force, what was changed in it between two starts (``changes``),
the provenance, and what else decides what was trained (``bound``); ``recordings.jsonl`` has the
recordings as they were when training began. All of it binds the run from its first checkpoint on:
before that there is nothing that could be mixed.
"""

from __future__ import annotations

import functools
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections

from medalign_jax.core import processes
from medalign_jax.core.errors import UserError
from medalign_jax.core.files import check_name, check_no_folders, encoded, write_whole
from medalign_jax.core.local_paths import local
from medalign_jax.core.provenance import RECORDINGS, provenance
from medalign_jax.runs import identity
from medalign_jax.runs.identity import Difference, Recording

# What runs of any method write there.
_FILES = ("config.json", RECORDINGS, "metrics.jsonl", "evaluation.json", "evaluation.csv",
          "ablations.md", "report.html")  # fmt: skip
EARLIER = "earlier_runs"  # in the workdir: what --restart moved away
_DESCRIPTIONS = re.compile(r"textualised(\.partial)?\.jsonl")  # what a textualisation leaves
_LISTS = re.compile(r"(unusable|unaskable)_\w+\.jsonl|overlap\.jsonl")
# Known by what they were made from, whatever run asks for them; and what is not part of a run.
_KEPT = ("teacher_cache", "embeddings", "simulated", "simulated_mix", "world", EARLIER, ".lock")


def alone(run: Callable) -> Callable:
    """Decorates ``run(config, workdir, ...)``: no other run works in the workdir meanwhile.

    Of several processes the first holds the lock for all, and they end together.
    """

    @functools.wraps(run)
    def locked(config: ml_collections.ConfigDict, workdir: Path, *args: Any, **kwargs: Any) -> Any:
        check_name(Path(workdir).absolute())
        if Path(workdir).exists() and not Path(workdir).is_dir():
            raise UserError(
                f"{workdir} is a file, and a run needs a folder: choose another --workdir"
            )
        check_no_folders(workdir, _FILES)
        with processes.at_work_in(Path(workdir)):
            return run(config, workdir, *args, **kwargs)

    return locked


def open_workdir(
    folder: Path,
    config: ml_collections.ConfigDict,
    defaults: ml_collections.ConfigDict | None = None,
    restart: bool = False,
) -> Path:
    """Makes the folder, or checks that the config goes with what was trained there.

    What changes no result (`identity.RULES`) is taken, and so is any change before the first
    checkpoint. `record_config` writes it down once the run's data has passed too.

    Args:
      folder: of the run.
      config: of the run.
      defaults: the config before anything was changed on the command line, if known.
      restart: the run is not to go on with what is there: nothing is compared and nothing touched
        until `begin_anew`, so that a config or data that are refused leave it as it is.

    Raises:
      UserError: something of another config was trained there; names the keys that differ.
    """
    folder = local(folder)
    if restart:
        return folder
    path = folder / "config.json"
    given = _json(config)
    if not trained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _write(path, {"config": given, "provenance": provenance()})
        _remove(folder / RECORDINGS)
        return folder
    if not path.exists():
        raise UserError(
            f"{folder} holds something that was trained, but no config.json that says how: put it "
            "back, choose another --workdir, or begin anew in this one with --restart"
        )
    found = _differences(_read(path), config, defaults)
    refused = [text for difference in found if (text := _refusal(folder, difference, given))]
    if refused:
        raise UserError(
            f"{folder} holds a run with another config:\n"
            + "\n".join(f"  {text}" for text in refused)
            + "\nGo on with the same values, choose another --workdir, or begin anew in this one "
            "with --restart"
        )
    if found:
        print(f"{folder} goes on with changes: {'; '.join(map(str, found))}", flush=True)
    return folder


def record_config(
    folder: Path,
    config: ml_collections.ConfigDict,
    defaults: ml_collections.ConfigDict | None = None,
) -> None:
    """Puts a config that `open_workdir` took into config.json, with what it changes and when."""
    path = Path(folder) / "config.json"
    if not path.exists():  # another process writes it
        return
    content = _read(path)
    if changed := {d.key: [d.before, d.now] for d in _differences(content, config, defaults)}:
        entry = {"time": time.strftime("%Y-%m-%d %H:%M:%S"), "changed": changed}
        content["changes"] = [*content.get("changes", ()), entry]
    if content["config"] != _json(config):
        _write(path, content | {"config": _json(config)})


def _differences(content: dict[str, Any], config: Any, defaults: Any) -> list[Difference]:
    usual = None if defaults is None else _json(defaults)
    return identity.differences(content["config"], _json(config), usual)


def _refusal(folder: Path, difference: Difference, config: dict[str, Any]) -> str:
    """Why a difference cannot be taken; "" if it can."""
    kind = difference.kind
    if kind == identity.FREE:
        return ""
    if kind == identity.LONGER:
        return _not_longer(difference, config)
    if kind == identity.ARM:
        # An arm that is new or left out has nothing to do with the others.
        name = re.sub(r"[^A-Za-z0-9.-]+", "*", difference.arm)
        stages = [*folder.glob(f"**/arms/{name}"), *folder.glob(f"**/arms/{name}_*")]
        both = all(difference.arm in arms for arms in (_arms(folder), config.get("arms", {})))
        if difference.key.endswith(".role") or not both:
            return ""
        return _of_stage(difference, stages)
    if kind == identity.SUPERVISED:
        return _of_stage(difference, folder.glob("**/supervised"))
    return str(difference)


def _not_longer(difference: Difference, config: dict[str, Any]) -> str:
    if not difference.grows:
        return f"{difference} (it may only grow)"
    pretrain = config.get("pretrain", {})
    own = pretrain.get("changes", {}).get("train", {})
    if pretrain.get("enabled") and not {"steps", "epochs"} & own.keys():
        return f"{difference} (pre-training, from which all went on, would be longer too)"
    return ""


def _arms(folder: Path) -> dict[str, Any]:
    return _read(folder / "config.json")["config"].get("arms", {})


def _of_stage(difference: Difference, folders: Iterable[Path]) -> str:
    """A stage that was not begun may change; else its folder has to go first."""
    begun = _begun(folders)
    return f"{difference} (remove {', '.join(begun)} to train it anew)" if begun else ""


def _begun(folders: Iterable[Path]) -> list[str]:
    """Those among some folders in which something was trained."""
    return sorted(
        str(folder) for folder in folders if EARLIER not in folder.parts and trained(folder)
    )


def trained(folder: Path) -> bool:
    """Whether anything below the folder was trained: a checkpoint, or a textualised record."""
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in _KEPT and name != "export"]
        if any(_DESCRIPTIONS.fullmatch(name) for name in files):
            return True
        if Path(place).name == "checkpoints":
            if any(name.isdigit() for name in folders):
                return True
            folders.clear()
    return False


def bind_recordings(folder: Path, recordings: Sequence[Recording]) -> None:
    """Sees that a run goes on with the recordings that it began with; remembers them at first.

    Args:
      folder: the workdir.
      recordings: in the order of the data set.

    Raises:
      UserError: what is other than it was, how many and which first.
    """
    path = Path(folder) / RECORDINGS
    if path.exists():
        changed = identity.compare_recordings(_read_lines(path), recordings)
        if changed and trained(folder):
            raise UserError(
                f"{folder} was begun with other recordings: {'; '.join(changed)}. Give the same "
                "ones, choose another --workdir, or begin anew in this one with --restart"
            )
    lines = encoded("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in recordings))
    if jax.process_index() == 0 and not (path.exists() and path.read_bytes() == lines):
        write_whole(path, lines)


def bind(folder: Path, stage: str = "", shown: bool = False, **facts: str | None) -> None:
    """Notes facts that decide what is trained, and refuses others where something was trained.

    Args:
      folder: the workdir.
      stage: folder below it (or below a fold's) that the facts decide; "" for the whole run.
      shown: whether they belong to the provenance, beside the results, too.
      **facts: hashes by name; None where there is nothing.

    Raises:
      UserError: a fact differs from when the run began.
    """
    folder = Path(folder)
    path = folder / "config.json"
    content = _read(path) if path.exists() else {"config": {}, "provenance": provenance()}
    noted = content["provenance"] | content.get("bound", {})
    other = [
        f"{name.replace('_', ' ')} {noted[name][:16]} there, {value[:16]} now"
        for name, value in facts.items()
        if value and noted.get(name) and noted[name] != value
    ]
    begun = _begun(folder.glob(f"**/{stage}") if stage else [folder])
    if other and begun:
        anew = f", or remove {', '.join(begun)} to train it anew" if stage else ""
        raise UserError(
            f"{begun[0]} was begun with others: {'; '.join(other)}. Give the same ones, choose "
            f"another --workdir, or begin anew in this one with --restart{anew}"
        )
    content["bound"] = content.get("bound", {}) | facts
    if shown:
        content["provenance"] |= facts
    if path.exists():  # else another process writes it
        _write(path, content)


def begin_anew(folder: Path, config: ml_collections.ConfigDict) -> None:
    """What --restart asks for: the earlier run makes room for one whose data have been checked.

    All processes have to call this, and the caller holds the folder (`alone`).
    """

    def move() -> None:
        if (place := set_aside(folder)) is not None:
            print(f"the run in {folder} was moved to {place}", flush=True)

    processes.by_first(move)
    open_workdir(folder, config)


def set_aside(folder: Path) -> Path | None:
    """Moves what a run has made into ``earlier_runs/N`` of its workdir.

    Caches and simulated recordings stay: they are known by what they were made from. So do lists
    of rows that cannot be used, which every start writes anew.

    Returns:
      Where it is now; None where there was nothing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return None
    moving = [
        entry
        for entry in sorted(folder.iterdir())
        if entry.name not in _KEPT and not _LISTS.fullmatch(entry.name)
    ]
    if not moving:
        return None
    numbers = [int(p.name) for p in folder.glob(f"{EARLIER}/*") if p.name.isdigit()]
    place = folder / EARLIER / str(max(numbers, default=0) + 1)
    place.mkdir(parents=True)
    for entry in moving:
        entry.rename(place / entry.name)
    return place


def note_provenance(folder: Path, **facts: Any) -> dict[str, Any]:
    """Adds facts (weight hashes, counts) to config.json's provenance; gives all of it."""
    path = Path(folder) / "config.json"
    if not path.exists():  # another process writes it
        return provenance() | facts
    content = _read(path)
    content["provenance"] |= facts
    _write(path, content)
    return content["provenance"]


def _json(config: ml_collections.ConfigDict) -> dict[str, Any]:
    return json.loads(config.to_json_best_effort())


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content["config"], dict) or not isinstance(content["provenance"], dict):
            raise ValueError("no config or no provenance in it")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is damaged ({error}); choose another --workdir, or begin anew in this one "
            "with --restart"
        ) from error
    return content


def _read_lines(path: Path) -> list[Recording]:
    try:
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if not all({"name", "sound"} <= record.keys() for record in found):
            raise ValueError("a line without name or sound")
    except (ValueError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged ({error}); remove it where the recordings are known to be the same"
        ) from error
    return found


def _write(path: Path, content: dict[str, Any]) -> None:
    if jax.process_index() == 0:  # one writer
        write_whole(path, (json.dumps(content, indent=2, default=str) + "\n").encode())


def _remove(path: Path) -> None:
    if jax.process_index() == 0:
        path.unlink(missing_ok=True)
