"""The projections of attention's readers with the norm before them folded in.

A reader then needs of its stream one matrix product and the norm's scale; the normed stream is never written.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mi_jax.models.block import Block
from mi_jax.models.norm import Norm, widened


class Folded(NamedTuple):
    """What the readers of every layer project with: queries, keys, values, and zeros for the MLP.

    A reader of the stream x computes `scale · (x @ w − mean(x) · total) + bias`, the scale being the norm's.

    Attributes:
      norm: of all layers, for its scale.
    """

    w: Float[Array, "layer reader d_model d_head"]
    total: Float[Array, "layer reader d_head"]
    bias: Float[Array, "layer reader d_head"]
    norm: Norm | None

    def project(
        self,
        reads: Float[Array, "some batch pos d_model"],
        number: Int[Array, ""] | int,
        readers: slice | Int[Array, " some"] = slice(None),
    ) -> Float[Array, "some batch pos d_head"]:
        """What these readers of a layer project, each of its own stream."""
        w, total, bias = (a[number][readers] for a in (self.w, self.total, self.bias))
        norm = self.norm
        if norm is not None and norm.weight is not None and jnp.finfo(reads.dtype).bits < 32:
            # before the product, which could leave the range of the dtype
            exact = widened(reads)
            exact = exact if norm.bias is None else exact - exact.mean(-1, keepdims=True)
            reads = (exact * norm.scale(exact)).astype(reads.dtype)
            return jnp.einsum("nbpd,ndh->nbph", reads, w) + bias[:, None, None, :]
        out = jnp.einsum("nbpd,ndh->nbph", reads, w)
        if norm is None or norm.weight is None:
            return out
        exact = widened(reads)
        if norm.bias is not None:
            mean = exact.mean(-1, keepdims=True)
            out = out - mean.astype(out.dtype) * total[:, None, None, :]
            exact = exact - mean
        return out * norm.scale(exact).astype(out.dtype) + bias[:, None, None, :]


def folded(blocks: Block, *, has_mlp: bool) -> Folded:
    """The folded projections of all layers."""

    def of_layer(row) -> tuple[Array, Array, Array]:
        attn, norm = row
        parts = [attn.q, attn.k, attn.v]
        if has_mlp:
            parts.append(jnp.zeros((attn.q.shape[0], 1, attn.q.shape[2]), attn.q.dtype))

        w = jnp.concatenate([jnp.moveaxis(part, 1, 0) for part in parts])
        total = bias = jnp.zeros((w.shape[0], w.shape[2]), w.dtype)
        if norm is None or norm.weight is None:
            return w, total, bias
        gain = (norm.weight + norm.offset).astype(w.dtype)
        if norm.bias is not None:
            # of each part as it lies, which is not copied for it
            both = jnp.stack([gain, norm.bias.astype(w.dtype)])
            sums = [(both @ part.reshape(part.shape[0], -1)).reshape(2, *part.shape[1:]) for part in parts]
            total, bias = jnp.concatenate(sums, 1)
        return w * gain[None, :, None], total, bias

    # by layers, each of which stays in cache between the passes over it
    w, total, bias = jax.lax.map(of_layer, (blocks.attn, blocks.attn_norm))
    return Folded(w, total, bias, blocks.attn_norm)
