"""The command ``medalign``, which is ``python -m medalign_jax`` too.

    medalign train --config=configs/acula.py:demo
    medalign evaluate --help

``source <(medalign --completion)`` lets bash complete the commands. Every command is ``python -m
medalign_jax.COMMAND`` as well (``train`` is ``medalign_jax.main``).
"""

from __future__ import annotations

import importlib
import signal
import sys
from collections.abc import Sequence

import medalign_jax
from medalign_jax.core.words import did_you_mean

# command -> (module, what it does). The module has `main(argv)`, or, where flags and a config are
# read by absl, `command()`, which takes them from `sys.argv`.
COMMANDS = {
    "train": ("main", "align, distil, pre-train, put recordings into words"),
    "evaluate": ("runs.evaluate", "measure encoders on labelled recordings, without training"),
    "report": ("report", "results of several runs on one page"),
    "embed": ("embed", "a table of embeddings of audio files"),
    "query": ("query", "what recordings sound like: nearest reports, your own words, recordings"),
    "ask": ("ask", "put a question about recordings to an audio language model"),
    "app": ("app.__main__", "listen in a browser: drop a sound, see what a model makes of it"),
    "push": ("push", "an export, with its model card, to the Hugging Face Hub"),
    "models": ("models.__main__", "what can be loaded, from where, with sizes and licences"),
    "plan": ("plan", "does the full-size step fit a machine that is not here?"),
    "convert": ("convert", "a published data set (BMD-HS, CirCor, ICBHI) as a manifest"),
    "prepare": ("prepare", "check and decode a manifest's recordings once, for fast reading"),
    "simulate": ("simulate", "write simulated heart and lung sounds with known truth"),
    "join_descriptions": ("join_descriptions", "questions with their recordings put into words"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command, or prints which there are; returns the exit status."""
    name, *rest = [*(sys.argv[1:] if argv is None else argv), ""]
    if name in ("", "-h", "--help", "help"):
        print(overview())
        return 0
    if name in ("--version", "--completion"):
        print(f"medalign_jax {medalign_jax.__version__}" if name == "--version" else completion())
        return 0
    if name not in COMMANDS:
        near = did_you_mean(name, COMMANDS)
        print(f"error: there is no command {name!r}{near}; see medalign --help", file=sys.stderr)
        return 2
    # An import that is interrupted has a long stack trace, or fails for a reason that it makes up.
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        module = importlib.import_module(f"medalign_jax.{COMMANDS[name][0]}")
    finally:
        signal.signal(signal.SIGINT, before)
    if hasattr(module, "command"):
        sys.argv = [f"medalign {name}", *rest[:-1]]
        return module.command()
    return module.main(rest[:-1])


def completion() -> str:
    """For bash (zsh after `bashcompinit`): `source <(medalign --completion)`; files as ever."""
    names = " ".join(COMMANDS)
    return (
        "_medalign() {\n"
        '  [ "$COMP_CWORD" = 1 ] && '
        f'COMPREPLY=($(compgen -W "{names} --help --version" -- "${{COMP_WORDS[1]}}"))\n'
        "}\n"
        "complete -o default -F _medalign medalign"
    )


def overview() -> str:
    """The commands, one line each."""
    lines = [f"  medalign {name:18} {words}" for name, (_, words) in COMMANDS.items()]
    python = "In Python: medalign_jax.load_encoder, load_teacher, load_language_model, losses"
    return "\n".join(["Commands, each with --help:\n", *lines, "", python])
