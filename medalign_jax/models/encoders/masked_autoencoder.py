"""What masked auto-encoders on spectrogram patches share (He et al. 2022, arXiv 2111.06377).

    patches -> the kept ones -> encoder -> mask tokens put between -> decoder -> removed patches

Shapes: B clips, L patch tokens, K kept tokens, N tokens of any kind, W channels.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from medalign_jax.losses.reconstruction import masked_patch_error
from medalign_jax.models.layers.vit_layers import sincos_table

Intermediates = dict[str, jax.Array]


@jax.custom_vjp
def restore_tokens(
    kept: jax.Array, fill: jax.Array, order: jax.Array, place: jax.Array
) -> jax.Array:
    """Puts kept tokens back to their places and `fill` everywhere else.

    Args:
      kept: (B, K, W) in the order of their noise.
      fill: (W,).
      order: (B, L), order[b, r] = place of the token of rank r.
      place: (B, L), the inverse: rank of the token at a place.

    Returns:
      (B, L, W). The gradient is a gather by `order`, where autodiff would write a slow scatter.
    """
    rank = jnp.minimum(place, kept.shape[1] - 1)[..., None]
    return jnp.where(
        (place < kept.shape[1])[..., None], jnp.take_along_axis(kept, rank, axis=1), fill
    )


def _restore_forward(kept, fill, order, place):
    return restore_tokens(kept, fill, order, place), (order, place, kept.shape[1])


def _restore_backward(saved, gradient):
    order, place, count = saved
    to_kept = jnp.take_along_axis(gradient, order[:, :count, None], axis=1)
    to_fill = jnp.sum(jnp.where((place >= count)[..., None], gradient, 0), axis=(0, 1))
    return to_kept, to_fill, None, None


restore_tokens.defvjp(_restore_forward, _restore_backward)


class MaskedAutoencoder(nn.Module):
    """Base of `ViTMAE` and `AudioMAE`, which make the parts in `setup`.

    They set `cls_token`, `pos_embed`, `patch_embed`, `blocks`, `last_norm`; and for the masked pass
    `mask_token`, `decoder_embed`, `decoder_pos_embed`, `decoder_blocks`, `decoder_norm` and
    `decoder_pred`.
    """

    def _table(self, name: str, width: int, grid: tuple[int, int]) -> jax.Array:
        """A fixed position table, stored as a parameter that no gradient reaches."""
        table = self.param(name, lambda _: jnp.asarray(sincos_table(width, grid)))
        return jax.lax.stop_gradient(table)

    def _embed_patches(self, patches: jax.Array) -> tuple[jax.Array, Intermediates]:
        """(B, L, values) to the feature (B, W) float32; the norm comes after the mean."""
        out = {"patch_embed": self.patch_embed(patches)}
        x = out["patch_embed"] + self._positions(self.pos_embed, out["patch_embed"])
        out["tokens"] = self._encode(x, out)[:, 1:]
        out["pooled"] = jnp.mean(out["tokens"].astype(jnp.float32), axis=1)
        return self.last_norm(out["pooled"]).astype(jnp.float32), out

    def _reconstruct_patches(
        self, patches: jax.Array, target: jax.Array, noise: jax.Array, kept: int
    ) -> tuple[jax.Array, Intermediates]:
        """The masked pass.

        Args:
          patches: (B, L, values).
          target: (B, L, values), what is to be predicted.
          noise: (B, L) float, without ties; the `kept` tokens with the least noise are kept.

        Returns:
          (B,) float32, mean squared error over each clip's removed patches, and the intermediates
          that the subclasses name.
        """
        order = jnp.argsort(noise, axis=1)
        place = jnp.argsort(order, axis=1)
        out: Intermediates = {"target": target.astype(jnp.float32), "ids_restore": place}
        out["mask"] = (place >= kept).astype(jnp.float32)

        # Only kept patches are embedded: nothing here needs a gradient before the gather.
        x = self.patch_embed(jnp.take_along_axis(patches, order[:, :kept, None], axis=1))
        x = x + self.pos_embed[0, 1:][order[:, :kept]].astype(x.dtype)
        out["latent"] = self.last_norm(self._encode(x, out))
        out["pred"] = self._decode(out["latent"], order, place, out)
        return masked_patch_error(out["pred"], out["target"], out["mask"]), out

    def _encode(self, x: jax.Array, out: Intermediates) -> jax.Array:
        """Adds the class token and runs the blocks; (B, N, W) to (B, 1 + N, W), before the norm."""
        first = (self.cls_token + self.pos_embed[:, :1]).astype(x.dtype)
        x = jnp.concatenate([jnp.broadcast_to(first, (x.shape[0], 1, x.shape[2])), x], axis=1)
        for i, block in enumerate(self.blocks):
            x = out[f"block{i:02d}"] = block(x)
        return x

    def _decode(
        self, latent: jax.Array, order: jax.Array, place: jax.Array, out: Intermediates
    ) -> jax.Array:
        """(B, 1 + K, W) to predicted patches (B, L, values), float32; drops the class token."""
        x = self.decoder_embed(latent[:, 1:])
        x = restore_tokens(x, self.mask_token[0, 0].astype(x.dtype), order, place)
        x = x + self._positions(self.decoder_pos_embed, x)
        for i, block in enumerate(self.decoder_blocks):
            x = out[f"decoder_block{i:02d}"] = block(x)
        return self.decoder_pred(self.decoder_norm(x)).astype(jnp.float32)

    @staticmethod
    def _positions(table: jax.Array, x: jax.Array) -> jax.Array:
        """The rows of a table for the tokens x; shorter inputs use the first ones."""
        return table[:, 1 : x.shape[1] + 1].astype(x.dtype)
