"""Source- and layer-wise distillation of an audio language model (arXiv 2509.18579).

audio, question, response -> student -----------+-> hidden states at chosen layers, last one
       |                                        |        |                  |
       +-> snapshot of the student (frozen) ----|--> L_ac at audio tokens   |
                                                |                           |
description, question, response -> text teacher +--> L_txt at response tokens, layer by layer
                                                +--> L_SFT: cross-entropy of the response

loss = text_weight * L_txt + acoustic_weight * L_ac + sft_weight * L_SFT

L_txt is the divergence of the two next-token distributions plus `layers_weight` times the mean
over the layer pairs of the divergence of their hidden states. Every term is a mean over its tokens
in the whole batch, whatever parts the batch is computed in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from medalign_jax import losses
from medalign_jax.core.batches import QuestionBatch
from medalign_jax.core.errors import UserError
from medalign_jax.methods.base import Encoded, Method, Tree
from medalign_jax.methods.distill_config import DistillConfig
from medalign_jax.methods.text_teacher import TeacherOutputs, TextTeacher, at_positions
from medalign_jax.models.audio_lm import AudioLM
from medalign_jax.models.initial import initial_params
from medalign_jax.models.language.decoder_head import DecoderHead, head_params
from medalign_jax.models.layers.lora import (
    LoraConfig,
    as_variables,
    init_lora,
    lora_sharding,
    merge,
)


@dataclass(frozen=True)
class Student:
    """The audio language model that learns.

    Attributes:
      model: Linen module.
      front_end: waveforms (N, S) -> features (N, F, M); has `valid_frames`.
      params: its parameters at the start, which the acoustic teacher keeps.
      sharding: table of its parameters.
      lora: None to train all parameters; else these alone learn, beside the frozen ones.
    """

    model: AudioLM
    front_end: Callable[[jax.Array], jax.Array]
    params: Tree
    sharding: tuple
    lora: LoraConfig | None = None


@dataclass(frozen=True)
class _Sums:
    """Sums over each example's tokens, (B,) each, by term."""

    response: dict[str, jax.Array] = field(default_factory=dict)
    audio: dict[str, jax.Array] = field(default_factory=dict)
    # Carries the gradient of the next-token terms, whose sums have none; see `_next_tokens`.
    next_tokens: jax.Array | None = None


class Distill(Method):
    """`batch`: as `data.questions.batches` makes it. Opens nothing.

    Parameters: {"student": ...} (without a tower that does not learn) or {"lora": ...}, and
    {"projections": ...} where layers are paired.
    Frozen: {"student"} with LoRA, {"snapshot"} without, {"teacher"}: what the terms need of them.

    Attributes:
      pairs: (student layer, teacher layer) of the textual teacher.
      acoustic_layers: layers that are compared with the snapshot's.
    """

    select = ("valid/loss", "min")

    def __init__(self, student: Student, config: DistillConfig, teacher: TextTeacher | None = None):
        if config.text_weight and teacher is None:
            raise UserError("loss.text_weight needs a textual teacher; set it to 0 for none")
        self.student, self.config = student, config
        self.teacher = teacher if config.text_weight else None
        depth = student.model.config.text.depth
        self.pairs: tuple[tuple[int, int], ...] = ()
        if config.layered:
            self.pairs = losses.layer_pairs(depth, teacher.depth, config.every)
        self.acoustic_layers = tuple(
            layer for layer, _ in losses.layer_pairs(depth, depth, config.every)
        )
        self.divergence = losses.Divergence(config.divergence, config.beta, config.temperature)
        self.frozen = self._frozen()
        self.sharding_rules, self.frozen_rules = self._rules()

    @property
    def teacher_layers(self) -> tuple[int, ...]:
        """The teacher's side of the pairs, ascending, each once."""
        return tuple(sorted({layer for _, layer in self.pairs}))

    def _frozen(self) -> Tree:
        lora, top = self.student.lora is not None, bool(self.config.top_weight)
        dtype = self.student.model.dtype
        trees = {
            "student": _in_dtype(self.student.params, dtype) if lora else {},
            "snapshot": {} if lora else _in_dtype(self._snapshot(), dtype),
            "teacher": self.teacher.needed_params(self.config.lens, top) if self.teacher else {},
        }
        return {name: tree for name, tree in trees.items() if tree}

    def _snapshot(self) -> Tree:
        """What a step needs of the student as it was, besides its trained parameters."""
        params = self.student.params
        if self.config.acoustic_weight or self.config.monitor_acoustic:
            return params
        kept = {} if self.config.train_audio else {"audio": params["audio"]}
        if self.config.lens:
            kept["text"] = head_params(self.student.model.config.text, params["text"])
        return kept

    def _rules(self) -> tuple[tuple, tuple]:
        base = self.student.sharding
        teacher = () if self.teacher is None else _under("teacher", self.teacher.sharding)
        frozen = (*_under("snapshot", base), *_under("student", base), *teacher)
        projections = (r"projections/.*kernel", ("fsdp", "tensor"))
        if self.student.lora is not None:
            return (projections, *_under("lora", lora_sharding(base))), frozen
        return (projections, *_under("student", base)), frozen

    # --- parameters ----------------------------------------------------------------------------

    def init(self, key: jax.Array) -> Tree:
        """Random parameters of the student as well; a run starts from `initial_params`."""
        student_key, own_key = jax.random.split(key)
        if self.student.lora is not None:
            return self._own(own_key)
        student = initial_params(self.student.model, student_key)
        return self._own(own_key) | {"student": self._learning(student)}

    def initial_params(self, key: jax.Array) -> Tree:
        """The student's loaded parameters, fresh projections and low-rank factors."""
        own = jax.jit(self._own)(jax.random.split(key)[1])
        if self.student.lora is not None:
            return own
        # A copy: the state is donated, and the snapshot and other runs read the original.
        return own | {"student": jax.tree.map(jnp.copy, self._learning(self.student.params))}

    def _own(self, key: jax.Array) -> Tree:
        lora_key, pair_key = jax.random.split(key)
        own = {}
        if self.student.lora is not None:
            own["lora"] = init_lora(lora_key, self.student.params, self.student.lora)
            if "audio" in own["lora"] and not self.config.train_audio:
                raise UserError(
                    "loss.train_audio is False, but lora.modules match kernels of the audio "
                    "tower; let them begin with text/"
                )
        if self.pairs and not self.config.lens:
            widths = self.student.model.config.text.width, self.teacher.model.config.width
            own["projections"] = losses.init_projections(pair_key, self.pairs, *widths)
        return own

    def _learning(self, student: Tree) -> Tree:
        return student if self.config.train_audio else {"text": student["text"]}

    def student_variables(self, params: Tree, frozen: Tree) -> Tree:
        """What the student's module is applied to."""
        if self.student.lora is not None:
            factors = as_variables(params["lora"], self.student.lora)
            return {"params": frozen["student"], "lora": factors}
        if self.config.train_audio:
            return {"params": params["student"]}
        return {"params": params["student"] | {"audio": frozen["snapshot"]["audio"]}}

    def student_params(self, params: Tree) -> Tree:
        """All parameters of the student after training, adapters merged; nothing else."""
        if self.student.lora is not None:
            return merge(self.student.params, params["lora"], self.student.lora)
        return {**self.student.params, **params["student"]}

    # --- loss ----------------------------------------------------------------------------------

    def weigh(self, batch):
        """Adds the share of one response token and of one audio token in the batch's means."""
        rows = batch["index"].shape[0]
        responses = batch["response_mask"].sum()
        audio = self._audio_at(batch).sum()
        return batch | {
            "response_share": jnp.full((rows,), rows / jnp.maximum(responses, 1)),
            "audio_share": jnp.full((rows,), rows / jnp.maximum(audio, 1)),
        }

    def _audio_at(self, batch) -> jax.Array:
        token = self.student.model.config.audio_token
        return (batch["student_ids"] == token) & batch["student_mask"]

    def encode(self, params, frozen, batch: QuestionBatch, keys, train: bool) -> Encoded:
        """In training the weighted error of each example; else sums for `couple` to divide."""
        del keys  # nothing is drawn
        # What is only monitored is not worth a pass of the snapshot in every step.
        acoustic = bool(self.config.acoustic_weight) or (self.config.monitor_acoustic and not train)
        sums = self._sums(params, frozen, batch, acoustic, train)
        if not train:
            counts = {
                "responses": batch["response_mask"].sum(1),
                "audio": self._audio_at(batch).sum(1),
            }
            coupled = {"response": sums.response, "audio": sums.audio, "counts": counts}
            return Encoded(coupled, jnp.zeros(len(batch["index"])), {})
        metrics = {name: x * batch["response_share"] for name, x in sums.response.items()}
        metrics |= {name: x * batch["audio_share"] for name, x in sums.audio.items()}
        moves = losses.gradient_only(sums.next_tokens) / len(batch["index"])
        return Encoded({}, self._total(metrics) + moves, metrics)

    def couple(self, coupled, mask=None):
        """Held-out means over all tokens; in training there is nothing to couple."""
        del mask  # padding rows have no token
        if not coupled:
            return jnp.zeros((), jnp.float32), {}
        counts = {name: jnp.maximum(x.sum(), 1) for name, x in coupled["counts"].items()}
        metrics = {name: x.sum() / counts["responses"] for name, x in coupled["response"].items()}
        metrics |= {name: x.sum() / counts["audio"] for name, x in coupled["audio"].items()}
        return self._total(metrics), metrics

    @property
    def _weights(self) -> dict[str, float]:
        c = self.config
        return {
            "top": c.text_weight * c.top_weight,
            "layers": c.text_weight * c.layers_weight,
            "acoustic": c.acoustic_weight,
            "cross_entropy": c.sft_weight,
        }

    def _total(self, terms: dict[str, jax.Array]) -> jax.Array:
        # In the order of the weights: a sum in the order of a set would differ between processes.
        return sum(weight * terms[name] for name, weight in self._weights.items() if name in terms)

    def _sums(self, params: Tree, frozen: Tree, batch, acoustic: bool, train: bool) -> _Sums:
        model = self.student.model
        variables = self.student_variables(params, frozen)
        inputs = (batch["student_ids"], batch["student_mask"], *self._audio_inputs(batch))
        wanted = {layer for layer, _ in self.pairs}
        wanted |= set(self.acoustic_layers) if acoustic else set()
        last, out = model.apply(variables, *inputs, layers=(*sorted(wanted), -1))
        states, mask = out["hidden_states"], batch["response_mask"]
        teacher = self._teacher_outputs(frozen, batch)
        total, terms = self._next_tokens(variables, frozen, batch, last, teacher.last, train)
        if self.pairs:
            terms["layers"] = self._layers(params, frozen, batch, states, teacher.layers)
        response = {n: losses.masked_sum(x.astype(jnp.float32), mask) for n, x in terms.items()}
        audio_terms = {}
        if acoustic:
            audio_terms["acoustic"] = self._acoustic(frozen, inputs, states, out["audio"])
        return _Sums(response, audio_terms, total)

    def _teacher_outputs(self, frozen: Tree, batch) -> TeacherOutputs:
        if self.teacher is None:
            return TeacherOutputs({}, None)
        top = bool(self.config.top_weight)
        return self.teacher.outputs(frozen.get("teacher"), batch, self.teacher_layers, top)

    def _next_tokens(
        self, variables, frozen, batch, last, teacher_last, train: bool
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Their share of the batch's loss, and (B, R) by term: what it is made of, and accuracy.

        The terms have no gradient: that of the sum is made where the scores are.
        """
        model, teacher = self.student.model, self.teacher
        names = {"cross_entropy": "cross_entropy", "correct": "accuracy", "divergence": "top"}
        weights = {}
        if train:
            share = batch["response_mask"] * batch["response_share"][:, None]
            weighed = (
                ("cross_entropy",) if teacher_last is None else ("cross_entropy", "divergence")
            )
            weights = {name: self._weights[names[name]] * share for name in weighed}
        total, found = losses.next_token_sum(
            at_positions(last, batch["student_at"]),
            teacher_last,
            batch["response_ids"],
            weights,
            student_head=lambda hidden: model.apply(variables, hidden, method="logits"),
            teacher_head=lambda hidden: teacher.scores(frozen["teacher"], hidden),
            divergence=self.divergence,
            shared_vocab=None if teacher is None else teacher.shared_vocab,
            chunk=self.config.chunk,
        )
        return total, {names[name]: value for name, value in found.items()}

    def _audio_inputs(self, batch) -> tuple[jax.Array | None, jax.Array | None]:
        """Features (B, K, F, M) and valid frames (B, K); None where no row has a clip."""
        if "waveform" not in batch:
            return None, None
        waveforms = batch["waveform"]
        rows, clips, samples = waveforms.shape
        features = self.student.front_end(waveforms.reshape(rows * clips, samples))
        lengths = self.student.front_end.valid_frames(batch["samples"])
        return features.reshape(rows, clips, *features.shape[1:]), lengths

    def _acoustic(self, frozen: Tree, inputs, states, audio) -> jax.Array:
        """(B,): divergence from the snapshot, summed over audio tokens, mean over layers."""
        tree, layers = self._start(frozen), self.acoustic_layers
        _, kept = self.student.model.apply({"params": tree}, *inputs, layers=layers)
        before = jax.lax.stop_gradient(kept["hidden_states"])
        kind = self.config.acoustic_hidden
        each = [losses.hidden_divergence(states[i], before[i], kind) for i in layers]
        return losses.masked_sum(sum(each) / len(each), audio)

    def _start(self, frozen: Tree) -> Tree:
        """The student's parameters as they were at the start."""
        return frozen["student"] if self.student.lora is not None else frozen["snapshot"]

    def _layers(self, params, frozen, batch, states, teacher_states) -> jax.Array:
        """(B, R): mean over the pairs of the divergence of their hidden states."""
        student = {own: at_positions(states[own], batch["student_at"]) for own, _ in self.pairs}
        if self.config.lens:
            each = [self._lens(frozen, student, teacher_states, pair) for pair in self.pairs]
        else:
            teacher = losses.project(params["projections"], self.pairs, teacher_states)
            kind = self.config.hidden
            each = [losses.hidden_divergence(student[i], teacher[i], kind) for i, _ in self.pairs]
        return sum(each) / len(each)

    def _lens(self, frozen: Tree, student, teacher_states, pair: tuple[int, int]) -> jax.Array:
        """Divergence of what the frozen heads read in the layers of a pair."""
        (own, theirs), teacher, model = pair, self.teacher, self.student.model
        config, start = model.config.text, self._start(frozen)["text"]
        head = DecoderHead(config, model.dtype, model.param_dtype, model.access)
        last, theirs_last = own == config.depth, theirs == teacher.depth
        return losses.logit_lens_divergence(
            student[own],
            teacher_states[theirs],
            student_head=lambda x: head.apply({"params": start}, x, last, method="lens"),
            teacher_head=lambda x: teacher.scores(frozen["teacher"], x, theirs_last),
            divergence=self.divergence,
            shared_vocab=teacher.shared_vocab,
            chunk=self.config.chunk,
        )


def _in_dtype(tree: Tree, dtype: Any) -> Tree:
    """Arrays or shapes in the type of the computation, in which matrices are used anyway."""

    def cast(leaf):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)
        return leaf.astype(dtype)

    return jax.tree.map(cast, tree)


def _under(name: str, rules: tuple) -> tuple:
    """A sharding table for the subtree `name` of a larger tree."""
    return tuple((rf"^(?=(?:.*/)?{name}/).*(?:{pattern})", spec) for pattern, spec in rules)
