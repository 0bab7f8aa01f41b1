"""Sparse codes and their products with a dictionary: k places per token, or a list of (token, latent) pairs.

Nothing here has a [token, d_sae] array, neither forward nor backward: the decoder and all gradients cost as many rows
of the dictionary as there are codes. Weight matrices are stored [d_sae, width], so that what is gathered and scattered
is contiguous.
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from mi_jax.decomposition.scatter import add_rows, add_sorted, zeros

# On a CPU: tokens (or pairs) whose rows are gathered at once, few enough to stay in a core's cache.
TOKENS_AT_ONCE = 32
# pairs, the same
PAIRS_AT_ONCE = 1024
# On a CPU: tokens whose sums stay in cache while their places are added one after the other
TOKENS_IN_BLOCK = 256
# places of those tokens that are added in one pass over the sums
PLACES_IN_TURN = 8
# places of every token that an accelerator adds in one kernel
PLACES_FUSED = 32


class Placed(eqx.Module):
    """The same number of codes for every token."""

    latents: Int[Array, "token place"]

    def combine(
        self, values: Float[Array, "token place"], weights: Float[Array, "d_sae width"]
    ) -> Float[Array, "token width"]:
        """Σ values · weights[latent], per token."""
        return lax.platform_dependent(values, self.latents, weights, cpu=_sums_in_blocks, default=_sums_at_once)

    def dot(
        self, rows: Float[Array, "token width"], weights: Float[Array, "d_sae width"]
    ) -> Float[Array, "token place"]:
        """weights[latent] · rows[token], for every value."""

        def in_turn(latents, rows, weights):
            # the products are gathered and multiplied in one pass on all cores, which a matrix times a row is not
            ones = jnp.ones(rows.shape[1], rows.dtype)
            return lax.map(
                lambda at: (weights[at[0]] * at[1][None, :]) @ ones, (latents, rows), batch_size=TOKENS_AT_ONCE
            )

        def at_once(latents, rows, weights):
            return (weights[latents] * rows[:, None, :]).sum(-1)

        return lax.platform_dependent(self.latents, rows, weights, cpu=in_turn, default=at_once)

    def scatter(
        self, values: Float[Array, "token place"], rows: Float[Array, "token width"], d_sae: int
    ) -> Float[Array, "d_sae width"]:
        """Σ values · rows[token], per latent: codesᵀ @ rows."""
        n_tokens, k = self.latents.shape
        tokens = jnp.broadcast_to(jnp.arange(n_tokens, dtype=jnp.int32)[:, None], (n_tokens, k))

        def at_once(values, rows):
            return zeros(d_sae, values, rows).at[self.latents].add(values[:, :, None] * rows[:, None, :], mode="drop")

        def in_order(values, rows):
            return add_sorted(values.reshape(-1), tokens.reshape(-1), self.latents.reshape(-1), rows, d_sae)

        return lax.platform_dependent(values, rows, cpu=in_order, default=at_once)


class Pairs(eqx.Module):
    """Any number of codes for any token; a pair whose latent is d_sae is empty and its value must be 0."""

    tokens: Int[Array, " pair"]
    latents: Int[Array, " pair"]
    n_tokens: int = eqx.field(static=True)

    def combine(
        self, values: Float[Array, " pair"], weights: Float[Array, "d_sae width"]
    ) -> Float[Array, "token width"]:
        """Σ values · weights[latent], per token."""
        return add_rows(values, self.latents, self.tokens, weights, self.n_tokens)

    def dot(self, rows: Float[Array, "token width"], weights: Float[Array, "d_sae width"]) -> Float[Array, " pair"]:
        """weights[latent] · rows[token], for every value."""

        def at_once(tokens, latents, rows, weights):
            return (weights[latents] * rows[tokens]).sum(-1)

        def in_turn(tokens, latents, rows, weights):
            ones = jnp.ones(rows.shape[1], rows.dtype)
            return lax.map(
                lambda pair: (weights[pair[1]] * rows[pair[0]]) @ ones, (tokens, latents), batch_size=PAIRS_AT_ONCE
            )

        return lax.platform_dependent(self.tokens, self.latents, rows, weights, cpu=in_turn, default=at_once)

    def scatter(
        self, values: Float[Array, " pair"], rows: Float[Array, "token width"], d_sae: int
    ) -> Float[Array, "d_sae width"]:
        """Σ values · rows[token], per latent: codesᵀ @ rows."""
        return add_rows(values, self.tokens, self.latents, rows, d_sae)


def _sums_in_blocks(values: Array, latents: Array, weights: Array) -> Array:
    """Σ values · weights[latent] per token on a CPU, a few tokens at a time, so that their sums stay in cache."""
    n_tokens, k = latents.shape
    block = math.gcd(n_tokens, TOKENS_IN_BLOCK)

    def of_block(code):
        def add(total, place):
            v, i = place
            return total + v[:, None] * weights[i], None

        empty = jnp.zeros((block, weights.shape[1]), weights.dtype)
        return lax.scan(add, empty, (code[0].T, code[1].T), unroll=min(k, PLACES_IN_TURN))[0]

    blocks = (a.reshape(-1, block, k) for a in (values, latents))
    return lax.map(of_block, tuple(blocks)).reshape(n_tokens, -1)


def _sums_at_once(values: Array, latents: Array, weights: Array) -> Array:
    """The same on an accelerator: for all tokens, some places in one fused kernel that keeps no gathered row."""
    n_tokens, k = latents.shape
    total = jnp.zeros((n_tokens, weights.shape[1]), weights.dtype)
    n_whole = k // PLACES_FUSED

    def add(total, code):
        for v, i in zip(*code, strict=True):
            total = total + v[:, None] * weights[i]
        return total, None

    whole = (a.T[: n_whole * PLACES_FUSED].reshape(n_whole, PLACES_FUSED, n_tokens) for a in (values, latents))
    if n_whole > 1:
        total, _ = lax.scan(add, total, tuple(whole))
        rest = tuple(a.T[n_whole * PLACES_FUSED :] for a in (values, latents))
    else:
        rest = (values.T, latents.T)
    return add(total, rest)[0]


Where = Placed | Pairs


@jax.custom_vjp
def decode(values: Array, where: Where, w_dec: Float[Array, "d_sae width"]) -> Float[Array, "token width"]:
    """Codes times dictionary: Σ values · w_dec[latent] per token."""
    return where.combine(values, w_dec)


def _decode_forward(values, where, w_dec):
    return where.combine(values, w_dec), (values, where, w_dec)


def _decode_backward(residuals, g):
    values, where, w_dec = residuals
    return where.dot(g, w_dec), None, where.scatter(values, g, w_dec.shape[0])


decode.defvjp(_decode_forward, _decode_backward)


@jax.custom_vjp
def attach(
    h: Array,
    where: Where,
    x: Float[Array, "token width"],
    centre: Float[Array, " width"],
    w_enc: Float[Array, "d_sae width"],
    b_enc: Float[Array, " d_sae"],
) -> Array:
    """Returns `h`, and gives it the gradient of ((x − centre) @ w_encᵀ + b_enc)[token, latent].

    `h` are those numbers, computed without gradient by whatever chose the places.
    """
    return h


def _attach_forward(h, where, x, centre, w_enc, b_enc):
    return h, (where, x, centre, w_enc)


def _attach_backward(residuals, g):
    where, x, centre, w_enc = residuals
    d_bias = jnp.zeros(w_enc.shape[0], g.dtype).at[where.latents].add(g, mode="drop")
    d_centre = -(d_bias @ w_enc)
    # what nobody asks for (the gradient of x, in most trainings) is never computed
    d_x = where.combine(g, w_enc)
    d_weights = where.scatter(g, x - centre[None, :], w_enc.shape[0])
    return None, None, d_x, d_centre, d_weights, d_bias


attach.defvjp(_attach_forward, _attach_backward)


def dense(values: Array, where: Where, d_sae: int) -> Float[Array, "token d_sae"]:
    """The codes as an array [token, d_sae]."""
    if isinstance(where, Pairs):
        tokens, n_tokens = where.tokens, where.n_tokens
    else:
        n_tokens = where.latents.shape[0]
        tokens = jnp.broadcast_to(jnp.arange(n_tokens)[:, None], where.latents.shape)
    return jnp.zeros((n_tokens, d_sae), values.dtype).at[tokens, where.latents].add(values, mode="drop")


def fired(values: Array, where: Where, d_sae: int) -> Int[Array, " d_sae"]:
    """On how many tokens each latent is not zero."""
    return jnp.zeros(d_sae, jnp.int32).at[where.latents].add((values != 0).astype(jnp.int32), mode="drop")
