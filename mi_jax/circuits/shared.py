"""What the runs of all circuits of a model on some prompts have in common, computed once (`mi_jax.circuits.kept`)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mi_jax.circuits.graph import Graph
from mi_jax.circuits.sources import embedded
from mi_jax.models.block import Block
from mi_jax.models.decoder import Decoder
from mi_jax.models.norm import Norm


class Folded(NamedTuple):
    """What the readers of every layer project with, norm included: queries, keys, values, and zeros for the MLP.

    A reader of the stream x computes `scale · (x @ w − mean(x) · total) + bias`, the scale being the norm's.
    """

    w: Float[Array, "layer reader d_model d_head"]
    total: Float[Array, "layer reader d_head"]
    bias: Float[Array, "layer reader d_head"]


class Shared(NamedTuple):
    """What the runs of all circuits have in common.

    Attributes:
      patch: what ablated sources write.
      source: what the input writes in the clean run.
      before: the stream of the patch before every layer, and after the last.
      middle: the same where the MLP reads.
      projections: of the readers.
    """

    patch: Float[Array, "source batch pos d_model"]
    source: Float[Array, "batch pos d_model"]
    before: Float[Array, "stream batch pos d_model"]
    middle: Float[Array, "layer batch pos d_model"]
    projections: Folded


def has_constant_rest(model: Decoder) -> bool:
    """Whether what no source writes (biases) is the same in every run: not where a norm follows a bias."""
    return model.blocks.attn.o_bias is None or _weight(model.blocks.attn_post_norm) is None


def shared(model: Decoder, tokens: Int[Array, "batch pos"], patch: Float[Array, "source batch pos d_model"]) -> Shared:
    """Computes it, of a model that `has_constant_rest`."""
    graph, blocks = Graph.of(model.config), model.blocks
    rest = blocks.attn.o_bias if _weight(blocks.attn_post_norm) is None else _bias(blocks.attn_post_norm)
    later = _bias(blocks.mlp_post_norm) if graph.n_experts else None
    # when each is added to the stream: at 2 · layer, the MLP at 2 · layer + 1
    moments = np.arange(graph.n_layers, dtype=np.int32)[:, None] * 2
    of_source = np.r_[-1, (moments + np.r_[[0] * graph.n_heads, [1] * graph.mlp_sources][None, :]).reshape(-1)]

    def stream(until: np.ndarray) -> Array:
        # a running sum, as a product: XLA's own is slow on a CPU
        total = jnp.einsum("is,sbpd->ibpd", jnp.asarray(of_source[None, :] < until[:, None], patch.dtype), patch)
        for bias, moment in ((rest, moments[:, 0]), (later, moments[:, 0] + 1)):
            if bias is not None:
                added = jnp.asarray(moment[None, :] < until[:, None], patch.dtype)
                total = total + (added @ bias.astype(patch.dtype))[:, None, None, :]
        return total

    before = stream(np.arange(graph.n_layers + 1) * 2)
    middle = before[:-1] if graph.parallel else stream(moments[:, 0] + 1)
    return Shared(patch, embedded(model, tokens), before, middle, _folded(blocks, has_mlp=graph.has_mlp))


def _folded(blocks: Block, *, has_mlp: bool) -> Folded:
    def of_layer(row) -> Folded:
        attn, norm = row
        parts = [attn.q, attn.k, attn.v]
        if has_mlp:
            parts.append(jnp.zeros((attn.q.shape[0], 1, attn.q.shape[2]), attn.q.dtype))
        w = jnp.concatenate([jnp.moveaxis(part, 1, 0) for part in parts])
        total = bias = jnp.zeros((w.shape[0], w.shape[2]), w.dtype)
        if norm is None or norm.weight is None:
            return Folded(w, total, bias)
        gain = (norm.weight + norm.offset).astype(w.dtype)
        if norm.bias is not None:
            total, bias = (jnp.einsum("d,ndh->nh", v.astype(w.dtype), w) for v in (gain, norm.bias))
        return Folded(w * gain[None, :, None], total, bias)

    # by layers, each of which stays in cache between the passes over it
    return jax.lax.map(of_layer, (blocks.attn, blocks.attn_norm))


def _weight(norm: Norm | None) -> Array | None:
    return None if norm is None else norm.weight


def _bias(norm: Norm | None) -> Array | None:
    return None if norm is None else norm.bias
