"""``python -m medalign_jax``: what there is."""

import sys

from medalign_jax.core.words import did_you_mean

COMMANDS = {
    "main": "train: align, distil, pre-train, put recordings into words",
    "evaluate": "measure encoders on labelled recordings, without training",
    "embed": "a table of embeddings of audio files",
    "models": "what can be loaded, from where, with sizes and licences",
    "plan": "does the full-size step fit a machine that is not here?",
    "datasets.convert": "a published data set (BMD-HS, CirCor, ICBHI) as a manifest",
    "data.recordings.prepare": "check and decode a manifest's recordings once, for fast reading",
    "datasets.simulated.simulate": "write simulated heart and lung sounds with known truth",
    "data.questions.textualised": "join questions with recordings put into words",
}


def main() -> int:
    """Prints the commands; returns the exit status."""
    unknown = [text for text in sys.argv[1:] if text not in ("-h", "--help")]
    if unknown:
        near = did_you_mean(unknown[0], COMMANDS)
        print(
            f"error: there is no {unknown[0]!r}{near}; see python -m medalign_jax", file=sys.stderr
        )
        return 1
    print("Commands, each with --help:\n")
    for name, text in COMMANDS.items():
        print(f"  python -m medalign_jax.{name:28} {text}")
    print("\nIn Python: medalign_jax.load_encoder, load_teacher, losses")
    return 0


if __name__ == "__main__":
    sys.exit(main())
