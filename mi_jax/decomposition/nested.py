"""Reconstructions from parts of a code: prefixes of the dictionary, and the t largest codes for every t.

Sources: Bussmann et al. 2025 (Matryoshka, arXiv 2503.17547); Balagansky et al. 2025 (HierarchicalTopK, 2505.24473).
"""

import itertools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from mi_jax.decomposition.codes import Pairs, Placed, Where, decode


def by_prefix(
    values: Array, where: Where | None, w_dec: Float[Array, "d_sae d_out"], prefixes: tuple[int, ...]
) -> Float[Array, "prefix token d_out"]:
    """The reconstructions, without b_dec, by the first prefixes[i] latents; as dear as one of all latents.

    `where` is None for dense codes.
    """
    n = len(prefixes)
    if where is None:
        edges = (0, *prefixes)
        parts = jnp.stack([values[:, a:b] @ w_dec[a:b] for a, b in itertools.pairwise(edges)])
        return jnp.cumsum(parts, axis=0)
    if isinstance(where, Placed):
        n_tokens, k = where.latents.shape
        tokens = jnp.broadcast_to(jnp.arange(n_tokens, dtype=jnp.int32)[:, None], (n_tokens, k)).reshape(-1)
        values, latents = values.reshape(-1), where.latents.reshape(-1)
    else:
        assert isinstance(where, Pairs)
        n_tokens, tokens, latents = where.n_tokens, where.tokens, where.latents
    group = jnp.minimum(jnp.searchsorted(jnp.asarray(prefixes, jnp.int32), latents, side="right"), n - 1)
    # one row per token and group of latents, so that each code is added once
    parts = decode(values, Pairs(tokens * n + group.astype(jnp.int32), latents, n_tokens * n), w_dec)
    return jnp.moveaxis(jnp.cumsum(parts.reshape(n_tokens, n, -1), axis=1), 1, 0)


@jax.custom_vjp
def by_size(
    values: Float[Array, "token k"],
    latents: Int[Array, "token k"],
    w_dec: Float[Array, "d_sae d_out"],
    target: Float[Array, "token d_out"],
) -> Float[Array, " token"]:
    """(1/k) Σ_t ‖target − Σ_{i ≤ t} values[i] w_dec[latents[i]]‖², per token; places come largest first.

    No array [token, k, d_out] exists: the backward pass goes back through the remainders one place at a time.
    """
    return _sizes(values, latents, w_dec, target)[0]


def _sizes(values, latents, w_dec, target):
    def add(carry, place):
        rest, total = carry
        v, i = place
        rest = rest - v[:, None] * w_dec.at[i].get(mode="fill", fill_value=0.0)
        return (rest, total + (rest * rest).sum(1)), None

    start = (target, jnp.zeros(target.shape[0], target.dtype))
    (rest, total), _ = lax.scan(add, start, (values.T, latents.T))
    return total / values.shape[1], rest


def _by_size_forward(values, latents, w_dec, target):
    total, rest = _sizes(values, latents, w_dec, target)
    return total, (values, latents, w_dec, rest)


def _by_size_backward(residuals, g):
    values, latents, w_dec, rest = residuals
    scale = 2 * g / values.shape[1]

    def back(carry, place):
        rest, pull, d_rows = carry
        v, i = place
        row = w_dec.at[i].get(mode="fill", fill_value=0.0)
        # how the losses of this size and of all larger ones change with what this place adds
        pull = pull - scale[:, None] * rest
        d_rows = d_rows.at[i].add(v[:, None] * pull, mode="drop")
        return (rest + v[:, None] * row, pull, d_rows), (row * pull).sum(1)

    start = (rest, jnp.zeros_like(rest), jnp.zeros_like(w_dec))
    (_, pull, d_rows), d_values = lax.scan(back, start, (values.T, latents.T), reverse=True)
    return d_values.T, None, d_rows, -pull


by_size.defvjp(_by_size_forward, _by_size_backward)
