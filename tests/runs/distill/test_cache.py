"""A teacher that ran once says what it says live, to the rounding of bfloat16; and it runs once."""

import pickle
from dataclasses import replace
from typing import get_type_hints

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from configs.distill import get_config
from medalign_jax.core.batches import StoredTeacherBatch, mismatches
from medalign_jax.core.errors import UserError
from medalign_jax.core.mesh import make_mesh
from medalign_jax.data.pipeline import PipelineError
from medalign_jax.methods.text_teacher import response_states
from medalign_jax.runs.distill import cache as distill_cache
from medalign_jax.runs.distill.cache import NAMES, fill, fingerprint_of, folder_name
from medalign_jax.runs.parts.distillation import teacher_form
from medalign_jax.teachers.state_cache import StateCacheError
from tests import distill_models as tiny
from tests.tiny_models import quick_jit

COUNT, BATCH, LAYERS = 6, 4, (1, 4)  # layers of the teacher that have a partner
BF16 = ml_dtypes.bfloat16
TERMS = ("cross_entropy", "accuracy", "top", "layers", "acoustic")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny.world(tmp_path_factory.mktemp("cached"), COUNT)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def passes(world, mesh, tmp_path_factory):
    """What the teacher said, in both forms; of "top_k" all shared tokens are kept."""
    found = {}
    for form in ("last", "top_k"):
        method = world.method(form)
        fingerprint = fingerprint_of(method, world.teacher, world.builder.shared_vocab)
        folder = tmp_path_factory.mktemp(form)
        found[form] = fill(folder, fingerprint, world.teacher, [world.data], mesh, BATCH)
    return found


@pytest.fixture(scope="module")
def live(world):
    """Hidden states of each example by itself, without padding: {layer: (R, W)} float32."""
    run = jax.jit(
        lambda params, batch: response_states(world.teacher.module, params, batch, {*LAYERS}),
    )
    found = []
    for sequences in world.data.sequences:
        arrays = sequences.arrays()
        ids = np.pad(arrays["teacher_ids"], (0, 40 - len(arrays["teacher_ids"])))
        at = np.pad(arrays["teacher_at"], (0, 8 - len(arrays["teacher_at"])))
        mask = np.arange(40) < len(arrays["teacher_ids"])
        batch = {"teacher_ids": ids[None], "teacher_mask": mask[None], "teacher_at": at[None]}
        states = jax.device_get(run(world.teacher.params, batch))
        count = len(sequences.response)
        found.append({layer: states[layer][0, :count] for layer in LAYERS})
    return found


# --- what is stored ------------------------------------------------------------------------------


def test_states_are_those_of_the_live_teacher_rounded(world, passes, live):
    """To bfloat16: half a unit of its 8 bits, 2^-8, besides float32's own noise."""
    for form, layers in (("last", (1,)), ("top_k", LAYERS)):
        for n, sequences in enumerate(world.data.sequences):
            count = len(sequences.response)
            found = passes[form](sequences, 8)
            stored = {layer: found["teacher_layers"][i] for i, layer in enumerate(layers)}
            if form == "last":  # after the final norm; it is the last layer's state too
                stored[4] = found["teacher_last"]
            assert found["teacher_layers"].shape == (len(layers), 8, tiny.TEACHER_WIDTH)
            for layer, states in stored.items():
                assert states.dtype == BF16 and not states[count:].any()
                expected = live[n][layer]
                error = np.abs(states[:count].astype(np.float32) - expected)
                assert (error <= 2.0**-8 * np.abs(expected) + 1e-5).all()
                assert error.max() > 1e-4  # it is rounded


def test_top_k_is_the_distribution_over_the_shared_vocabulary(world, mesh, live, tmp_path):
    method = world.method("top_k", temperature=2.0)
    fingerprint = fingerprint_of(method, world.teacher, 5)
    stored = fill(tmp_path, fingerprint, world.teacher, [world.data], mesh, BATCH)
    head = world.teacher.params["embed"]["embedding"].T
    for n, sequences in enumerate(world.data.sequences):
        scores = live[n][4].astype(np.float64) @ head[:, : world.builder.shared_vocab] / 2.0
        probabilities = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        order = np.argsort(-probabilities, axis=-1)
        found, count = stored(sequences, 8), len(sequences.response)
        np.testing.assert_array_equal(found["teacher_top_ids"][:count], order[:, :5])
        kept = np.take_along_axis(probabilities, order, -1)
        np.testing.assert_allclose(
            np.exp(found["teacher_top_log_probs"][:count]), kept[:, :5], rtol=1e-5
        )
        np.testing.assert_allclose(
            np.exp(found["teacher_top_rest"][:count]), kept[:, 5:].sum(-1), rtol=1e-5
        )


# --- the same losses -----------------------------------------------------------------------------


def terms(world, batch, form, **loss):
    """Means of all terms of a batch, away from the start."""
    method = world.method(form, **loss)
    params = tiny.moved(method.initial_params(jax.random.key(0)))
    keys = jax.random.split(jax.random.key(0), BATCH)

    def run(batch):
        return method.encode(params, method.frozen, method.weigh(batch), keys, True).metrics

    found = jax.device_get(quick_jit(run)(batch))
    return {name: float(found[name].mean()) for name in TERMS}


@pytest.fixture(scope="module")
def batches(world, passes):
    """The same examples, for each form."""
    first = {"live": world.batch(BATCH)}
    return first | {form: next(world.batches(BATCH, stored)) for form, stored in passes.items()}


def test_batches_hold_what_their_list_says(batches):
    for form, batch in batches.items():
        assert mismatches(batch, StoredTeacherBatch) == [], form
    assert {*NAMES.values()} <= {*get_type_hints(StoredTeacherBatch)}
    assert "teacher_last" in batches["last"] and "teacher_top_ids" in batches["top_k"]


@pytest.fixture(scope="module")
def live_terms(world, batches):
    return terms(world, batches["live"], "live")


def test_losses_of_stored_states_are_those_of_live_ones(world, batches, live_terms):
    """Only what the teacher's states enter moves, by no more than they were rounded (2^-8)."""
    found = terms(world, batches["last"], "last")
    for name in ("cross_entropy", "accuracy", "acoustic"):
        assert found[name] == pytest.approx(live_terms[name], rel=1e-6)
    for name in ("top", "layers"):
        assert live_terms[name] > 0.05
        assert found[name] == pytest.approx(live_terms[name], rel=2.0**-8)


def test_nothing_but_the_rounding_differs(world, batches, live):
    """Live states, rounded here, give the losses of the stored ones."""
    rounded = {name: array.copy() for name, array in batches["last"].items()}
    for row, index in enumerate(batches["last"]["index"]):
        for name, layer in (("teacher_layers", 1), ("teacher_last", 4)):
            states = live[index][layer].astype(BF16)
            place = rounded[name][row, 0] if name == "teacher_layers" else rounded[name][row]
            place[: len(states)] = states
    found, expected = (terms(world, batch, "last") for batch in (batches["last"], rounded))
    for name in TERMS:
        assert found[name] == pytest.approx(expected[name], rel=1e-5)


def test_all_shared_tokens_give_the_live_divergence(world, batches, live_terms):
    """The log-probabilities are stored in float32: nothing is rounded here."""
    found = terms(world, batches["top_k"], "top_k")
    for name in ("cross_entropy", "accuracy", "acoustic", "top"):
        assert found[name] == pytest.approx(live_terms[name], rel=1e-5)
    assert found["layers"] == pytest.approx(live_terms["layers"], rel=2.0**-8)


def test_few_tokens_give_a_lower_bound(world, mesh, live_terms, tmp_path):
    fingerprint = fingerprint_of(world.method("top_k"), world.teacher, 4)
    stored = fill(tmp_path, fingerprint, world.teacher, [world.data], mesh, BATCH)
    found = terms(world, next(world.batches(BATCH, stored)), "top_k")
    assert 0.5 * live_terms["top"] < found["top"] < live_terms["top"] - 1e-4


def test_a_teacher_in_bfloat16_loses_nothing_more(world, mesh, tmp_path):
    """Its states are bfloat16 already; the projection's product runs in bfloat16 in both."""
    half = replace(world.teacher, module=world.teacher.module.clone(dtype=jnp.bfloat16))
    other = tiny.World(world.student, half, world.builder, world.data)
    fingerprint = fingerprint_of(other.method("last"), half, 0)
    assert fingerprint.dtype == "bfloat16"
    stored = fill(tmp_path, fingerprint, half, [other.data], mesh, BATCH)
    found = terms(other, next(other.batches(BATCH, stored)), "last")
    expected = terms(other, other.batch(BATCH), "live")
    for name in TERMS:
        assert found[name] == pytest.approx(expected[name], rel=1e-4)


# --- the pass ------------------------------------------------------------------------------------


def test_every_example_is_computed_once(world, mesh, tmp_path, monkeypatch):
    """A pass that broke off goes on behind its last batch; a whole one is not repeated."""
    fingerprint = fingerprint_of(world.method("last"), world.teacher, 0)
    seen, make = [], distill_cache._make_pass

    def counted(*arguments):
        run = make(*arguments)

        def counts(params, batch):
            if len(seen) == 2:
                raise RuntimeError("the power failed")
            seen.append(len(np.unique(np.asarray(batch["teacher_ids"]), axis=0)))
            return run(params, batch)

        return counts

    monkeypatch.setattr(distill_cache, "_make_pass", counted)
    with pytest.raises(RuntimeError, match="power"):
        fill(tmp_path, fingerprint, world.teacher, [world.data], mesh, 2)
    assert seen == [2, 2]
    seen.clear()
    stored = fill(tmp_path, fingerprint, world.teacher, [world.data], mesh, 2)
    assert seen == [2] and len(stored.cache) == COUNT
    seen.clear()
    # The same questions for validation as well.
    fill(tmp_path, fingerprint, world.teacher, [world.data, world.data], mesh, 2)
    assert seen == []


def test_the_last_batch_is_filled_up_and_rows_are_not_mixed_up(world, mesh, passes, tmp_path):
    fingerprint = fingerprint_of(world.method("last"), world.teacher, 0)
    one = fill(tmp_path, fingerprint, world.teacher, [world.data], mesh, 5)
    for sequences in world.data.sequences:
        for name, array in one(sequences, 8).items():
            other = passes["last"](sequences, 8)[name]
            np.testing.assert_allclose(
                array.astype(np.float32), other.astype(np.float32), rtol=2.0**-7, atol=1e-5
            )


def test_another_teachers_cache_is_refused_with_what_differs(world, mesh, passes):
    folder, method = passes["last"].cache.folder, world.method("last")
    other = replace(world.teacher, identity="another")
    with pytest.raises(StateCacheError, match="teacher is 'random 1' there and 'another' now"):
        fill(folder, fingerprint_of(method, other, 0), other, [world.data], mesh, BATCH)
    more = fingerprint_of(world.method("last", every=1), world.teacher, 0)
    with pytest.raises(StateCacheError, match=r"layers is \[1\] there and \[1, 3\] now"):
        fill(folder, more, world.teacher, [world.data], mesh, BATCH)


def test_a_teacher_that_nobody_knows_is_refused(world):
    with pytest.raises(UserError, match="known hash"):
        fingerprint_of(world.method("last"), replace(world.teacher, identity=""), 0)
    with pytest.raises(UserError, match="top_k 50 of a vocabulary of 2"):
        fingerprint_of(world.method("top_k"), world.teacher, 50)


def test_a_sequence_longer_than_the_teachers_window_is_refused(world, mesh, tmp_path):
    config = replace(world.teacher.module.config, max_positions=16)
    short = replace(world.teacher, module=world.teacher.module.clone(config=config))
    fingerprint = fingerprint_of(world.method("last"), short, 0)
    with pytest.raises(UserError, match="tokens, and the teacher 16 positions"):
        fill(tmp_path, fingerprint, short, [world.data], mesh, BATCH)


def test_arms_that_need_other_states_have_other_folders(world):
    names = [
        folder_name(fingerprint_of(world.method(form, **loss), world.teacher, 4))
        for form, loss in (
            ("last", {}), ("last", {"every": 1}), ("last", {"layers_weight": 0.0}), ("top_k", {}),
            ("top_k", {"temperature": 0.5}),
        )
    ]  # fmt: skip
    assert names == [
        "last_layers_01", "last_layers_01_03", "last", "top_k_4_t1_layers_01_04",
        "top_k_4_t0.5_layers_01_04",
    ]  # fmt: skip


# --- in a batch ----------------------------------------------------------------------------------


def test_rows_that_fill_up_are_zeros(world, passes):
    for stored in passes.values():
        last = list(world.batches(BATCH, stored))[-1]
        empty = last["index"] < 0
        assert empty.tolist() == [False, False, True, True]
        for name in last.keys() - world.batch(BATCH).keys():
            assert not last[name][empty].any() and last[name][~empty].any(), name


def test_readers_in_other_processes_get_it_by_pickling(world, passes):
    again = pickle.loads(pickle.dumps(passes["last"]))
    for batch, other in zip(
        world.batches(BATCH, again), world.batches(BATCH, passes["last"]), strict=True
    ):
        for name, array in batch.items():
            np.testing.assert_array_equal(array, other[name], err_msg=name)


def test_no_layers_need_no_array(world, mesh, tmp_path):
    method = world.method("last", layers_weight=0.0)
    stored = fill(
        tmp_path, fingerprint_of(method, world.teacher, 0), world.teacher, [world.data], mesh, BATCH
    )
    assert set(stored(world.data.sequences[0], 8)) == {"teacher_last"}
    found = terms_of_top(world, next(world.batches(BATCH, stored)), method)
    assert found > 0.05


def terms_of_top(world, batch, method):
    shapes = jax.eval_shape(method.init, jax.random.key(0))
    assert set(shapes) == {"student"}
    params = method.initial_params(jax.random.key(0))
    keys = jax.random.split(jax.random.key(0), BATCH)
    encoded = quick_jit(
        lambda batch: method.encode(params, method.frozen, method.weigh(batch), keys, True).metrics
    )(batch)
    return float(encoded["top"].mean())


def test_an_example_that_the_teacher_has_not_seen(world, passes, tmp_path):
    more = tiny.world(tmp_path, COUNT + 1)
    with pytest.raises(StateCacheError, match="let the teacher run over the data again"):
        list(more.batches(BATCH, passes["last"]))


def test_extras_may_not_take_a_name(world):
    with pytest.raises(PipelineError, match="extras may not name an array index, waveform"):
        next(world.batches(BATCH, lambda *_: {"waveform": np.zeros(3), "index": np.zeros(3)}))


def test_the_config_asks_for_a_form():
    config = get_config()
    assert teacher_form(config) == "live"
    config.teacher.mode = "cached"
    assert teacher_form(config) == "last"
    config.teacher.form = "all"
    with pytest.raises(UserError, match=r"teacher\.form 'all' is not one of last, top_k"):
        teacher_form(config)
    config.teacher.mode = "saved"
    with pytest.raises(UserError, match=r"teacher\.mode 'saved' is not one of live, cached"):
        teacher_form(config)
