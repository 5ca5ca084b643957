"""``medalign train --config=configs/acula.py[:variant] --workdir=DIR``: does what a config says."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from medalign_jax.core import config_command, rendezvous
from medalign_jax.core.errors import UserError
from medalign_jax.core.host_memory import keep_host_memory
from medalign_jax.core.registry import Registry
from medalign_jax.runs.numbers import check_numbers
from medalign_jax.train.metrics import import_wandb

# `run(config, workdir, defaults, restart)`, or where it is: each is imported when it is named.
METHODS: Registry[Any] = Registry(
    "medalign_jax.methods",
    {
        "acula": "medalign_jax.runs.acula:run",
        "distill": "medalign_jax.runs.distill.run:run",
        "pretrain": "medalign_jax.runs.pretrain:run",
        "textualize": "medalign_jax.runs.textualize:run",
    },
    (Callable, str),
)

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file, e.g. configs/acula.py:demo", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run; by default workdirs/<config>_<variant>"
)
_RESTART = flags.DEFINE_bool(
    "restart",
    False,
    "Begin anew: when config and data have been checked, what the workdir holds of a run is moved "
    "to WORKDIR/earlier_runs; caches stay",
)
_HELP = {name: meaning[0].upper() + meaning[1:] for name, meaning in rendezvous.HELP.items()}
_JOINING = (
    flags.DEFINE_bool("distributed", False, _HELP["distributed"]),
    flags.DEFINE_string("coordinator", None, _HELP["coordinator"]),
    flags.DEFINE_integer("num_processes", None, _HELP["num_processes"]),
    flags.DEFINE_integer("process_id", None, _HELP["process_id"]),
    flags.DEFINE_integer("init_timeout", rendezvous.INIT_TIMEOUT, _HELP["init_timeout"]),
)


def main() -> None:
    """Runs the config's method in the workdir.

    Raises:
      UserError: whatever is wrong with the config, the data or the workdir.
    """
    logging.set_verbosity(logging.WARNING)
    config = _config()
    if config.method not in METHODS:
        raise UserError(f"config.method {config.method!r} is not one of {', '.join(METHODS)}")
    check_numbers(config)
    if config.get("train", {}).get("wandb"):
        import_wandb()  # before there is anything to track
    if _cpu_only():
        keep_host_memory()
    import jax

    cache = os.environ.get(
        "JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache/medalign_jax/xla")
    )
    jax.config.update("jax_compilation_cache_dir", cache)
    rendezvous.join(*(flag.value for flag in _JOINING))
    method = METHODS[config.method]
    run = pkgutil.resolve_name(method) if isinstance(method, str) else method
    run(config, _workdir(), _defaults(), restart=_RESTART.value)


def _config() -> ConfigDict:
    config = _CONFIG.value
    try:
        config.method  # noqa: B018 - a file that cannot be read raises on first use
    except (OSError, AttributeError) as error:
        path = flags.FLAGS["config"].config_filename
        reason = " ".join(str(error).split())
        raise UserError(f"--config={path} holds no config with a `method`: {reason}") from error
    return config


def _defaults() -> ConfigDict:
    """The config as its file makes it, without what the command line changes."""
    path, _, variant = flags.FLAGS["config"].config_filename.partition(":")
    spec = importlib.util.spec_from_file_location("config_without_changes", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(variant) if variant else module.get_config()


def _cpu_only() -> bool:
    """Whether no accelerator is installed; asked before JAX starts, which is too late to ask it."""
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return not plugins and importlib.util.find_spec("libtpu") is None


def _workdir() -> Path:
    if _WORKDIR.value:
        return Path(_WORKDIR.value)
    path, _, variant = flags.FLAGS["config"].config_filename.partition(":")
    return Path("workdirs") / "_".join(filter(None, (Path(path).stem, variant)))


def command() -> int:
    """Reads the flags of `sys.argv`; returns the exit status."""
    return config_command.run(main, __doc__)


if __name__ == "__main__":
    sys.exit(command())
