"""Certificates that a given support can be recovered: of real codes, one token at a time.

Sources: Tropp 2004, "Greed is good" (exact recovery coefficient); Fuchs 2004, "On sparse representations in arbitrary
redundant bases".
"""

import dataclasses
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mi_jax.core.errors import InputError
from mi_jax.decomposition.evaluation.batches import row_slices, widened
from mi_jax.decomposition.evaluation.estimates import Estimate, bootstrap_ratio


class Certificates(eqx.Module):
    """Of each support: recovery is sure where a coefficient is below 1; above, nothing is known.

    Attributes:
      erc: max_{j∉S} ‖(D_Sᵀ)⁺ d_j‖₁; below 1, basis pursuit and OMP find S from any codes on it (Tropp 2004).
      fuchs: max_{j∉S} |⟨d_j, v⟩| with v = D_Sᵀ (D_S D_Sᵀ)⁻¹ sign(z_S); below 1, l1 finds these signs (Fuchs 2004).
        Of codes that cannot be negative: max_{j∉S} ⟨d_j, v⟩.
      smallest_singular_value: of D_S; 0 where its directions depend on each other, and then nothing is certified.
    """

    erc: Float[Array, "*batch"]
    fuchs: Float[Array, "*batch"]
    smallest_singular_value: Float[Array, "*batch"]


@partial(jax.jit, static_argnames="nonnegative")
def certificates(
    directions: Float[Array, "n d_model"],
    support: Int[Array, "batch k"],
    codes: Float[Array, "batch k"],
    *,
    nonnegative: bool = True,
) -> Certificates:
    """Certificates of supports of up to k directions; places with code 0 are no part of the support.

    Args:
      directions: unit rows.
      support: indices into them, each direction at most once.
      nonnegative: codes of the model cannot be negative, as those of a ReLU.
    """
    directions, codes = widened((directions, codes))

    def one(indices, z):
        active = z != 0
        rows = jnp.where(active[:, None], directions[indices], 0)
        gram = rows @ rows.T + jnp.diag((~active).astype(rows.dtype))
        # one token at a time: [k, n] is held, not [batch, k, n]
        weights = jnp.linalg.solve(gram, rows) @ directions.T
        signs = jnp.sign(z)
        outside = (
            jnp.ones(directions.shape[0], bool)
            .at[jnp.where(active, indices, directions.shape[0])]
            .set(False, mode="drop")
        )
        along = signs @ weights
        along = along if nonnegative else jnp.abs(along)
        spectrum = jnp.linalg.eigvalsh(gram)
        smallest = jnp.sqrt(jnp.maximum(jnp.where(active.any(), spectrum[0], 1), 0))
        regular = smallest > 1e-3

        def largest(values):
            return jnp.where(regular, jnp.where(outside, values, -jnp.inf).max(), jnp.inf)

        return largest(jnp.abs(weights).sum(0)), largest(along), jnp.where(regular, smallest, 0)

    return Certificates(*jax.lax.map(lambda pair: one(*pair), (support, codes)))


@dataclasses.dataclass(frozen=True)
class CertifiedFractions:
    """Shares of tokens whose support is certified, with intervals from resampled blocks.

    Attributes:
      erc, fuchs: share with the coefficient below 1.
      fuchs_margin: mean of 1 − F over tokens with linearly independent supports.
      dependent: share of supports with dependent directions.
      l0: codes per token.
    """

    erc: Estimate
    fuchs: Estimate
    fuchs_margin: Estimate
    dependent: float
    l0: float


def certified_fractions(
    dictionary,
    activations: Float[Array | np.ndarray, "n d_model"],
    *,
    blocks: Int[Array | np.ndarray, " token"],
    key: Array,
    max_active: int,
    batch_size: int = 256,
) -> CertifiedFractions:
    """How many of a dictionary's own supports, on real activations, are sure to be recovered from it.

    Args:
      dictionary: with `encode` and `w_dec`; rows of zero norm and dead latents take part as they are.
      blocks: which sequence each token is from.
      max_active: no token may have more codes.
      batch_size: tokens at a time.

    Raises:
      InputError: a token with more than `max_active` codes, or blocks that are not one per token.
    """
    if blocks.shape != activations.shape[:1]:
        raise InputError(f"blocks must give one block per token, shape {activations.shape[:1]}, got {blocks.shape}")
    dictionary = widened(dictionary)
    norms = jnp.linalg.norm(dictionary.w_dec, axis=1, keepdims=True)
    directions = dictionary.w_dec / jnp.maximum(norms, 1e-30)
    parts = []
    for rows, size in row_slices(activations.shape[0], batch_size):
        codes = dictionary.encode(widened(jnp.asarray(activations[rows])))
        active = np.asarray((codes != 0).sum(1))
        if active.max() > max_active:
            raise InputError(f"a token has {active.max()} codes, over max_active={max_active}")
        support = jax.lax.top_k(jnp.abs(codes), max_active)[1]
        values = jnp.take_along_axis(codes, support, 1)
        found = certificates(directions, support, values, nonnegative=bool((values >= 0).all()))
        columns = (found.erc, found.fuchs, found.smallest_singular_value)
        parts.append(np.stack([*(np.asarray(c, np.float64) for c in columns), active], 1)[:size])
    erc, fuchs, smallest, active = np.concatenate(parts).T
    regular = smallest > 0
    _, owner = np.unique(np.asarray(blocks), return_inverse=True)
    margin = np.where(regular, 1 - np.where(regular, fuchs, 0), 0)
    k_erc, k_fuchs, k_margin = jax.random.split(key, 3)

    def mean(values, weights, key):
        return bootstrap_ratio(np.bincount(owner, values), np.bincount(owner, weights), key=key)

    ones = np.ones(len(owner))
    return CertifiedFractions(
        erc=mean((erc < 1) * 1.0, ones, k_erc),
        fuchs=mean((fuchs < 1) * 1.0, ones, k_fuchs),
        fuchs_margin=mean(margin, regular * 1.0, k_margin),
        dependent=float((~regular).mean()),
        l0=float(active.mean()),
    )
