"""Lines that several mapping tables share: the tensors of a layer as PyTorch names them."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from medalign_jax.weights.table import LINEAR, Ignore, Rule, Squeeze, chain

# (out, in, 1, 1) -> (in, out): a convolution of one point.
POINTWISE = chain(Squeeze(3), Squeeze(2), LINEAR)
COUNTER = Ignore("{prefix}*.num_batches_tracked", "a counter of the training")


def dense(upstream: str, path: str) -> tuple[Rule, Rule]:
    """A linear layer's two tensors."""
    return (
        Rule(f"{{prefix}}{upstream}.weight", f"{path}/kernel", LINEAR),
        Rule(f"{{prefix}}{upstream}.bias", f"{path}/bias"),
    )


def norm(upstream: str, path: str) -> tuple[Rule, Rule]:
    """A LayerNorm's two tensors."""
    return (
        Rule(f"{{prefix}}{upstream}.weight", f"{path}/scale"),
        Rule(f"{{prefix}}{upstream}.bias", f"{path}/bias"),
    )


def batch_norm(upstream: str, path: str) -> tuple[Rule, ...]:
    """A BatchNorm's tensors with its statistics."""
    return (
        *norm(upstream, path),
        Rule(f"{{prefix}}{upstream}.running_mean", f"{path}/mean"),
        Rule(f"{{prefix}}{upstream}.running_var", f"{path}/var"),
    )


def inside(rules: Iterable[Rule], bases: Sequence[str], under: str) -> tuple[Rule, ...]:
    """The lines of a part that stands inside a whole model.

    Args:
      rules: the part's.
      bases: what replaces its `{prefix}`, one or the other; they may hold `{prefix}` of the whole.
      under: where its parameters lie in the whole model's tree.
    """
    return tuple(
        replace(
            rule,
            upstream=tuple(
                dict.fromkeys(
                    name.replace("{prefix}", base) for base in bases for name in rule.names
                )
            ),
            path=f"{under}/{rule.path}",
        )
        for rule in rules
    )
