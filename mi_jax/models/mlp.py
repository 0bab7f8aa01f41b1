"""The MLP of one layer, and the mixture of several."""

import functools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mi_jax.core.precision import widened
from mi_jax.models.attention import SiteTap
from mi_jax.models.config import DecoderConfig
from mi_jax.models.norm import Norm, normed


def _quick_gelu(x: Array) -> Array:
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,
    "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),
    "quick_gelu": _quick_gelu,
    "relu": jax.nn.relu,
}
# where these are touched, every expert is computed for every token
_EXPERT_SITES = ("mlp.gates", "mlp.pre", "mlp.post", "mlp.expert_out")


class MLP(eqx.Module):
    """Linear maps of the MLP; `gate` is None where it is not gated."""

    gate: Float[Array, "*layer d_model d_mlp"] | None
    up: Float[Array, "*layer d_model d_mlp"]
    down: Float[Array, "*layer d_mlp d_model"]
    gate_bias: Float[Array, "*layer d_mlp"] | None = None
    up_bias: Float[Array, "*layer d_mlp"] | None = None
    down_bias: Float[Array, "*layer d_model"] | None = None


class Experts(eqx.Module):
    """A mixture of gated MLPs, of which the router chooses some for every token."""

    router: Float[Array, "*layer d_model expert"]
    gate: Float[Array, "*layer expert d_model d_mlp"]
    up: Float[Array, "*layer expert d_model d_mlp"]
    down: Float[Array, "*layer expert d_mlp d_model"]


def mlp(
    p: MLP | Experts, norm: Norm | None, x: Float[Array, "batch pos d_model"], tap: SiteTap, config: DecoderConfig
) -> Float[Array, "batch pos d_model"]:
    """What the MLP gives, read through `norm`."""
    h = normed(norm, tap("mlp.in", x))
    if isinstance(p, Experts):
        return _experts(p, h, tap, config)
    act = ACTIVATIONS[config.activation]
    up = _plus(h @ p.up, p.up_bias)
    if p.gate is None:
        post = act(tap("mlp.pre", up))
    else:
        post = act(tap("mlp.pre", _plus(h @ p.gate, p.gate_bias))) * up
    return _plus(tap("mlp.post", post) @ p.down, p.down_bias)


def _plus(x: Array, bias: Array | None) -> Array:
    return x if bias is None else x + bias[None, None, :]


def _experts(p: Experts, h: Float[Array, "batch pos d_model"], tap: SiteTap, config: DecoderConfig) -> Array:
    logits = tap("mlp.router", h @ p.router)
    weights = jax.nn.softmax(widened(logits), -1)
    chosen, experts = jax.lax.top_k(weights, config.n_active_experts)
    if config.renormalize_experts:
        chosen = chosen / chosen.sum(-1, keepdims=True)
    chosen = chosen.astype(h.dtype)
    if any(tap.touches(name) for name in _EXPERT_SITES):
        return _all_experts(p, h, chosen, experts, tap, config)
    return _chosen_experts(p, h, chosen, experts, config)


def _all_experts(p: Experts, h: Array, chosen: Array, experts: Array, tap: SiteTap, config: DecoderConfig) -> Array:
    """Every expert at every token, weighted by 0 where it is not chosen."""
    gates = (jax.nn.one_hot(experts, config.n_experts, dtype=h.dtype) * chosen[..., None]).sum(-2)
    gates = tap("mlp.gates", gates)
    pre = tap("mlp.pre", jnp.einsum("bpd,edf->bpef", h, p.gate))
    post = ACTIVATIONS[config.activation](pre) * jnp.einsum("bpd,edf->bpef", h, p.up)
    out = tap("mlp.expert_out", jnp.einsum("bpef,efd->bped", tap("mlp.post", post), p.down))
    return (out * gates[..., None]).sum(2)


def _chosen_experts(p: Experts, h: Array, chosen: Array, experts: Array, config: DecoderConfig) -> Array:
    """Only the chosen experts: the tokens sorted by expert and cut into tiles, every one of which is of one expert.

    Unlike `jax.lax.ragged_dot` this works under `vmap`, and on a CPU, where that one computes every expert, it is an
    order of magnitude faster.
    """
    k, n_experts, act = config.n_active_experts, config.n_experts, ACTIVATIONS[config.activation]
    flat, experts = h.reshape(-1, h.shape[-1]), experts.reshape(-1)
    n = experts.shape[0]
    # the mean number of tokens per expert, rounded down to a power of two, so at most half of all tiles are padding
    size = min(128, 2 ** int(math.log2(max(1, n // n_experts))))
    in_use = min(n, n_experts)
    n_tiles = (n - in_use) // size + in_use

    order = jnp.argsort(experts, stable=True).astype(jnp.int32)
    tokens_of = jnp.bincount(experts, length=n_experts).astype(jnp.int32)
    tiles_of = -(-tokens_of // size)
    first_token, first_tile = (jnp.cumsum(x, dtype=jnp.int32) - x for x in (tokens_of, tiles_of))
    number = jnp.arange(n_tiles, dtype=jnp.int32)
    # of every tile the expert it belongs to; there may be tiles too many at the end, which nobody reads
    expert = jnp.searchsorted(first_tile + tiles_of, number, side="right").astype(jnp.int32).clip(max=n_experts - 1)
    start = first_token[expert] + (number - first_tile[expert]) * size
    places = (start[:, None] + jnp.arange(size, dtype=jnp.int32)[None, :]).clip(max=n - 1)

    # the weights of a tile's expert are looked up again for the gradient, not kept
    @jax.checkpoint
    def tile(row):
        expert, tokens = row
        x = flat[tokens]
        return (act(x @ p.gate[expert]) * (x @ p.up[expert])) @ p.down[expert]

    out = jax.lax.map(tile, (expert, order[places] // k)).reshape(-1, h.shape[-1])
    rank = jnp.zeros_like(order).at[order].set(jnp.arange(n, dtype=jnp.int32))
    found = first_tile[experts] * size + rank - first_token[experts]
    return (out[found].reshape(*h.shape[:2], k, h.shape[-1]) * chosen[..., None]).sum(2)
