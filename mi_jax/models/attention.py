"""Attention of one layer: grouped heads, rotary positions, windows, norms of queries and keys."""

from typing import Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mi_jax.core.precision import widened
from mi_jax.models.config import DecoderConfig
from mi_jax.models.layout import Layout
from mi_jax.models.norm import Norm, normed
from mi_jax.models.rotary import Rotation, rotate


@runtime_checkable
class SiteTap(Protocol):
    """What a layer calls at every site; see `mi_jax.core.taps.Tap`."""

    def touches(self, name: str) -> bool: ...
    def __call__(self, name: str, x: Array) -> Array: ...


@runtime_checkable
class ProjectingTap(SiteTap, Protocol):
    """A tap that projects the readers' copies of the stream itself, instead of being called with all of them."""

    def project(
        self, name: str, x: Float[Array, "batch pos d_model"], norm: Norm | None, w: Float[Array, "d_model n d_head"]
    ) -> Float[Array, "batch pos n d_head"]: ...


class Attention(eqx.Module):
    """Projections of every head; grouped key/value heads are shared by consecutive query heads."""

    q: Float[Array, "*layer d_model head d_head"]
    k: Float[Array, "*layer d_model kv_head d_head"]
    v: Float[Array, "*layer d_model kv_head d_head"]
    o: Float[Array, "*layer head d_head d_model"]
    q_bias: Float[Array, "*layer head d_head"] | None = None
    k_bias: Float[Array, "*layer kv_head d_head"] | None = None
    v_bias: Float[Array, "*layer kv_head d_head"] | None = None
    o_bias: Float[Array, "*layer d_model"] | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None


def attention(
    p: Attention,
    norm: Norm | None,
    x: Float[Array, "batch pos d_model"],
    tap: SiteTap,
    config: DecoderConfig,
    layout: Layout,
    turn: Rotation | None,
    window: Int[Array, ""] | None,
) -> Float[Array, "batch query d_model"]:
    """What the heads add up to, bias included, at the tokens that ask.

    Args:
      norm: through which the stream is read.
      window: how many positions back a query sees, itself included; 0 for all.
    """
    q = _read(tap, "attn.q_in", layout.asking(x), norm, p.q, p.q_bias)
    k = _read(tap, "attn.k_in", x, norm, p.k, p.k_bias)
    v = _read(tap, "attn.v_in", x, norm, p.v, p.v_bias)
    q, k = _normed_heads(p.q_norm, q), _normed_heads(p.k_norm, k)
    if turn is not None:
        q = rotate(q, turn, layout.asking_positions, adjacent=config.rope_adjacent)
        k = rotate(k, turn, layout.positions, adjacent=config.rope_adjacent)
    q = layout.rows("attn.q", tap("attn.q", q))
    k = layout.rows("attn.k", tap("attn.k", k))
    v = layout.rows("attn.v", tap("attn.v", v))

    batch, n_queries, group = *q.shape[:2], config.n_heads // config.n_kv_heads
    q = q.reshape(batch, n_queries, config.n_kv_heads, group, config.d_head)
    scores = jnp.einsum("bqkgh,bpkh->bkgqp", q, k) * config.score_scale
    if config.score_softcap:
        scores = config.score_softcap * jnp.tanh(scores / config.score_softcap)
    allowed = _allowed(layout, config.causal, window)
    scores = jnp.where(allowed[:, None, None, :, :], scores, jnp.finfo(scores.dtype).min)
    scores = tap("attn.scores", scores.reshape(batch, config.n_heads, n_queries, -1))
    pattern = tap("attn.pattern", jax.nn.softmax(widened(scores), -1).astype(scores.dtype))
    pattern = pattern.reshape(batch, config.n_kv_heads, group, n_queries, -1)
    z = jnp.einsum("bkgqp,bpkh->bqkgh", pattern, v).reshape(batch, n_queries, config.n_heads, config.d_head)
    z = tap("attn.z", layout.flat(z))
    if tap.touches("attn.head_out"):
        out = tap("attn.head_out", jnp.einsum("bpnh,nhd->bpnd", z, p.o)).sum(2)
    else:
        # as one matrix: contracted over two axes, the weights would be transposed anew in every layer
        out = z.reshape(*z.shape[:2], -1) @ p.o.reshape(-1, p.o.shape[-1])
    return out if p.o_bias is None else out + p.o_bias[None, None, :]


def _read(
    tap: SiteTap,
    name: str,
    x: Array,
    norm: Norm | None,
    w: Float[Array, "d_model n d_head"],
    bias: Float[Array, "n d_head"] | None,
) -> Float[Array, "batch pos n d_head"]:
    """Projects the stream for n readers; each reads its own copy where the tap touches the readers' inputs."""
    if not tap.touches(name):
        out = read_together(x, norm, w)
    elif isinstance(tap, ProjectingTap):
        out = tap.project(name, x, norm, w)
    else:
        copies = jnp.broadcast_to(x[:, :, None, :], (*x.shape[:2], w.shape[1], x.shape[2]))
        out = projected(jnp.moveaxis(tap(name, copies), 2, 0), norm, w)
    return out if bias is None else out + bias[None, None, :, :]


def read_together(
    x: Float[Array, "batch pos d_model"], norm: Norm | None, w: Float[Array, "d_model n d_head"]
) -> Float[Array, "batch pos n d_head"]:
    """One stream, which all readers have in common, through the norm and their matrices."""
    return jnp.einsum("bpd,dnh->bpnh", normed(norm, x), w)


def projected(
    streams: Float[Array, "n batch pos d_model"], norm: Norm | None, w: Float[Array, "d_model n d_head"]
) -> Float[Array, "batch pos n d_head"]:
    """Every reader's own stream through the norm and its matrix."""
    # one matrix product per reader; with the readers inside, XLA would transpose their streams
    return jnp.moveaxis(jnp.einsum("nbpd,ndh->nbph", normed(norm, streams), jnp.moveaxis(w, 1, 0)), 0, 2)


def _normed_heads(norm: Norm | None, x: Float[Array, "batch pos n d_head"]) -> Float[Array, "batch pos n d_head"]:
    """Over each head, or over all heads together where the weight says so."""
    if norm is None or norm.weight is None or norm.weight.ndim == 1:
        return normed(norm, x)
    whole = Norm(norm.weight.reshape(-1), None, norm.eps, norm.offset)
    return whole(x.reshape(*x.shape[:2], -1)).reshape(x.shape)


def _allowed(layout: Layout, causal: bool, window: Int[Array, ""] | None) -> Bool[Array, "row query key"]:
    allowed = layout.mask[:, None, :]
    if not causal:
        return allowed
    back = layout.queries[:, :, None] - layout.keys[:, None, :]
    allowed = allowed & (back >= 0)
    return allowed if window is None else allowed & ((back < window) | (window == 0))
