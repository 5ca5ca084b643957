"""``medalign join_descriptions``: questions with their recordings in words."""

import sys

from medalign_jax.data.questions.descriptions import main

if __name__ == "__main__":
    sys.exit(main())
