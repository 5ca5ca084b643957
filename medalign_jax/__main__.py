"""``python -m medalign_jax``: the command ``medalign``."""

import sys

from medalign_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
