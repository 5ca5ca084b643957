"""Distillation: loss and gradients against the formula written plainly, exact masks, frozen trees.

The plain formula has whole (batch, time, vocabulary) arrays, probabilities in place of their
logarithms, and means over all tokens of a batch.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medalign_jax.core.errors import UserError
from medalign_jax.core.mesh import make_mesh, named_leaves, shardings
from medalign_jax.methods.accumulate import loss_and_grad
from medalign_jax.methods.distill import Distill, DistillConfig
from medalign_jax.models.layers.lora import LoraConfig, merge
from medalign_jax.train.optimizer import OptimizerConfig, make_optimizer
from medalign_jax.train.step import init_state, state_shardings
from medalign_jax.weights.load import export
from tests import distill_models as tiny
from tests.tiny_models import quick_jit

WEIGHTS = {"text_weight": 0.7, "top_weight": 1.3, "layers_weight": 0.9, "acoustic_weight": 0.4,
           "sft_weight": 0.6}  # fmt: skip
CASES = {
    "default": {},
    "lens": {"hidden": "logit_lens", "beta": 0.1, "temperature": 2.0, "acoustic_hidden": "mse"},
    "lora": {"hidden": "cosine", "divergence": "forward_kl", "acoustic_hidden": "cosine",
             "lora": tiny.LORA},
    "tower": {"hidden": "mse", "divergence": "reverse_kl", "train_audio": False, "every": 1},
}  # fmt: skip
KEYS = jax.random.split(jax.random.key(0), 4)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny.world(tmp_path_factory.mktemp("distill"))


@pytest.fixture(scope="module")
def batch(world):
    return world.batch(4)


# --- the plain formula ---------------------------------------------------------------------------


def softmax(x):
    return jnp.exp(x) / jnp.exp(x).sum(-1, keepdims=True)


def divergence(config, q, p):
    """Of probabilities of student and teacher."""
    if config.divergence == "forward_kl":
        return (p * jnp.log(p / q)).sum(-1)
    if config.divergence == "reverse_kl":
        return (q * jnp.log(q / p)).sum(-1)
    m = config.beta * p + (1 - config.beta) * q
    kl = [(x * jnp.log(x / m)).sum(-1) for x in (p, q)]
    return config.beta * kl[0] + (1 - config.beta) * kl[1]


def between(kind, a, b):
    """Of hidden states."""
    if kind == "cosine":
        return 1 - (a * b).sum(-1) / jnp.sqrt((a**2).sum(-1) * (b**2).sum(-1))
    a, b = ((x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True) for x in (a, b))
    if kind == "mse":
        return ((a - b) ** 2).mean(-1)
    return divergence(DistillConfig(), softmax(a), softmax(b))


def normed(config, params, x):
    rms = jnp.sqrt((x**2).mean(-1, keepdims=True) + config.eps)
    return x / rms * params["final_norm"]["scale"]


def at(x, places):
    return x[jnp.arange(len(x))[:, None], places]


def mean(values, mask):
    return jnp.where(mask, values, 0).sum() / mask.sum()


def audio_inputs(world, batch):
    rows, clips, samples = batch["waveform"].shape
    features = world.student.front_end(batch["waveform"].reshape(-1, samples))
    valid = batch["samples"] // 160
    return features.reshape(rows, clips, *features.shape[1:]), valid


def full(params, student):
    """The student's own tree, of what is trained."""
    if "lora" in params:
        return merge(student.params, params["lora"], tiny.LORA)
    return {**student.params, **params["student"]}


def plain_terms(world, method, params, batch):
    """Mean of each term over its tokens."""
    student, teacher, config = world.student, world.teacher, method.config
    now, shared = full(params, student), world.builder.shared_vocab
    inputs = (batch["student_ids"], batch["student_mask"], *audio_inputs(world, batch))
    layers = tuple(range(tiny.STUDENT_DEPTH + 1))
    _, out = student.module.apply({"params": now}, *inputs, layers)
    _, start = student.module.apply({"params": student.params}, *inputs, layers)
    _, text = teacher.module.apply(
        {"params": teacher.params}, batch["teacher_ids"], batch["teacher_mask"],
        tuple(range(tiny.TEACHER_DEPTH + 1)),
    )  # fmt: skip
    audio = (batch["student_ids"] == student.module.config.audio_token) & batch["student_mask"]
    mine = {i: at(x, batch["student_at"]) for i, x in out["hidden_states"].items()}
    theirs = {i: at(x, batch["teacher_at"]) for i, x in text["hidden_states"].items()}
    heads = now["text"]["lm_head"]["kernel"], teacher.params["embed"]["embedding"].T
    logits, other = mine[tiny.STUDENT_DEPTH] @ heads[0], theirs[tiny.TEACHER_DEPTH] @ heads[1]
    own = jnp.take_along_axis(softmax(logits), batch["response_ids"][..., None], -1)[..., 0]

    def apart(a, b):
        cut = (softmax(x[..., :shared] / config.temperature) for x in (a, b))
        return divergence(config, *cut)

    def lens(i, j):
        frozen = student.params["text"]
        a, b = mine[i], theirs[j]
        a = a if i == tiny.STUDENT_DEPTH else normed(student.text, frozen, a)
        b = b if j == tiny.TEACHER_DEPTH else normed(teacher.text, teacher.params, b)
        return apart(a @ frozen["lm_head"]["kernel"], b @ heads[1])

    def pair(i, j):
        if config.hidden == "logit_lens":
            return lens(i, j)
        kernel = params["projections"][f"pair_{i:02d}_{j:02d}"]["kernel"]
        return between(config.hidden, mine[i], theirs[j] @ kernel)

    pairs = {2: [(3, 4), (1, 1)], 1: [(3, 4), (2, 3), (1, 1)]}[config.every]
    values = {
        "cross_entropy": -jnp.log(own),
        "top": apart(logits, other),
        "layers": sum(pair(*each) for each in pairs) / len(pairs),
    }
    compared = [
        between(config.acoustic_hidden, out["hidden_states"][i], start["hidden_states"][i])
        for i, _ in pairs
    ]
    terms = {name: mean(x, batch["response_mask"]) for name, x in values.items()}
    return terms | {"acoustic": mean(sum(compared) / len(compared), audio)}


def plain_loss(world, method, params, batch):
    terms, c = plain_terms(world, method, params, batch), method.config
    text = c.text_weight * (c.top_weight * terms["top"] + c.layers_weight * terms["layers"])
    acoustic, sft = c.acoustic_weight * terms["acoustic"], c.sft_weight * terms["cross_entropy"]
    return text + acoustic + sft, terms


# --- value and gradient --------------------------------------------------------------------------


@functools.cache
def method_of(world, case) -> Distill:
    return world.method(**(WEIGHTS | CASES[case]))


@functools.cache
def params_of(world, case):
    """Some way from the start, so that no term and no gradient is 0."""
    return tiny.moved(method_of(world, case).initial_params(jax.random.key(0)))


@functools.cache
def step_of(world, case, chunks=1):
    """(parameters, frozen, batch) -> loss, metrics, gradient."""
    method = method_of(world, case)
    return quick_jit(
        lambda params, frozen, batch: loss_and_grad(method, params, frozen, batch, KEYS, chunks)
    )


def stepped(world, case, batch, chunks=1):
    params, method = params_of(world, case), method_of(world, case)
    return jax.device_get(step_of(world, case, chunks)(params, method.frozen, batch))


def assert_same_gradient(found, expected, relative=1e-5):
    for (name, a), b in zip(named_leaves(found).items(), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=relative * np.abs(b).max(), err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_are_those_of_the_plain_formula(world, batch, case):
    method = method_of(world, case)
    formula = jax.value_and_grad(
        lambda params, batch: plain_loss(world, method, params, batch), has_aux=True
    )
    (loss, terms), grads = jax.device_get(quick_jit(formula)(params_of(world, case), batch))
    found, metrics, found_grads = stepped(world, case, batch)
    for name, value in terms.items():
        assert value > 1e-4, name
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(found, loss, rtol=1e-5)
    assert_same_gradient(found_grads, grads)


@pytest.mark.parametrize("chunks", [2, 4])
def test_accumulation_changes_nothing(world, batch, chunks):
    """Rows have different numbers of response and audio tokens: means of means would differ."""
    assert len(set(batch["response_mask"].sum(1))) > 1
    whole, cut = (stepped(world, "default", batch, n) for n in (1, chunks))
    for name, value in whole[1].items():
        np.testing.assert_allclose(cut[1][name], value, rtol=1e-6, atol=1e-7, err_msg=name)
    np.testing.assert_allclose(cut[0], whole[0], rtol=1e-6)
    assert_same_gradient(cut[2], whole[2])


# --- masks ---------------------------------------------------------------------------------------


def test_padding_changes_nothing(world, batch):
    loss, metrics, grads = stepped(world, "default", batch)
    other = {name: array.copy() for name, array in batch.items()}
    for name in ("student", "teacher", "response"):
        padding = ~batch[f"{name}_mask"]
        assert padding.any()
        other[f"{name}_ids"][padding] = 2 + np.arange(padding.sum()) % 15
    # What a clip has beyond its samples, and a clip that is none.
    for row, clip in np.ndindex(batch["samples"].shape):
        other["waveform"][row, clip, batch["samples"][row, clip] + 400 :] = 0.1
    for side in ("student", "teacher"):
        other[f"{side}_at"][~batch["response_mask"]] = 5
    found, changed, found_grads = stepped(world, "default", other)
    np.testing.assert_allclose(found, loss, rtol=1e-6)
    for name, value in metrics.items():
        np.testing.assert_allclose(changed[name], value, rtol=1e-6, atol=1e-7, err_msg=name)
    assert_same_gradient(found_grads, grads)


def test_audio_tokens_in_the_padding_do_not_count(world, batch):
    _, metrics, _ = stepped(world, "default", batch)
    other = batch | {"student_ids": batch["student_ids"].copy()}
    other["student_ids"][~batch["student_mask"]] = world.student.module.config.audio_token
    _, changed, _ = stepped(world, "default", other)
    np.testing.assert_allclose(changed["acoustic"], metrics["acoustic"], rtol=1e-6)


def test_the_acoustic_term_sees_audio_tokens_alone(world, batch):
    """Other words after the recording move every other term, and leave this one."""
    _, metrics, _ = stepped(world, "default", batch)
    other = batch | {"student_ids": batch["student_ids"].copy()}
    audio = batch["student_ids"] == world.student.module.config.audio_token
    for row in range(4):
        after = np.flatnonzero(audio[row])[-1] + 2
        other["student_ids"][row, after : after + 3] = [9, 10, 11]
    _, changed, _ = stepped(world, "default", other)
    np.testing.assert_allclose(changed["acoustic"], metrics["acoustic"], rtol=1e-6)
    for name in ("cross_entropy", "top", "layers"):
        assert abs(changed[name] - metrics[name]) > 1e-4, name


def test_held_out_loss_is_the_mean_over_all_tokens(world):
    """Two batches, the second half empty: each token weighs the same, empty rows nothing."""
    method, params = method_of(world, "default"), params_of(world, "default")
    encode = quick_jit(lambda batch: method.encode(params, method.frozen, batch, KEYS, False))
    formula = quick_jit(lambda batch: plain_terms(world, method, params, batch))
    batches = list(world.batches(4))
    assert (batches[1]["index"] >= 0).tolist() == [True, True, False, False]
    parts = [jax.device_get(encode(batch).coupled) for batch in batches]
    loss, metrics = method.couple(jax.tree.map(lambda *x: np.concatenate(x), *parts))
    terms = [jax.device_get(formula(batch)) for batch in batches]
    audio = world.student.module.config.audio_token
    counts = {
        "response": [batch["response_mask"].sum() for batch in batches],
        "audio": [((b["student_ids"] == audio) & b["student_mask"]).sum() for b in batches],
    }
    for name in terms[0]:
        weights = counts["audio" if name == "acoustic" else "response"]
        expected = np.average([each[name] for each in terms], weights=weights)
        np.testing.assert_allclose(metrics[name], expected, rtol=1e-5, err_msg=name)
    expected = sum(
        weight * metrics[name]
        for name, weight in (("top", 0.7 * 1.3), ("layers", 0.7 * 0.9), ("acoustic", 0.4),
                             ("cross_entropy", 0.6))
    )  # fmt: skip
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


# --- what is frozen, what learns, what leaves ----------------------------------------------------


def test_supervised_runs_keep_and_read_no_teacher(world, batch):
    method = world.method(text_weight=0.0, acoustic_weight=0.0, sft_weight=2.0)
    assert method.frozen == {} and method.teacher is None
    params = method.initial_params(jax.random.key(0))
    assert set(params) == {"student"}
    alone = {name: array for name, array in batch.items() if not name.startswith("teacher")}
    encoded = jax.eval_shape(
        lambda batch: method.encode(params, {}, method.weigh(batch), KEYS, True), alone
    )
    assert set(encoded.metrics) == {"cross_entropy", "accuracy"}


def test_the_acoustic_divergence_is_watched_where_it_has_no_weight(world, batch):
    """On held-out questions alone: a step of training has no pass of the snapshot for it."""
    method = world.method(text_weight=0.0, acoustic_weight=0.0, monitor_acoustic=True)
    assert set(method.frozen) == {"snapshot"}
    params = method.initial_params(jax.random.key(0))
    alone = {name: array for name, array in batch.items() if not name.startswith("teacher")}

    def held_out(batch):
        return method.couple(method.encode(params, method.frozen, batch, KEYS, False).coupled)[1]

    def step(batch):
        return method.encode(params, method.frozen, method.weigh(batch), KEYS, True).metrics

    assert set(jax.eval_shape(held_out, alone)) == {"cross_entropy", "accuracy", "acoustic"}
    assert set(jax.eval_shape(step, alone)) == {"cross_entropy", "accuracy"}


@pytest.mark.parametrize(
    ("case", "frozen"),
    [
        ({}, {"snapshot", "teacher"}),
        ({"acoustic_weight": 0.0}, {"teacher"}),
        ({"acoustic_weight": 0.0, "train_audio": False}, {"snapshot/audio", "teacher"}),
        ({"acoustic_weight": 0.0, "hidden": "logit_lens"}, {"snapshot/text", "teacher"}),
        ({"text_weight": 0.0}, {"snapshot"}),
        ({"text_weight": 0.0, "lora": tiny.LORA}, {"student"}),
        ({"form": "last"}, {"snapshot", "teacher/embed", "teacher/final_norm"}),
        ({"form": "top_k"}, {"snapshot"}),
        ({"form": "last", "top_weight": 0.0, "acoustic_weight": 0.0}, set()),
        ({"form": "top_k", "hidden": "logit_lens"},
         {"snapshot", "teacher/embed", "teacher/final_norm"}),
    ],
)  # fmt: skip
def test_frozen_trees_are_those_that_the_terms_need(world, case, frozen):
    found = world.method(**case).frozen
    names = set()
    for name, tree in found.items():
        whole = world.teacher.params if name == "teacher" else world.student.params
        names |= {name} if set(tree) == set(whole) else {f"{name}/{part}" for part in tree}
    assert names == frozen
    if "snapshot/text" in frozen:
        assert set(found["snapshot"]["text"]) == {"lm_head", "final_norm"}


def test_a_fresh_run_starts_from_the_students_own_parameters(world, batch):
    """No distance from the snapshot, and nothing of the original is given away for donation."""
    method = method_of(world, "default")
    params = method.initial_params(jax.random.key(0))
    for mine, theirs in zip(
        jax.tree.leaves(params["student"]), jax.tree.leaves(world.student.params), strict=True
    ):
        assert mine is not theirs
        np.testing.assert_array_equal(mine, theirs)
    _, metrics, grads = step_of(world, "default")(params, method.frozen, batch)
    assert metrics["acoustic"] < 1e-9
    assert max(np.abs(x).max() for x in jax.tree.leaves(grads["projections"])) > 1e-5
    shapes = jax.eval_shape(method.init, jax.random.key(0))
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, params)


def test_lora_starts_at_the_student_and_moves_nothing_else(world, batch):
    method = method_of(world, "lora")
    params = method.initial_params(jax.random.key(0))
    assert set(params) == {"lora", "projections"} and set(method.frozen) == {"student", "teacher"}
    _, metrics, grads = jax.device_get(step_of(world, "lora")(params, method.frozen, batch))
    whole = {"student": world.student.params, "projections": params["projections"]}
    formula = quick_jit(lambda batch: plain_terms(world, method, whole, batch))
    for name, value in jax.device_get(formula(batch)).items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    assert abs(metrics["acoustic"]) < 1e-6  # the frozen base is the snapshot
    for name, grad in named_leaves(grads).items():
        still = name.endswith("/a")  # b is 0
        assert (np.abs(grad).max() == 0) == still, name


def test_a_tower_that_does_not_learn_is_not_a_parameter(world):
    """So neither gradient nor weight decay can move it."""
    params = params_of(world, "tower")
    assert set(params["student"]) == {"text"}
    method = method_of(world, "tower")
    assert method.student_params(params)["audio"] is world.student.params["audio"]
    with pytest.raises(UserError, match=r"lora\.modules match kernels of the audio tower"):
        world.method(
            train_audio=False, lora=LoraConfig(modules=(r"audio/.*fc1/kernel$",))
        ).initial_params(jax.random.key(0))


@pytest.mark.parametrize("case", CASES)
def test_what_is_exported_is_the_student_alone(world, case):
    params = params_of(world, case)
    method = method_of(world, case)
    tree = method.student_params(params)
    assert jax.tree.map(np.shape, tree) == jax.tree.map(np.shape, world.student.params)
    before, after = (export(each, world.student.table) for each in (world.student.params, tree))
    assert set(before) == set(after)
    same = {name for name in after if np.array_equal(before[name], after[name])}
    if case == "lora":
        changed = set(after) - same
        assert len(changed) == 2 * tiny.STUDENT_DEPTH
        assert all(name.endswith(("q_proj.weight", "v_proj.weight")) for name in changed)
    else:
        assert bool(same) == (case == "tower")


@pytest.mark.parametrize("case", [*CASES, "cached"])
def test_the_sharding_tables_cover_every_leaf(world, case):
    method = world.method(form="last") if case == "cached" else method_of(world, case)
    mesh, key = make_mesh(devices=jax.devices()[:1]), jax.random.key(0)
    params = jax.eval_shape(method.init, key)
    optimizer, _ = make_optimizer(OptimizerConfig(), params, 10)
    state = jax.eval_shape(lambda params: init_state(params, optimizer, 0), params)
    state_shardings(state, method.sharding_rules, mesh)
    shardings(method.frozen, method.frozen_rules, mesh)
    assert not any(pattern == ".*" for pattern, _ in (*method.sharding_rules, *method.frozen_rules))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sft_weight": -1.0}, "sft_weight is -1.0; a weight is 0 or more"),
        ({"text_weight": 0.0, "acoustic_weight": 0.0, "sft_weight": 0.0}, "nothing to learn"),
        ({"top_weight": 0.0, "layers_weight": 0.0}, "run for nothing; set loss.text_weight to 0"),
        ({"hidden": "l1"}, "loss.hidden 'l1' is not one of jsd, cosine, mse, logit_lens"),
        ({"acoustic_hidden": "logit_lens"}, "acoustic_hidden 'logit_lens' is not one of jsd, cos"),
    ],
)
def test_senseless_losses_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        DistillConfig(**changes)


def test_a_missing_teacher_is_refused(world, batch):
    with pytest.raises(UserError, match="needs a textual teacher"):
        Distill(method_of(world, "default").student, DistillConfig())
    method = world.method(form="last")
    params = jax.eval_shape(method.init, jax.random.key(0))
    with pytest.raises(UserError, match="the batch has no 'teacher_layers'"):
        jax.eval_shape(
            lambda params: method.encode(params, method.frozen, method.weigh(batch), KEYS, True),
            params,
        )
    with pytest.raises(UserError, match="form 'all' is not one of live, last, top_k"):
        world.method(form="all")
