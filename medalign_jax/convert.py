"""``medalign convert``: a published data set as a manifest; see `datasets.convert`."""

import sys

from medalign_jax.datasets.convert import main

if __name__ == "__main__":
    sys.exit(main())
