"""Supervised fine-tuning of a text-only language model on responses to textualised questions."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from medalign_jax import losses
from medalign_jax.core.batches import QuestionBatch
from medalign_jax.methods.base import Encoded, Method, Tree
from medalign_jax.models.language.decoder import Decoder


class TextFinetune(Method):
    """Cross-entropy of the response tokens. Parameters: those of the decoder, under "text".

    `batch`: as `data.questions.batches` makes it for a text-only model.
    """

    select = ("valid/cross_entropy", "min")

    def __init__(self, model: Decoder, params: Tree, sharding_rules: tuple, chunk: int = 256):
        self.model, self.params, self.chunk = model, params, chunk
        self.sharding_rules = sharding_rules

    def init(self, key: jax.Array) -> Tree:
        """Random parameters."""
        ids = jnp.zeros((1, 2), jnp.int32)
        return {"text": self.model.init(key, ids, ids == 0)["params"]}

    def initial_params(self, key: jax.Array) -> Tree:
        """The given parameters, copied, since the state is donated."""
        del key
        return {"text": jax.tree.map(jnp.copy, self.params)}

    def weigh(self, batch):
        """Adds the share of one response token in the batch's mean."""
        rows = batch["index"].shape[0]
        share = rows / jnp.maximum(batch["response_mask"].sum(), 1)
        return batch | {"response_share": jnp.full((rows,), share)}

    def encode(self, params, frozen, batch: QuestionBatch, keys, train: bool) -> Encoded:
        """In training each example's share of the mean; else sums for `couple` to divide."""
        del frozen, keys
        variables = {"params": params["text"]}
        hidden, _ = self.model.apply(variables, batch["student_ids"], batch["student_mask"])
        mask, weights = batch["response_mask"], {}
        if train:
            weights = {"cross_entropy": mask * batch["response_share"][:, None]}
        total, found = losses.next_token_sum(
            jnp.take_along_axis(hidden, batch["student_at"][..., None], axis=1),
            None,
            batch["response_ids"],
            weights,
            student_head=lambda x: self.model.apply(variables, x, method="logits"),
            chunk=self.chunk,
        )
        terms = {"cross_entropy": found["cross_entropy"], "accuracy": found["correct"]}
        sums = {n: losses.masked_sum(x.astype(jnp.float32), mask) for n, x in terms.items()}
        if not train:
            return Encoded(sums | {"count": mask.sum(1)}, jnp.zeros(len(mask)), {})
        means = {name: x * batch["response_share"] for name, x in sums.items()}
        moves = losses.gradient_only(total) / len(mask)
        return Encoded({}, means["cross_entropy"] + moves, means)

    def couple(self, coupled, mask=None):
        """Held-out means over all tokens."""
        del mask
        if not coupled:
            return jnp.zeros((), jnp.float32), {}
        count = jnp.maximum(coupled["count"].sum(), 1)
        means = {name: coupled[name].sum() / count for name in ("cross_entropy", "accuracy")}
        return means["cross_entropy"], means
