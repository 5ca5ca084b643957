"""``medalign ask --model=FOLDER FILES... --question=TEXT``: asks an audio language model.

Prints what the model writes; a student that was distilled writes four stages of reasoning, and its
answer after them. Answers are those of a model, to be checked by somebody who knows; no diagnosis.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from medalign_jax.core import commands
from medalign_jax.core.errors import UserError
from medalign_jax.language_model import load_language_model
from medalign_jax.text.reasoning import final_answer


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    arguments = _parser().parse_args(argv)
    return commands.ended(lambda: _run(arguments), given=arguments)


def _run(arguments: argparse.Namespace) -> None:
    if arguments.max_new_tokens < 1:
        raise UserError(f"--max_new_tokens is {arguments.max_new_tokens}; give 1 or more")
    if bool(arguments.files) == bool(arguments.description):
        raise UserError("name recordings, or --description for a text-only model, not both")
    model = load_language_model(arguments.model, dtype=arguments.dtype, identity=False)
    said = model.answer(
        arguments.question,
        arguments.files,
        choices=arguments.options,
        description=arguments.description,
        max_new_tokens=arguments.max_new_tokens,
    )
    if arguments.json:
        print(json.dumps({"response": said, "answer": final_answer(said)}, ensure_ascii=False))
    else:
        print(said.strip())


def _parser() -> argparse.ArgumentParser:
    parser = commands.ArgumentParser(
        prog="medalign ask", description="Asks an audio language model about recordings."
    )
    parser.add_argument("files", nargs="*", help="recordings that the question is about, in order")
    parser.add_argument("--model", required=True, help="export folder of a run, or published model")
    parser.add_argument("--question", required=True, help="without the options")
    parser.add_argument("--options", nargs="+", default=[], help="to choose from")
    parser.add_argument(
        "--description", default="", help="the recording in words, for text-only models"
    )
    parser.add_argument(
        "--max_new_tokens", type=int, default=512, help="most tokens of the answer (512)"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the computation"
    )
    parser.add_argument("--json", action="store_true", help="response and answer as a JSON object")
    return parser


if __name__ == "__main__":
    sys.exit(main())
