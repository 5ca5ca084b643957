"""``python -m medalign_jax.evaluate``."""

import sys

from medalign_jax.runs.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
