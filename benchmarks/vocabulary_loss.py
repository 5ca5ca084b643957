"""The loss at the vocabulary on a card: divergence of student and teacher, and its gradients.

    python -m benchmarks.vocabulary_loss [--tokens 8192] [--vocab 128256] [--width 4096]

The JSD of next-token distributions that two bfloat16 heads read in last hidden states, with the
gradients by the student's states and by its head. Contestants, in turns: our `next_token_sum` and
`next_token_losses`, with chunks of several sizes, the plain formula with all scores at once, and,
where PyTorch and liger_kernel are installed and there is a card, `LigerFusedLinearJSD`. Before
anything is timed all have to agree with a float32 formula on fewer tokens.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.turns import in_turns
from medalign_jax.losses import next_token_losses, next_token_sum
from medalign_jax.train import cost


class Inputs(NamedTuple):
    """Last hidden states (1, BT, W) and kernels (W, V) of both sides, bfloat16."""

    student: jax.Array
    kernel: jax.Array
    teacher: jax.Array
    teacher_kernel: jax.Array


def inputs(tokens: int, vocab: int, width: int) -> Inputs:
    """Random states, and heads whose scores have a deviation of 2."""

    @jax.jit
    def make(key):
        keys = jax.random.split(key, 4)
        states = [jax.random.normal(k, (1, tokens, width), jnp.bfloat16) for k in keys[:2]]
        kernels = [
            jax.random.normal(k, (width, vocab), jnp.bfloat16) * (2 / width**0.5) for k in keys[2:]
        ]
        return Inputs(states[0], kernels[0], states[1], kernels[1])

    return jax.block_until_ready(make(jax.random.key(0)))


def _head(kernel: jax.Array) -> Callable[[jax.Array], jax.Array]:
    return lambda hidden: jnp.dot(hidden, kernel)


def _summed(chunk: int, x: Inputs) -> jax.Array:
    tokens = x.student.shape[1]
    labels = jnp.zeros((1, tokens), jnp.int32)
    weights = {"divergence": jnp.full((1, tokens), 1.0 / tokens, jnp.float32)}
    heads = {"student_head": _head(x.kernel), "teacher_head": _head(x.teacher_kernel)}
    return next_token_sum(x.student, x.teacher, labels, weights, chunk=chunk, **heads)[0]


def _recomputed(chunk: int, x: Inputs) -> jax.Array:
    labels = jnp.zeros(x.student.shape[:2], jnp.int32)
    heads = {"student_head": _head(x.kernel), "teacher_head": _head(x.teacher_kernel)}
    return next_token_losses(x.student, x.teacher, labels, chunk=chunk, **heads)[
        "divergence"
    ].mean()


def _plain(x: Inputs) -> jax.Array:
    """The formula, all scores at once, by automatic differentiation; in the inputs' type."""
    ours, theirs = (
        jax.nn.log_softmax(jnp.dot(h, k).astype(jnp.float32))
        for h, k in ((x.student, x.kernel), (x.teacher, x.teacher_kernel))
    )
    middle = jnp.logaddexp(ours, theirs) - np.log(2.0)
    each = jnp.exp(theirs) * (theirs - middle) + jnp.exp(ours) * (ours - middle)
    return 0.5 * each.sum(-1).mean()


class Ours:
    """A compiled value and gradient of student's states and kernel."""

    def __init__(self, loss: Callable[[Inputs], jax.Array], x: Inputs):
        def of(student, kernel, x):
            return loss(x._replace(student=student, kernel=kernel))

        step = jax.jit(jax.value_and_grad(of, argnums=(0, 1)))
        self.run, self.x = step.lower(x.student, x.kernel, x).compile(), x
        self.extra = cost.memory(self.run).temporary

    def result(self) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Value, and gradients (1, BT, W) and (W, V)."""
        return self.run(self.x.student, self.x.kernel, self.x)

    def __call__(self) -> None:
        """One value and gradient, to its end."""
        jax.block_until_ready(self.result())


def liger(x: Inputs):
    """The same by Liger's kernel, or None; its peak of extra memory is measured."""
    try:
        import torch
        from liger_kernel.transformers import LigerFusedLinearJSD
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    take = partial(torch.from_dlpack)
    student, teacher = (take(a[0]).clone() for a in (x.student, x.teacher))
    heads = [take(a).T.contiguous() for a in (x.kernel, x.teacher_kernel)]
    student.requires_grad_(True), heads[0].requires_grad_(True)
    loss = LigerFusedLinearJSD(jsd_beta=0.5)

    def run():
        student.grad = heads[0].grad = None
        value = loss(student, heads[0], teacher, heads[1], None)
        value.backward()
        torch.cuda.synchronize()
        return value.item(), (student.grad, heads[0].grad)

    try:
        run()
    except Exception as error:  # of any kind, in a kernel of another project
        print(f"LigerFusedLinearJSD does not run here: {type(error).__name__}: {error}"[:300])
        return None
    student.grad = heads[0].grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    run.extra = torch.cuda.max_memory_allocated() - before
    return run


def _distance(found: jax.Array, wanted: jax.Array) -> float:
    found, wanted = (np.asarray(a, np.float64) for a in (found, wanted))
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def check(loss: Callable[[Inputs], jax.Array], x: Inputs) -> str:
    """Relative errors against the formula in float32; ends the program where they are large."""
    exact = Inputs(*(a.astype(jnp.float32) for a in x))
    with jax.default_matmul_precision("highest"):
        value, grads = Ours(_plain, exact).result()
    ours, our_grads = Ours(loss, x).result()
    errors = [
        _distance(ours, value),
        *(_distance(*pair) for pair in zip(our_grads, grads, strict=True)),
    ]
    if not max(errors) < 2e-2:  # bfloat16 scores
        raise SystemExit(f"value and gradients differ from the plain formula: {errors}")
    return " ".join(f"{error:.0e}" for error in errors)


def main() -> None:
    """Prints milliseconds, extra memory and errors of each contestant."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocab", type=int, default=128_256)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--chunks", default="512,1024,2048,4096")
    options = parser.parse_args()
    losses = {}
    for chunk in map(int, options.chunks.split(",")):
        losses[f"next_token_sum, chunk {chunk}"] = partial(_summed, chunk)
        losses[f"next_token_losses, chunk {chunk}"] = partial(_recomputed, chunk)
    losses["plain formula"] = _plain
    few = inputs(min(options.tokens, 512), min(options.vocab, 8192), options.width)
    errors = {name: check(loss, few) for name, loss in losses.items()}
    x = inputs(options.tokens, options.vocab, options.width)
    contestants = {}
    for name, loss in losses.items():
        try:
            contestants[name] = Ours(loss, x)
            contestants[name]()
        except jax.errors.JaxRuntimeError as error:
            print(f"{name}: {str(error).splitlines()[0][:100]}")
            contestants.pop(name, None)
    if (peer := liger(x)) is not None:
        contestants["LigerFusedLinearJSD"] = peer
        value = float(contestants[next(iter(losses))].result()[0])
        print(f"values: ours {value:.5f}, Liger {peer()[0]:.5f}")
    taken = in_turns(contestants, options.rounds, settle=1)
    flop = 4 * 2 * options.tokens * options.vocab * options.width
    print(f"{jax.devices()[0].device_kind}: {options.tokens} tokens, {options.vocab} words, width "
          f"{options.width}; {flop / 1e12:.1f} TFLOP without recomputation")  # fmt: skip
    for name, times in taken.items():
        seconds = statistics.median(times)
        print(
            f"{name:32s} {1e3 * seconds:8.1f} ms  {flop / seconds / 1e12:6.0f} TFLOP/s  extra "
            f"{contestants[name].extra / 2**30:5.2f} GiB  errors {errors.get(name, '-')}"
        )


if __name__ == "__main__":
    main()
