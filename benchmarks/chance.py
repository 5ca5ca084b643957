"""What the whole evaluation says of encoders that hear nothing: random labels, five folds.

    python -m benchmarks.chance [--repetitions 200] [--subjects 60] [--repeats 1]

Two stages of random features, each subject's recordings alike, are measured by `linear` as
`evaluate --folds 5 --aggregate scores` does: their AUROC is 0.5 in truth, their difference 0. Each
repetition has subjects, labels and folds of its own, so that all that varies in a whole study does.
Last a label that the features hold, so that chance is not all that can be found.
"""

from __future__ import annotations

import argparse

import numpy as np

from medalign_jax.data.recordings.manifest import Row
from medalign_jax.evaluate.measure import measure
from medalign_jax.evaluate.results import Result
from medalign_jax.evaluate.stages import Settings, Stage
from medalign_jax.evaluate.suite import Options, Suite

EACH, WIDTH, FOLDS = 4, 48, 5


def study(subjects: int, seed: int, planted: float = 0.0, repeats: int = 1) -> dict[str, Result]:
    """The AUROC of two stages and their difference, by stage.

    Args:
      subjects: half of them of either class, four recordings each.
      seed: of everything.
      planted: how far apart, in standard deviations, the classes are in one feature of the second.
      repeats: how often the folds are dealt.
    """
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(subjects) % 2)
    rows = [
        Row(row=i, audio_path=f"{i}.wav", subject_id=f"s{i // EACH}", split="", report=None,
            metadata={}, label="ab"[labels[i // EACH]], targets={})
        for i in range(subjects * EACH)
    ]  # fmt: skip
    options = Options(
        folds=FOLDS, repeats=repeats, seed=seed, aggregate="scores", settings=Settings(per_class=0)
    )  # fmt: skip
    suite = Suite.of(rows, options, "random")
    own = rng.standard_normal((subjects, WIDTH)).repeat(EACH, axis=0)
    first = own + rng.standard_normal(own.shape)
    second = own + rng.standard_normal(own.shape)
    second[:, 0] += planted * labels.repeat(EACH)
    stages = [Stage("first", first), Stage("second", second)]
    found = measure(
        suite.tasks, suite.plans, suite.subjects, stages, options.settings, by_subject=True
    )
    return {r.stage: r for r in found.results if r.metric == "auroc"}


def main() -> None:
    """Prints one line per score."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=200)
    parser.add_argument("--subjects", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=1, help="of the folds")
    flags = parser.parse_args()
    studies = [
        study(flags.subjects, seed, repeats=flags.repeats) for seed in range(flags.repetitions)
    ]
    print(f"random labels, {flags.subjects} subjects, {flags.repetitions} repetitions")
    for stage, truth in (("first", 0.5), ("second", 0.5), ("second minus first", 0.0)):
        results = [results[stage] for results in studies]
        values = np.array([result.value for result in results])
        held = np.mean([result.ci_low <= truth <= result.ci_high for result in results])
        print(
            f"{stage:20} mean {values.mean():+.3f} (standard error "
            f"{values.std(ddof=1) / len(values) ** 0.5:.3f}), spread {values.std(ddof=1):.3f}, "
            f"{truth:g} within the interval in {100 * held:.1f} %"
        )
    one = study(flags.subjects, 0, planted=3.0)
    for stage in ("second", "second minus first"):
        r = one[stage]
        print(f"planted, {stage}: {r.value:+.3f} ({r.ci_low:+.3f} to {r.ci_high:+.3f})")


if __name__ == "__main__":
    main()
