"""``medalign prepare``: recordings decoded once; see `data.recordings.prepare`."""

import sys

from medalign_jax.data.recordings.prepare import main

if __name__ == "__main__":
    sys.exit(main())
