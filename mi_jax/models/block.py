"""One layer of the decoder as functions of its parameters and a tap.

The stream is `x [batch pos d_model]`. A tap is called at every site, `x = tap("resid_pre", x)`. Sites that cost memory
(a copy of the stream per reader, the output per head) exist only where the tap touches them.
"""

from typing import Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mi_jax.models.config import DecoderConfig

_ACTIVATIONS = {"silu": jax.nn.silu, "gelu": jax.nn.gelu, "relu": jax.nn.relu}


@runtime_checkable
class SiteTap(Protocol):
    """What a layer calls at every site; see `mi_jax.core.taps.Tap`."""

    def touches(self, name: str) -> bool: ...
    def __call__(self, name: str, x: Array) -> Array: ...


class Norm(eqx.Module):
    """RMSNorm or LayerNorm over the last axis; `weight` None leaves the input as it is."""

    weight: Float[Array, "*layer d_model"] | None
    bias: Float[Array, "*layer d_model"] | None
    eps: float = eqx.field(static=True)

    def __call__(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch d_model"]:
        if self.weight is None:
            return x
        if self.bias is not None:
            x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps)
        x = x * jnp.broadcast_to(self.weight, x.shape)
        return x if self.bias is None else x + jnp.broadcast_to(self.bias, x.shape)


class Attention(eqx.Module):
    """Projections of every head; grouped key/value heads are shared by consecutive query heads."""

    q: Float[Array, "*layer d_model head d_head"]
    k: Float[Array, "*layer d_model kv_head d_head"]
    v: Float[Array, "*layer d_model kv_head d_head"]
    o: Float[Array, "*layer head d_head d_model"]


class MLP(eqx.Module):
    """Linear maps of the MLP; `gate` is None where it is not gated."""

    gate: Float[Array, "*layer d_model d_mlp"] | None
    up: Float[Array, "*layer d_model d_mlp"]
    down: Float[Array, "*layer d_mlp d_model"]


class Block(eqx.Module):
    """Parameters of one layer, or of all of them with a leading `layer` axis."""

    attn_norm: Norm
    attn: Attention
    mlp_norm: Norm | None
    mlp: MLP | None


@runtime_checkable
class Layout(Protocol):
    """Which tokens the pos axis of the stream holds, and how attention sees them.

    Attention works on rows, one prompt each: `rows` makes them of the stream's tokens, `flat` is the way back.
    """

    @property
    def positions(self) -> Int[Array, " pos"]: ...
    @property
    def mask(self) -> Bool[Array, "row key"]: ...
    def rows(self, name: str, x: Array) -> Array: ...
    def flat(self, x: Array) -> Array: ...


class Prompts(eqx.Module):
    """The layout of whole prompts: the rows are the batch."""

    mask: Bool[Array, "batch pos"]

    @property
    def positions(self) -> Int[Array, " pos"]:
        return jnp.arange(self.mask.shape[1], dtype=jnp.int32)

    def rows(self, name: str, x: Array) -> Array:
        return x

    def flat(self, x: Array) -> Array:
        return x


def rotate(
    x: Float[Array, "batch pos n d_head"], theta: float, positions: Int[Array, " pos"]
) -> Float[Array, "batch pos n d_head"]:
    """Rotary positions, half-split: component i turns with component i + d_head/2 by pos · theta^(−2i/d_head)."""
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions.astype(jnp.float32)[:, None] * frequency[None, :]
    shape = (1, x.shape[1], 1, half)
    cos, sin = (f(angle).astype(x.dtype).reshape(shape) for f in (jnp.cos, jnp.sin))
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def _read(
    tap: SiteTap, name: str, x: Array, norm: Norm, w: Float[Array, "d_model n d_head"]
) -> Float[Array, "batch pos n d_head"]:
    """Projects the stream for n readers; each reads its own copy where the tap touches the readers' inputs."""
    if tap.touches(name):
        copies = jnp.broadcast_to(x[:, :, None, :], (*x.shape[:2], w.shape[1], x.shape[2]))
        return jnp.einsum("bpnd,dnh->bpnh", norm(tap(name, copies)), w)
    return jnp.einsum("bpd,dnh->bpnh", norm(x), w)


def attention(
    p: Block, x: Float[Array, "batch pos d_model"], tap: SiteTap, config: DecoderConfig, layout: Layout
) -> Float[Array, "batch pos d_model"]:
    """What causal attention adds to the stream."""
    q = _read(tap, "attn.q_in", x, p.attn_norm, p.attn.q)
    k = _read(tap, "attn.k_in", x, p.attn_norm, p.attn.k)
    v = _read(tap, "attn.v_in", x, p.attn_norm, p.attn.v)
    if config.positions == "rotary":
        q, k = (rotate(each, config.rope_theta, layout.positions) for each in (q, k))
    q = layout.rows("attn.q", tap("attn.q", q))
    k = layout.rows("attn.k", tap("attn.k", k))
    v = layout.rows("attn.v", tap("attn.v", v))

    batch, n_pos, group = *q.shape[:2], config.n_heads // config.n_kv_heads
    q = q.reshape(batch, n_pos, config.n_kv_heads, group, config.d_head)
    scores = jnp.einsum("bqkgh,bpkh->bkgqp", q, k) * config.d_head**-0.5
    allowed = jnp.tril(jnp.ones((n_pos, n_pos), bool))[None, :, :] & layout.mask[:, None, :]
    scores = jnp.where(allowed[:, None, None, :, :], scores, jnp.finfo(scores.dtype).min)
    by_head = (batch, config.n_heads, n_pos, n_pos)
    scores = tap("attn.scores", scores.reshape(by_head))
    pattern = tap("attn.pattern", jax.nn.softmax(scores, -1)).reshape(batch, config.n_kv_heads, group, n_pos, n_pos)
    z = jnp.einsum("bkgqp,bpkh->bqkgh", pattern, v).reshape(batch, n_pos, config.n_heads, config.d_head)
    z = tap("attn.z", layout.flat(z))
    if tap.touches("attn.head_out"):
        out = tap("attn.head_out", jnp.einsum("bpnh,nhd->bpnd", z, p.attn.o)).sum(2)
    else:
        out = jnp.einsum("bpnh,nhd->bpd", z, p.attn.o)
    return tap("attn_out", out)


def mlp(
    p: Block, x: Float[Array, "batch pos d_model"], tap: SiteTap, config: DecoderConfig
) -> Float[Array, "batch pos d_model"]:
    """What the MLP adds to the stream."""
    assert p.mlp is not None
    assert p.mlp_norm is not None
    h = p.mlp_norm(tap("mlp.in", x))
    act = _ACTIVATIONS[config.activation]
    if p.mlp.gate is None:
        post = act(tap("mlp.pre", h @ p.mlp.up))
    else:
        post = act(tap("mlp.pre", h @ p.mlp.gate)) * (h @ p.mlp.up)
    return tap("mlp_out", tap("mlp.post", post) @ p.mlp.down)


def block(
    p: Block, x: Float[Array, "batch pos d_model"], tap: SiteTap, config: DecoderConfig, layout: Layout
) -> Float[Array, "batch pos d_model"]:
    """One layer: the stream after it."""
    x = tap("resid_pre", x)
    x = tap("resid_mid", x + attention(p, x, tap, config, layout))
    if config.d_mlp:
        x = x + mlp(p, x, tap, config)
    return tap("resid_post", x)
