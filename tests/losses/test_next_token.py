"""Chunked next-token losses against plain formulas in float64, and what they hold in memory."""

import dataclasses
import functools
import itertools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from medalign_jax.core.errors import UserError
from medalign_jax.losses import Divergence, TopK, masked_sum, next_token_losses, top_k
from tests import devices
from tests.losses.test_divergences import KINDS, assert_relative, torch_divergence

ROWS, LENGTH, WIDTH, TEACHER_WIDTH = 2, 11, 16, 24
VOCAB, TEACHER_VOCAB, SHARED = 96, 80, 72
RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


PARAMS = {"hidden": normal(ROWS, LENGTH, WIDTH), "kernel": 0.4 * normal(WIDTH, VOCAB)}
TEACHER = {"hidden": normal(ROWS, LENGTH, TEACHER_WIDTH)}
TEACHER["kernel"] = 0.4 * normal(TEACHER_WIDTH, TEACHER_VOCAB)
LABELS = RNG.integers(0, VOCAB, (ROWS, LENGTH))
WEIGHTS = normal(2, ROWS, LENGTH)


def head_of(kernel):
    return lambda hidden: jnp.matmul(hidden, kernel, precision="highest")


def chunked(params, teacher=TEACHER, chunk=4, **settings):
    return next_token_losses(
        params["hidden"], teacher["hidden"], LABELS, student_head=head_of(params["kernel"]),
        teacher_head=head_of(teacher["kernel"]), chunk=chunk, shared_vocab=SHARED, **settings,
    )  # fmt: skip


def total(out, weights=WEIGHTS):
    return (out["divergence"] * weights[0] + out["cross_entropy"] * weights[1]).sum()


def values_and_gradients(losses):
    """What `losses` of the parameters gives, and the gradient of its weighted sum."""

    def loss(params):
        out = losses(params)
        return total(out), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(PARAMS)
    return out, grads


def double(tree):
    return {k: torch.tensor(x, dtype=torch.float64, requires_grad=True) for k, x in tree.items()}


def torch_losses(params, teacher, divergence):
    """Divergence and cross-entropy (B, R) from whole (B, R, V) scores, in float64."""
    scores = params["hidden"] @ params["kernel"]
    others = (teacher["hidden"] @ teacher["kernel"]).detach()
    value = torch_divergence(divergence, scores[..., :SHARED], others[..., :SHARED])
    entropy = torch.nn.functional.cross_entropy(
        scores.movedim(-1, 1), torch.tensor(LABELS), reduction="none"
    )
    return {"divergence": value, "cross_entropy": entropy}


@pytest.mark.parametrize(
    "divergence", [*KINDS, Divergence("jsd", 0.3, 2.0)], ids=lambda d: f"{d.kind}-{d.beta}"
)
def test_values_and_gradients_equal_the_plain_formula(divergence):
    params = double(PARAMS)
    expected = torch_losses(params, double(TEACHER), divergence)
    total(expected, torch.tensor(WEIGHTS)).backward()
    out, grads = values_and_gradients(lambda p: chunked(p, divergence=divergence))
    for name, value in expected.items():
        error = np.abs(np.asarray(out[name]) - value.detach().numpy())
        assert np.all(error <= 1e-6 * np.maximum(1.0, value.detach().numpy())), name
    for name, grad in grads.items():
        assert_relative(grad, params[name].grad, 1e-5)


def test_equals_the_plain_formula_in_float32():
    def plain(params):
        scores = head_of(params["kernel"])(params["hidden"])
        others = head_of(TEACHER["kernel"])(TEACHER["hidden"])
        own = jnp.take_along_axis(jax.nn.log_softmax(scores), LABELS[..., None], -1)[..., 0]
        value = Divergence().of_logits(scores[..., :SHARED], others[..., :SHARED])
        return {"divergence": value, "cross_entropy": -own}

    (out, grads), (expected, expected_grads) = map(values_and_gradients, (chunked, plain))
    for name, value in expected.items():
        np.testing.assert_allclose(out[name], value, atol=1e-6, rtol=0)
    for name, grad in grads.items():
        assert_relative(grad, expected_grads[name], 1e-5)


def test_a_tied_embedding_gets_both_gradients():
    embedding = 0.4 * normal(VOCAB, WIDTH)
    ids = RNG.integers(0, VOCAB, (ROWS, LENGTH))

    def tied(embedding):
        hidden = jnp.tanh(embedding[ids])
        return total(chunked({"hidden": hidden, "kernel": embedding.T}))

    table = torch.tensor(embedding, dtype=torch.float64, requires_grad=True)
    params = {"hidden": torch.tanh(table[torch.tensor(ids)]), "kernel": table.T}
    loss = total(torch_losses(params, double(TEACHER), Divergence()), torch.tensor(WEIGHTS))
    loss.backward()
    assert_relative(jax.grad(tied)(embedding), table.grad, 1e-5)


@pytest.mark.parametrize("chunk", [1, 3, 11, 1000])
def test_chunk_size_changes_nothing(chunk):
    out, grads = values_and_gradients(functools.partial(chunked, chunk=chunk))
    expected, expected_grads = values_and_gradients(chunked)
    for name, value in expected.items():
        assert out[name].shape == (ROWS, LENGTH)
        np.testing.assert_allclose(out[name], value, atol=1e-6, rtol=0)
    for name, grad in grads.items():
        assert_relative(grad, expected_grads[name], 1e-6)


def test_rows_do_not_see_each_other():
    whole = chunked(PARAMS)["divergence"][1:]
    row = {"hidden": PARAMS["hidden"][1:], "kernel": PARAMS["kernel"]}
    alone = next_token_losses(
        row["hidden"], TEACHER["hidden"][1:], LABELS[1:], student_head=head_of(row["kernel"]),
        teacher_head=head_of(TEACHER["kernel"]), shared_vocab=SHARED, chunk=3,
    )  # fmt: skip
    np.testing.assert_allclose(alone["divergence"], whole, atol=1e-6, rtol=0)


def test_the_teacher_is_never_differentiated():
    grads = jax.grad(lambda t: total(chunked(PARAMS, t)))(TEACHER)
    assert not any(np.any(g) for g in grads.values())


def test_correct_and_cross_entropy_without_a_teacher():
    out = next_token_losses(
        PARAMS["hidden"], None, LABELS, student_head=head_of(PARAMS["kernel"]), chunk=4
    )
    assert set(out) == {"cross_entropy", "correct"}
    np.testing.assert_array_equal(out["cross_entropy"], chunked(PARAMS)["cross_entropy"])
    likeliest = (PARAMS["hidden"].astype(float) @ PARAMS["kernel"]).argmax(-1)
    labels = np.where(np.arange(LENGTH) % 2, likeliest, (likeliest + 1) % VOCAB)
    out = next_token_losses(
        PARAMS["hidden"], None, labels, student_head=head_of(PARAMS["kernel"]), chunk=4
    )
    np.testing.assert_array_equal(out["correct"], np.tile(np.arange(LENGTH) % 2 == 1, (ROWS, 1)))


@pytest.mark.parametrize("label", [-100, -1, VOCAB])
def test_labels_of_padding_do_not_matter_and_others_show(label):
    labels, mask = LABELS.copy(), np.ones_like(LABELS, bool)
    labels[0, 5:], mask[0, 5:] = label, False

    def loss(params, labels):
        out = next_token_losses(
            params["hidden"], None, labels, student_head=head_of(params["kernel"]), chunk=4
        )["cross_entropy"]
        return masked_sum(out, mask).sum(), out

    run = jax.value_and_grad(loss, has_aux=True)
    (value, out), grads = run(PARAMS, labels)
    (expected, _), expected_grads = run(PARAMS, LABELS)
    assert np.isnan(out[0, 5:]).all() and np.isfinite(out[mask]).all()
    assert value == expected
    jax.tree.map(np.testing.assert_array_equal, grads, expected_grads)


# Teachers cut down to k tokens and a rest.


@functools.partial(jax.jit, static_argnames=("k", "divergence", "chunk"))
def kept(k, teacher=TEACHER, divergence=Divergence(), chunk=4):  # noqa: B008
    return top_k(
        teacher["hidden"], head_of(teacher["kernel"]), k, shared_vocab=SHARED,
        temperature=divergence.temperature, chunk=chunk,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames="divergence")
def against(params, teacher, divergence):
    return next_token_losses(
        params["hidden"], teacher, LABELS, student_head=head_of(params["kernel"]), chunk=4,
        shared_vocab=SHARED, divergence=divergence,
    )  # fmt: skip


def torch_lumped(params, ids, divergence):
    """Divergence of k + 1 categories from whole scores in float64."""
    sides = []
    for tree in (params, {k: v.detach() for k, v in double(TEACHER).items()}):
        scores = (tree["hidden"] @ tree["kernel"])[..., :SHARED] / divergence.temperature
        probs = torch.softmax(scores, -1)
        member = torch.zeros_like(probs, dtype=torch.bool).scatter(-1, ids, True)
        rest = torch.where(member, 0.0, probs).sum(-1, keepdim=True)
        sides.append(torch.cat([probs.gather(-1, ids), rest], -1).log())
    return torch_divergence(dataclasses.replace(divergence, temperature=1.0), *sides)


def test_top_k_keeps_the_likeliest_and_the_rest():
    scores = (TEACHER["hidden"].astype(float) @ TEACHER["kernel"])[..., :SHARED] / 2.0
    probs = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    got = kept(5, divergence=Divergence(temperature=2.0), chunk=3)
    order = np.argsort(-probs)[..., :5]
    np.testing.assert_array_equal(got.ids, order)
    likeliest = np.take_along_axis(probs, order, -1)
    np.testing.assert_allclose(np.exp(got.log_probs), likeliest, rtol=1e-5)
    np.testing.assert_allclose(np.exp(got.rest), 1 - likeliest.sum(-1), rtol=1e-5)


@pytest.mark.parametrize(
    "divergence", [*KINDS, Divergence("jsd", 0.3, 2.0)], ids=lambda d: f"{d.kind}-{d.beta}"
)
def test_lumped_values_and_gradients(divergence):
    teacher = kept(6, divergence=divergence)
    params = double(PARAMS)
    expected = torch_lumped(params, torch.tensor(np.asarray(teacher.ids, int)), divergence)
    (expected * torch.tensor(WEIGHTS[0])).sum().backward()

    def loss(params):
        value = against(params, teacher, divergence)["divergence"]
        return (value * WEIGHTS[0]).sum(), value

    (_, value), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(PARAMS)
    error = np.abs(np.asarray(value) - expected.detach().numpy())
    assert np.all(error <= 1e-6 * np.maximum(1.0, expected.detach().numpy()))
    for name, grad in grads.items():
        assert_relative(grad, params[name].grad, 1e-5)


@pytest.mark.parametrize("divergence", [KINDS[1], *KINDS[3:]], ids=lambda d: d.kind)
def test_lumping_only_lowers_and_vanishes_when_all_are_kept(divergence):
    live = lambda p: chunked(p, divergence=divergence)["divergence"]  # noqa: E731
    lumped = lambda p, k: against(p, kept(k), divergence)["divergence"]  # noqa: E731

    @jax.jit
    def run(params):
        weighted = lambda f: jax.grad(lambda p: (f(p) * WEIGHTS[0]).sum())(params)  # noqa: E731
        values = [*(lumped(params, k) for k in (1, 8, SHARED)), live(params)]
        return values, weighted(live), weighted(lambda p: lumped(p, SHARED))

    values, whole, kept_all = run(PARAMS)
    rounding = 1e-6 * np.maximum(1.0, values[-1])
    for fewer, more in itertools.pairwise(values):
        assert np.all(fewer <= more + rounding)
    assert np.all(np.abs(values[-2] - values[-1]) <= rounding)
    for name in whole:
        assert_relative(kept_all[name], whole[name], 1e-5)


@pytest.mark.parametrize("divergence", [KINDS[1], *KINDS[3:]], ids=lambda d: d.kind)
def test_a_rest_that_underflows_has_a_finite_gradient(divergence):
    sure = {"hidden": 300 * TEACHER["hidden"], "kernel": TEACHER["kernel"]}
    params = {"hidden": 300 * PARAMS["hidden"], "kernel": PARAMS["kernel"]}
    loss = lambda p: against(p, kept(3, sure), divergence)["divergence"].sum()  # noqa: E731
    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in grads.values())


def test_a_teacher_stored_rounded_is_normalised_anew():
    exact = kept(8)
    rounded = TopK(exact.ids, *(x.astype(jnp.bfloat16) for x in exact[1:]))
    value = against(PARAMS, rounded, Divergence())["divergence"]
    np.testing.assert_allclose(value, against(PARAMS, exact, Divergence())["divergence"], atol=5e-3)
    moved = TopK(exact.ids, exact.log_probs + 0.25, exact.rest + 0.25)
    again = against(PARAMS, moved, Divergence())["divergence"]
    np.testing.assert_allclose(again, against(PARAMS, exact, Divergence())["divergence"], atol=1e-6)


# Memory: B = 2, R = 256, in chunks of 4 (64 of them); widths 8.

MEMORY_ROWS, MEMORY_LENGTH, MEMORY_CHUNK, MEMORY_WIDTH = 2, 256, 4, 8


def memory_loss(student, teacher, hidden, labels, chunk, k=None):
    states = hidden if k is None else top_k(hidden, head_of(teacher), k, chunk=chunk)
    out = next_token_losses(
        hidden, states, labels, student_head=head_of(student), teacher_head=head_of(teacher),
        chunk=chunk,
    )  # fmt: skip
    return out["divergence"].sum() + out["cross_entropy"].sum()


def memory_inputs(vocab):
    kernel = jax.ShapeDtypeStruct((MEMORY_WIDTH, vocab), jnp.float32)
    hidden = jax.ShapeDtypeStruct((MEMORY_ROWS, MEMORY_LENGTH, MEMORY_WIDTH), jnp.float32)
    labels = jax.ShapeDtypeStruct((MEMORY_ROWS, MEMORY_LENGTH), jnp.int32)
    return kernel, kernel, hidden, labels


def temporary_floats(vocab, chunk):
    """What a compiled value and gradient (kernel and hidden states) holds beside its arguments."""
    loss = functools.partial(memory_loss, chunk=chunk)
    step = jax.jit(jax.value_and_grad(loss, (0, 2)))
    compiled = step.lower(*memory_inputs(vocab)).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 4


def test_memory_grows_by_one_chunk_and_one_kernel_only():
    """Four times the vocabulary costs some chunks and kernels more, not a whole (B, R, V)."""
    more = 3 * 1024
    chunk = MEMORY_ROWS * MEMORY_CHUNK * more
    kernel = MEMORY_WIDTH * more
    allowed = 6 * chunk + 4 * kernel
    whole = MEMORY_ROWS * MEMORY_LENGTH * more
    assert allowed < whole / 4
    grown = [temporary_floats(v, MEMORY_CHUNK) for v in (1024, 4096)]
    assert grown[1] - grown[0] < allowed


def test_memory_of_the_formula_in_one_piece_grows_by_the_whole():
    """So that the test above can fail."""
    grown = [temporary_floats(v, MEMORY_LENGTH) for v in (1024, 4096)]
    assert grown[1] - grown[0] > 2 * MEMORY_ROWS * MEMORY_LENGTH * 3 * 1024


@pytest.mark.parametrize("k", [None, 16])
def test_no_value_of_the_step_is_larger_than_a_chunk_or_a_kernel(k):
    vocab = 1024
    loss = functools.partial(memory_loss, chunk=MEMORY_CHUNK, k=k)
    step = jax.make_jaxpr(jax.value_and_grad(loss, (0, 2)))(*memory_inputs(vocab))
    largest = max(sizes_of(step.jaxpr))
    assert largest == vocab * max(MEMORY_ROWS * MEMORY_CHUNK, MEMORY_WIDTH)


def sizes_of(jaxpr):
    """Number of elements of every value in a jaxpr and in those inside it."""
    for equation in jaxpr.eqns:
        yield from (int(np.prod(v.aval.shape)) for v in equation.outvars)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from sizes_of(inner)


def compare_one_device_with_all():
    """Rows spread over the devices: same numbers, and no scores or states are sent around."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    rows, whole = (jax.NamedSharding(mesh, jax.P(*axes)) for axes in (("data",), ()))
    inputs = normal(8, 64), normal(8, 64), normal(8, 20, 8), RNG.integers(0, 64, (8, 20))
    placed = jax.device_put(inputs, (whole, whole, rows, rows))
    loss = functools.partial(memory_loss, chunk=6, k=5)
    step = jax.jit(jax.value_and_grad(loss, (0, 2)))
    compiled = step.lower(*placed).compile()
    assert "all-gather" not in compiled.as_text() and "all-to-all" not in compiled.as_text()
    got, expected = (jax.tree.leaves(f(*x)) for f, x in ((compiled, placed), (step, inputs)))
    for ours, theirs in zip(got, expected, strict=True):
        assert_relative(ours, theirs, 1e-6)


@pytest.mark.slow
def test_on_four_devices():
    script = "from tests.losses import test_next_token as t; t.compare_one_device_with_all()"
    devices.run("-c", script, devices=4)


def test_bad_arguments_are_named():
    with pytest.raises(UserError, match=r"loss\.chunk 0 must be at least 1"):
        chunked(PARAMS, chunk=0)
    call = functools.partial(
        next_token_losses, PARAMS["hidden"], TEACHER["hidden"], LABELS,
        student_head=head_of(PARAMS["kernel"]), teacher_head=head_of(TEACHER["kernel"]),
    )  # fmt: skip
    with pytest.raises(UserError, match=r"student has 96 tokens and the teacher 80: set loss\.sh"):
        call()
    with pytest.raises(UserError, match=r"loss\.shared_vocab is 90, but the teacher has 80 tokens"):
        call(shared_vocab=90)
    with pytest.raises(UserError, match=r"loss\.shared_vocab is 0, but the student has 96"):
        call(shared_vocab=0)
    with pytest.raises(UserError, match="need teacher_head"):
        call(teacher_head=None)
    with pytest.raises(UserError, match=r"\(2, 11, 16\) and \(2, 10\)"):
        next_token_losses(PARAMS["hidden"], None, LABELS[:, 1:], student_head=head_of(0))
    with pytest.raises(UserError, match=r"\(B, R\) = \(2, 11\), got \(2, 10, 24\)"):
        chunked(PARAMS, {"hidden": TEACHER["hidden"][:, 1:], "kernel": TEACHER["kernel"]})
    for k in (0, SHARED + 1):
        with pytest.raises(UserError, match=rf"teacher\.top_k {k} is not .* from 1 to 72"):
            kept(k)
