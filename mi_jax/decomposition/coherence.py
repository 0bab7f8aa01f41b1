"""How alike the directions of a dictionary are: G = D Dᵀ of its unit rows D, off the diagonal.

Sources: Tropp 2004, "Greed is good" (coherence, Babel function); Chanin and Garriga-Alonso 2025, "Sparse but wrong"
(arXiv 2508.16560; c_dec and s_dec).
"""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from mi_jax.core.errors import InputError

# pairs whose quantile is taken exactly; beyond, rows at equal distances stand for all
_QUANTILE_PAIRS = 2**23


@dataclasses.dataclass(frozen=True)
class Coherence:
    """Coherence of n unit directions in d dimensions. Sums over all pairs, so exact, but for the quantile.

    Attributes:
      mutual: μ = max_{i≠j} |G_ij|.
      positive, negative: μ⁺ = max G_ij and μ⁻ = max −G_ij, at least 0.
      babel: μ₁(m) for m = 1, 2, …: max over rows of the sum of the m largest |G_ij|.
      mean: c_dec, the mean of |G_ij| over pairs.
      mean_null: its expectation for random directions, Γ(d/2) / (√π Γ((d + 1)/2)) ≈ √(2/(πd)).
      p99: 99 % of the pairs have an |G_ij| below; of at most 2²³ pairs, of rows at equal distances.
      welch: no n directions in d dimensions have a smaller μ, √((n − d)/(d(n − 1))); 0 where n ≤ d.
      n_directions: those that count; rows that are zero or left out do not.
    """

    mutual: float
    positive: float
    negative: float
    babel: np.ndarray
    mean: float
    mean_null: float
    p99: float
    welch: float
    n_directions: int


def welch_bound(d_model: int, n: int) -> float:
    """The smallest coherence that n unit vectors in d_model dimensions can have (Welch 1974)."""
    return math.sqrt((n - d_model) / (d_model * (n - 1))) if n > d_model else 0.0


def expected_cosine(d_model: int) -> float:
    """E|cos| of two independent random directions."""
    return math.exp(math.lgamma(d_model / 2) - math.lgamma((d_model + 1) / 2)) / math.sqrt(math.pi)


def unit_directions(
    w_dec: Float[Array | np.ndarray, "d_sae d_model"], alive: Bool[Array | np.ndarray, " d_sae"] | None = None
) -> Float[Array, "n d_model"]:
    """Rows divided by their norm, without those that are zero or not alive."""
    rows = np.asarray(w_dec, np.float32)
    norms = np.linalg.norm(rows, axis=1)
    keep = norms > 0 if alive is None else (norms > 0) & np.asarray(alive)
    return jnp.asarray(rows[keep] / norms[keep, None])


@partial(jax.jit, static_argnames=("size", "order"))
def _row_block(rows: Array, start: Array, size: int, order: int) -> tuple[Array, ...]:
    """Of `size` rows: largest and smallest entry of G, sums of |G|, and the Babel sums of the worst row."""
    block = jax.lax.dynamic_slice_in_dim(rows, start, size)
    gram = block @ rows.T
    own = (start + jnp.arange(size))[:, None] == jnp.arange(rows.shape[0])[None, :]
    gram = jnp.where(own, 0, gram)
    largest = jax.lax.top_k(jnp.abs(gram), order)[0]
    return gram.max(), gram.min(), jnp.abs(gram).sum(1), jnp.cumsum(largest, 1).max(0)


@partial(jax.jit, static_argnames="count")
def _some_rows(rows: Array, count: int) -> Array:
    """|G| of `count` rows at equal distances, NaN on the diagonal."""
    picked = jnp.arange(count) * rows.shape[0] // count
    own = picked[:, None] == jnp.arange(rows.shape[0])[None, :]
    return jnp.where(own, jnp.nan, jnp.abs(rows[picked] @ rows.T))


def coherence(
    w_dec: Float[Array | np.ndarray, "d_sae d_model"],
    *,
    alive: Bool[Array | np.ndarray, " d_sae"] | None = None,
    max_order: int = 32,
    block_size: int = 1024,
) -> Coherence:
    """Coherence statistics of a decoder, `block_size` rows at a time.

    Args:
      w_dec: one direction a row, of any norm; zero rows do not count.
      alive: False leaves a row out. Dead latents keep the directions of their initialisation: leave them out.
      max_order: how far to follow the Babel function.
      block_size: `[block_size, d_sae]` is held at once.

    Raises:
      InputError: fewer than two directions.
    """
    rows = unit_directions(w_dec, alive)
    n, d = rows.shape
    if n < 2:
        raise InputError(f"coherence needs two or more directions, got {n} that are neither zero nor left out")
    size, order = min(block_size, n), min(max_order, n - 1)
    top, bottom, total, babel = 0.0, 0.0, 0.0, np.zeros(order)
    for begin in range(0, n, size):
        # the last block reaches back over rows that are counted already
        start = min(begin, n - size)
        high, low, sums, sums_of_largest = _row_block(rows, jnp.asarray(start, jnp.int32), size, order)
        top, bottom = max(top, float(high)), min(bottom, float(low))
        total += float(np.asarray(sums, np.float64)[begin - start :].sum())
        babel = np.maximum(babel, np.asarray(sums_of_largest, np.float64))
    some = _some_rows(rows, max(1, min(n, _QUANTILE_PAIRS // n)))
    return Coherence(
        mutual=max(top, -bottom),
        positive=top,
        negative=-bottom,
        babel=babel,
        mean=total / (n * (n - 1)),
        mean_null=expected_cosine(d),
        p99=float(np.nanquantile(np.asarray(some), 0.99)),
        welch=welch_bound(d, n),
        n_directions=n,
    )


def decoder_projection(
    w_dec: Float[Array, "d_sae d_model"], b_dec: Float[Array, " d_model"], x: Float[Array, "batch d_model"], n: int
) -> float:
    """s_dec^n: the (n · batch)-th largest entry of (x − b_dec) W_decᵀ, all latents and tokens together.

    Over dictionaries of different L0 it is smallest near the L0 of the data. n is about half of d_sae in the paper.

    Raises:
      InputError: n is not between 1 and d_sae.
    """
    if not 1 <= n <= w_dec.shape[0]:
        raise InputError(f"n counts latents per token, from 1 to d_sae={w_dec.shape[0]}; got {n}")
    w_dec, b_dec, x = (jnp.asarray(a, jnp.float32) for a in (w_dec, b_dec, x))
    projections = np.asarray((x - b_dec[None, :]) @ w_dec.T).ravel()
    place = projections.size - n * x.shape[0]
    return float(np.partition(projections, place)[place])
