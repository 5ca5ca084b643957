"""What the words on a page mean, for those who do not measure models for a living."""

from __future__ import annotations

from collections.abc import Iterable

from medalign_jax.evaluate.results import Result
from medalign_jax.evaluate.stages import CONSTANT, METADATA, MINUS, NEAREST, PLAIN, RANDOM

_INTERVAL = (
    "95 % interval",
    "Were the study repeated with other people, the interval would hold the true value about 19 "
    "times in 20. Where the interval of a difference holds 0, nothing is shown.",
)
# How the name begins -> the name as it is printed, and its meaning.
_KINDS = {
    "linear": ("linear probe", "A simple rule (weighted sums) fitted on the fixed embeddings; it "
               "shows what the encoder already tells apart."),
    "mlp": ("mlp probe", "As the linear probe, with one small hidden layer."),
    "knn": ("knn probe", "A recording gets the answer of the recordings most like it."),
    "opera": ("opera probe", "The linear probe as OPERA published it; it may stop before it has "
              "converged, so use it to compare with their table."),
    "nearest_sentence": ("nearest sentence", "A recording gets the class whose sentence its "
                         "embedding is nearest to."),
    "retrieval": ("retrieval", "For each recording its own report is looked for among all."),
}  # fmt: skip
_METRICS = {
    "auroc": ("AUROC", "The chance that a recording with the finding scores above one without. "
              "0.5 is a coin, 1 is perfect."),
    "mae": ("MAE", "By how much predictions are wrong on average, in the unit of the task."),
    "accuracy": ("accuracy", "Share of right answers. Compare it with that of always naming the "
                 "commonest class."),
    "unweighted_accuracy": ("unweighted accuracy", "Accuracy in each class, averaged over the "
                            "classes, so that rare ones count as much."),
    "recall@": ("recall@k", "Share of recordings whose own report is among the k nearest."),
}  # fmt: skip
_STAGES = {
    PLAIN: "About 150 plain numbers of the sound's spectrum and rhythm, no neural network. A model "
    "that does not beat them has learnt nothing that matters here.",
    METADATA: "What the table says of a recording besides its sound: device, site, age, ...",
    CONSTANT: "Always the commonest class, or the mean.",
    NEAREST: "The answer of the training recording whose waveform is most alike.",
}


def words_of(results: Iterable[Result]) -> list[tuple[str, str]]:
    """Terms that these results use, with what they mean."""
    results = list(results)
    if not results:
        return []
    found = [
        meaning
        for used, meanings in (
            ({result.metric for result in results}, _METRICS),
            ({result.kind for result in results}, _KINDS),
        )
        for start, meaning in meanings.items()
        if any(name.startswith(start) for name in used)
    ]
    stages = {name for result in results for name in result.stage.split(MINUS)}
    if any(result.ci_low is not None for result in results):
        found.append(_INTERVAL)
    found += [(name, meaning) for name, meaning in _STAGES.items() if name in stages]
    if any(name.endswith(RANDOM) for name in stages):
        found.append(("random weights", "The same network before it has learnt anything."))
    if any(MINUS in result.stage for result in results):
        found.append(
            ("A minus B", "The difference on the same recordings, with an interval of its own.")
        )
    return found
