"""Products with k-sparse codes whose gradients touch k rows per token.

A sparse code is a pair (values, indices) of shape [batch, k]. With a dictionary of d_sae rows the only dense product of
a training step is then the encoder's forward pass; the decoder and every gradient cost k rows per token. Both weight
matrices are stored [d_sae, d_model], so that what is gathered and scattered is contiguous.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def scatter_rows(
    values: Float[Array, "batch k"], indices: Int[Array, "batch k"], rows: Float[Array, "batch d_model"], d_sae: int
) -> Float[Array, "d_sae d_model"]:
    """Σ over tokens b and places j of `values[b, j] * rows[b]`, added to row `indices[b, j]`: codesᵀ @ rows."""
    empty = jnp.zeros((d_sae, rows.shape[-1]), rows.dtype)
    # XLA's CPU scatter is serial and materialises its [batch, k, d_model] updates; the loop keeps them in cache, and is
    # seven times as fast. An accelerator wants one parallel scatter.
    return jax.lax.platform_dependent(empty, values, indices, rows, cpu=_token_by_token, default=_one_scatter)


def _one_scatter(total: Array, values: Array, indices: Array, rows: Array) -> Array:
    return total.at[indices].add(values[:, :, None] * rows[:, None, :])


def _token_by_token(total: Array, values: Array, indices: Array, rows: Array) -> Array:
    def add(total, token):
        v, i, row = token
        return total.at[i].add(v[:, None] * row[None, :]), None

    return jax.lax.scan(add, total, (values, indices, rows))[0]


def gather_dot(
    indices: Int[Array, "batch k"], rows: Float[Array, "batch d_model"], weights: Float[Array, "d_sae d_model"]
) -> Float[Array, "batch k"]:
    """`weights[indices[b, j]] · rows[b]` for every token b and place j."""
    return jax.lax.map(lambda i: (weights[i] * rows).sum(-1), indices.T).T


def _combine(values: Array, indices: Array, weights: Array) -> Array:
    def add(total, place):
        v, i = place
        return total + v[:, None] * weights[i], None

    empty = jnp.zeros((values.shape[0], weights.shape[1]), weights.dtype)
    return jax.lax.scan(add, empty, (values.T, indices.T))[0]


@jax.custom_vjp
def sparse_decode(
    values: Float[Array, "batch k"], indices: Int[Array, "batch k"], w_dec: Float[Array, "d_sae d_model"]
) -> Float[Array, "batch d_model"]:
    """Codes times dictionary, Σ_j values[b, j] · w_dec[indices[b, j]]."""
    return _combine(values, indices, w_dec)


def _decode_forward(values, indices, w_dec):
    return _combine(values, indices, w_dec), (values, indices, w_dec)


def _decode_backward(residuals, g):
    values, indices, w_dec = residuals
    return gather_dot(indices, g, w_dec), None, scatter_rows(values, indices, g, w_dec.shape[0])


sparse_decode.defvjp(_decode_forward, _decode_backward)


@jax.custom_vjp
def _attach(values: Array, indices: Array, x: Array, w_enc: Array, b_enc: Array) -> Array:
    """Returns `values`, and gives them the gradient of `(x @ w_enc.T + b_enc)[b, indices[b]]`."""
    return values


def _attach_forward(values, indices, x, w_enc, b_enc):
    return values, (indices, x, w_enc)


def _attach_backward(residuals, g):
    indices, x, w_enc = residuals
    d_bias = jnp.zeros(w_enc.shape[0], g.dtype).at[indices].add(g)
    return None, None, _combine(g, indices, w_enc), scatter_rows(g, indices, x, w_enc.shape[0]), d_bias


_attach.defvjp(_attach_forward, _attach_backward)


def topk_encode(
    x: Float[Array, "batch d_model"], w_enc: Float[Array, "d_sae d_model"], b_enc: Float[Array, " d_sae"], k: int
) -> tuple[Float[Array, "batch k"], Int[Array, "batch k"]]:
    """The k largest of x @ w_encᵀ + b_enc per token, largest first, with gradients that scatter k rows per token."""
    preactivations = jax.lax.stop_gradient(x @ w_enc.T + b_enc[None, :])
    values, indices = jax.lax.top_k(preactivations, k)
    return _attach(values, indices, x, w_enc, b_enc), indices
