"""``python -m medalign_jax.main --config=configs/acula.py[:variant] --workdir=DIR``."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from medalign_jax.host_memory import keep_host_memory

METHODS = {
    "acula": "medalign_jax.experiments.acula",
    "distill": "medalign_jax.experiments.distill",
    "pretrain": "medalign_jax.experiments.pretrain",
    "textualize": "medalign_jax.experiments.textualize",
}

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file, e.g. configs/acula.py:demo", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run; by default workdirs/<config>_<variant>"
)
_RESTART = flags.DEFINE_bool(
    "restart",
    False,
    "Begin anew: what the workdir holds of a run is moved to WORKDIR/earlier_runs; caches stay",
)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "One of several processes: start jax.distributed (pods, Slurm)"
)


def main(argv: list[str]) -> None:
    """Runs the config's method in the workdir."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
    logging.set_verbosity(logging.WARNING)
    if _cpu_only():
        keep_host_memory()
    import jax

    from medalign_jax.errors import UserError

    cache = os.environ.get(
        "JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache/medalign_jax/xla")
    )
    jax.config.update("jax_compilation_cache_dir", cache)
    if _DISTRIBUTED.value:
        jax.distributed.initialize()
        if jax.process_index():
            # One process speaks; errors go to stderr.
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        config = _config()
        if config.method not in METHODS:
            raise UserError(f"config.method {config.method!r} is not one of {', '.join(METHODS)}")
        method = importlib.import_module(METHODS[config.method])
        if _RESTART.value:
            _set_aside(_workdir())
        method.run(config, _workdir(), _defaults())
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as stop:
        print(f"stopped: {stop or 'start again to go on from the last checkpoint'}")
        sys.exit(130)


def _config() -> ConfigDict:
    from medalign_jax.errors import UserError

    config = _CONFIG.value
    try:
        config.method  # noqa: B018 - a file that cannot be read is told on first use
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


def _set_aside(workdir: Path) -> None:
    """--restart: what there is of a run makes room for a new one."""
    import jax

    from medalign_jax.experiments.workdir import set_aside

    if jax.process_index() == 0 and (place := set_aside(workdir)) is not None:
        print(f"the run in {workdir} was moved to {place}", flush=True)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("the run before was moved")


def _cpu_only() -> bool:
    """Whether no accelerator is installed; asked before JAX starts, which is too late to ask it."""
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return not plugins and importlib.util.find_spec("libtpu") is None


def _workdir() -> Path:
    if _WORKDIR.value:
        return Path(_WORKDIR.value)
    path, _, variant = flags.FLAGS["config"].config_filename.partition(":")
    return Path("workdirs") / "_".join(filter(None, (Path(path).stem, variant)))


def _parse(argv: list[str]) -> list[str]:
    """Reads the flags; what is wrong with them is one line, not a stack trace."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        # A failing config file has its whole traceback in the message; the last line says it.
        sys.exit(f"error: {str(error).strip().splitlines()[-1].strip()}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        given = ", ".join(text for text in argv[1:] if text.startswith("--config"))
        reason = " ".join(str(error).replace("\\n", " ").split())
        sys.exit(f"error: the config does not load or has no such key ({reason}); given: {given}")


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=_parse)
