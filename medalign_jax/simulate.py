"""``medalign simulate``: simulated heart and lung sounds; see `datasets.simulated.simulate`."""

import sys

from medalign_jax.datasets.simulated.simulate import main

if __name__ == "__main__":
    sys.exit(main())
