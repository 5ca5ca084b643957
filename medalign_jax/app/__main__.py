"""``medalign app --checkpoint=WORKDIR``: what a model makes of a sound, in a browser.

Drop or record a sound: waveform, spectrogram and player in step; the nearest training reports,
your own words, with --recordings those that are most like it, and with --label calibrated
probabilities and when to look yourself. Several checkpoints stand side by side. --model is an audio
language model to ask. Nothing leaves this machine; uploads are deleted after two minutes.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

from medalign_jax.core import commands
from medalign_jax.core.errors import UserError
from medalign_jax.core.words import did_you_mean
from medalign_jax.search.files import Item, expand, read_items

_INSTALL = 'the app needs gradio: pip install "medalign-jax[app]"'


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    arguments = _parser().parse_args(argv)
    return commands.ended(lambda: _run(arguments), given=arguments)


def _run(arguments: argparse.Namespace) -> None:
    if not arguments.checkpoint and not arguments.model:
        raise UserError("name a --checkpoint to listen with, or a --model to ask")
    if arguments.label and not arguments.recordings:
        raise UserError("--label is a column of the table of --recordings; name that too")
    with tempfile.TemporaryDirectory(prefix="medalign_app_") as folder:
        # Read when gradio is imported; whatever is uploaded goes with the folder.
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}
        page, launch = _page(arguments)
        try:
            url = launch(page, arguments.host, arguments.port)
        except OSError as error:
            raise UserError(f"--port {arguments.port} cannot be used ({error})") from error
        print(f"open {url} in a browser; Ctrl-C ends it", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt as stop:
            raise type(stop)("the app has ended; what was uploaded is deleted") from None
        finally:
            page.close(verbose=False)


def _page(arguments: argparse.Namespace):
    """The page, and what serves it."""
    try:
        import gradio  # noqa: F401  # first: without it nothing else need be loaded
    except ImportError as error:
        raise UserError(f"{_INSTALL} ({error})") from error
    from medalign_jax.app.interface import blocks, launch
    from medalign_jax.app.listener import compared_with, open_listener
    from medalign_jax.language_model import load_language_model

    recordings = _recordings(arguments.recordings, arguments.label)
    names = [Path(checkpoint).resolve().name for checkpoint in arguments.checkpoint]
    # All are loaded before anything is embedded: what cannot be loaded is said at once.
    listeners = [
        open_listener(name if names.count(name) == 1 else given, given, arguments.encoder)
        for name, given in zip(names, arguments.checkpoint, strict=True)
    ]
    model = None
    if arguments.model:
        model = load_language_model(arguments.model, dtype="float32", identity=False)
        if not model.takes_audio:
            raise UserError(f"{arguments.model} is a text-only model; --model has to take audio")
    compared = [compared_with(each, recordings, arguments.label) for each in listeners]
    return blocks(compared, model), launch


def _recordings(given: str, label: str) -> list[Item]:
    if not given:
        return []
    if Path(given).is_dir():
        if label:
            raise UserError("--label needs a table: give the manifest as --recordings")
        return [Item(path) for path in expand([given])]
    items = read_items(given)
    columns = sorted({column for item in items for column in item.beside})
    if label and label not in columns:
        raise UserError(
            f"{given} has no column {label!r}{did_you_mean(label, columns)}; there are "
            f"{', '.join(columns)}"
        )
    return items


def _parser() -> argparse.ArgumentParser:
    parser = commands.ArgumentParser(
        prog="medalign app", description="What a model makes of a sound, in a browser."
    )
    parser.add_argument(
        "--checkpoint", nargs="+", default=[], metavar="CHECKPOINT",
        help="workdirs or exports of AcuLa runs, or weights; several stand side by side",
    )  # fmt: skip
    parser.add_argument("--encoder", help="its name, for weights that do not say it")
    parser.add_argument(
        "--recordings", default="", help="folder, or manifest, to find similar recordings in"
    )
    parser.add_argument("--label", default="", help="column of that manifest to judge by")
    parser.add_argument("--model", help="export of a distillation, or published model, to ask")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve at (this machine)")
    parser.add_argument("--port", type=int, help="(the first free one from 7860)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
