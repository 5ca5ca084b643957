"""``python -m medalign_jax.models``: what can be loaded, from where, with sizes and licences."""

import sys
from collections.abc import Sequence

from medalign_jax.core import commands
from medalign_jax.models import ENCODERS
from medalign_jax.models.catalogue import ENCODER_CHECKPOINTS, TEACHER_CHECKPOINTS, table


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = commands.ArgumentParser(prog="medalign models", description=__doc__.partition(": ")[2])
    parser.parse_args(argv)
    return commands.ended(show)


def show() -> None:
    """Prints the tables."""
    print("Audio encoders: load_encoder(architecture, source)\n")
    print(table(ENCODER_CHECKPOINTS))
    print("\nSelf-supervised term beside the alignment (loss.ssm=auto)\n")
    for name, entry in ENCODERS.loaded():
        print(f"{name:18} {entry.ssm}")
    print("\nLanguage models: load_teacher(source)\n")
    print(table(TEACHER_CHECKPOINTS))
    print(
        "\nA source is a Hub id (org/name, org/name@revision, org/name:file), a folder, or a file "
        "(safetensors single or indexed, GGUF, PyTorch .ckpt/.pt/.pth/.bin). Other sizes of these "
        "families load as well: they are read from config.json."
    )


if __name__ == "__main__":
    sys.exit(main())
