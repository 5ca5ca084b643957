"""Rows of a manifest for tests of the evaluation."""

from medalign_jax.data.recordings.manifest import Row

SPLITS = ("train", "train", "test", "valid", "train", "test")


def row(i: int, **fields) -> Row:
    """Row i of subject i // 2; splits, labels and targets by turns unless given."""
    values = {
        "row": i + 1,
        "audio_path": f"{i}.wav",
        "subject_id": f"s{i // 2}",
        "split": SPLITS[i // 2 % len(SPLITS)],
        "label": "ab"[i // 2 % 2],
        "targets": {},
        "metadata": {},
        "report": None,
    }
    return Row(**values | fields)


def rows(count: int = 120, **targets) -> list[Row]:
    """`count` rows; each target is a function of the row's number."""
    return [
        row(i, targets={name: str(of(i)) for name, of in targets.items() if of(i) != ""})
        for i in range(count)
    ]
