"""Medical audio models that understand and reason: alignment and distillation in JAX."""

import signal
import sys
from typing import Any

__version__ = "0.1.0"
__all__ = ["load_encoder", "load_language_model", "load_teacher", "losses"]


def __getattr__(name: str) -> Any:
    """The public names are imported when first used, so that `import medalign_jax` is light."""
    if name == "losses":
        import importlib

        return importlib.import_module("medalign_jax.losses")
    if name == "load_encoder":
        from medalign_jax.encoder import load_encoder

        return load_encoder
    if name == "load_teacher":
        from medalign_jax.teachers import load_teacher

        return load_teacher
    if name == "load_language_model":
        from medalign_jax.language_model import load_language_model

        return load_language_model
    raise AttributeError(f"module 'medalign_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    """What `dir` and completion show: the public names, imported or not yet."""
    return sorted({*globals(), *__all__})


def _is_run() -> bool:
    """Whether this process is ``python -m medalign_jax...``."""
    given = sys.orig_argv
    module = given[given.index("-m") + 1 :][:1] if "-m" in given else []
    return bool(module) and module[0].partition(".")[0] == "medalign_jax"


# Until the command has its own handler (core/commands.py), Ctrl-C ends the process without a word:
# an import that is interrupted has a long stack trace, or ends in a segmentation fault.
if _is_run() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
