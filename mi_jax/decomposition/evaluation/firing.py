"""Codes against the true codes: does a latent fire when its feature is there, and how strongly."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mi_jax.core.errors import InputError
from mi_jax.decomposition.evaluation.batches import row_slices, widened
from mi_jax.decomposition.evaluation.estimates import Estimate, bootstrap_mean, bootstrap_ratio, generator
from mi_jax.decomposition.evaluation.matching import assign, at_partner
from mi_jax.decomposition.evaluation.reconstructor import Reconstructor


@dataclasses.dataclass(frozen=True)
class CodeMatch:
    """Correlation of codes with true codes; intervals from resampled features.

    Attributes:
      mcc: mean |correlation| of the one-to-one matching with the largest sum; a feature without a partner counts 0.
      mcc_null: the same, matching included, when the codes belong to other tokens.
      latents: the partner of each feature; −1 for none.
      correlations: with its partner, signed; 0 for none.
    """

    mcc: Estimate
    mcc_null: float
    latents: np.ndarray
    correlations: np.ndarray


@dataclasses.dataclass(frozen=True)
class FiringMatch:
    """Firing of each feature's latent against the presence of the feature; intervals from resampled features.

    Attributes:
      precision: of the tokens on which the latent fires, the share that has the feature; 0 where it never fires.
      recall: of the tokens with the feature, the share on which its latent fires.
      f1: 2 · both / (fires + present).
      f1_null: mean F1 when the codes belong to other tokens.
      shrinkage: slope of the latent's contribution on the feature's where both are there, Σ ẑ z / Σ z² with codes in
        units of the length of what they add; 1 for codes of the right size, below 1 for shrunken ones. Mean over
        features that are ever found.
      precisions, recalls, f1s: per feature.
      slopes: per feature, NaN where latent and feature never meet.
    """

    precision: Estimate
    recall: Estimate
    f1: Estimate
    f1_null: float
    shrinkage: Estimate | None
    precisions: np.ndarray
    recalls: np.ndarray
    f1s: np.ndarray
    slopes: np.ndarray


@eqx.filter_jit
def _moments(dictionary, x, true, shuffled, real):
    """Sums and products of codes and true codes, for correlations."""
    codes = jnp.where(real[:, None], dictionary.encode(x).astype(jnp.float32), 0)
    return codes.sum(0), (codes**2).sum(0), true.T @ codes, shuffled.T @ codes


def match_codes(
    dictionary: Reconstructor,
    activations: Float[Array | np.ndarray, "n d_model"],
    true_codes: Float[Array | np.ndarray, "token n_true"],
    *,
    key: Array,
    batch_size: int = 2048,
) -> CodeMatch:
    """MCC of codes: the matching knows nothing of directions, so it serves non-linear ground truth too.

    Batches of codes are summed up; [n_true, d_sae] correlations are held.

    Raises:
      InputError: not one row of true codes per activation.
    """
    n, dictionary = _checked(activations, true_codes), widened(dictionary)
    k_null, k_boot = jax.random.split(key)
    order = generator(k_null).permutation(n)
    true = np.asarray(true_codes, np.float32)
    totals = None
    for rows, size in row_slices(n, batch_size):
        real = np.arange(len(rows)) < size
        batch = (activations[rows], true[rows] * real[:, None], true[order[rows]] * real[:, None], real)
        sums = [np.asarray(a, np.float64) for a in _moments(dictionary, *widened([jnp.asarray(a) for a in batch]))]
        totals = sums if totals is None else [a + b for a, b in zip(totals, sums, strict=True)]
    assert totals is not None
    total, squares, crossed, crossed_null = totals
    spread = np.sqrt(np.maximum(squares / n - (total / n) ** 2, 0))
    exact = true.astype(np.float64)

    def correlations(cross):
        covariance = cross / n - exact.mean(0)[:, None] * (total / n)[None, :]
        scale = exact.std(0)[:, None] * spread[None, :]
        return np.where(scale > 1e-12, covariance / np.maximum(scale, 1e-12), 0)

    signed, null = correlations(crossed), np.abs(correlations(crossed_null))
    partner = assign(np.abs(signed))
    return CodeMatch(
        mcc=bootstrap_mean(at_partner(np.abs(signed), partner), key=k_boot),
        mcc_null=float(at_partner(null, assign(null)).mean()),
        latents=partner,
        correlations=at_partner(signed, partner),
    )


@eqx.filter_jit
def _counts(dictionary, x, true, shuffled, real, latents, lengths):
    codes = jnp.where(real[:, None], dictionary.encode(x)[:, latents].astype(jnp.float32), 0) * lengths[None, :]
    fires, present = codes != 0, true != 0
    both = fires & present
    products = (jnp.where(both, codes * true, 0), jnp.where(both, true**2, 0))
    parts = (fires, present, both, fires & (shuffled != 0), *products)
    return tuple(part.astype(jnp.float32).sum(0) for part in parts)


def match_firing(
    dictionary: Reconstructor,
    activations: Float[Array | np.ndarray, "n d_model"],
    true_codes: Float[Array | np.ndarray, "token n_true"],
    latents: Int[np.ndarray, " feature"],
    *,
    key: Array,
    true_directions: Float[Array | np.ndarray, "n_true d_model"] | None = None,
    batch_size: int = 2048,
) -> FiringMatch:
    """Precision, recall and F1 of firing, and the shrinkage of codes, per true feature.

    Args:
      true_codes: 0 where a feature is absent.
      latents: the latent of each feature, −1 for none: from `match_directions` or `match_codes`.
      key: draws the null's order of tokens and the bootstrap.
      true_directions: with them and the dictionary's `w_dec`, codes are compared in units of what they add to the
        activation; None compares the codes themselves.

    Raises:
      InputError: not one row of true codes per activation, or not one latent per feature.
    """
    n, dictionary = _checked(activations, true_codes), widened(dictionary)
    if latents.shape != (true_codes.shape[1],):
        raise InputError(f"{true_codes.shape[1]} features need one latent each, got shape {latents.shape}")
    chosen, found = np.maximum(latents, 0), latents >= 0
    lengths = np.ones(len(chosen))
    if true_directions is not None:
        ours = np.linalg.norm(np.asarray(dictionary.w_dec)[chosen], axis=1)  # type: ignore[attr-defined]
        lengths = ours / np.maximum(np.linalg.norm(np.asarray(true_directions, np.float32), axis=1), 1e-30)
    k_null, *keys = jax.random.split(key, 5)
    order = generator(k_null).permutation(n)
    true = np.asarray(true_codes, np.float32)
    places, scale = jnp.asarray(chosen), jnp.asarray(lengths * found, jnp.float32)
    totals = np.zeros((6, len(chosen)))
    for rows, size in row_slices(n, batch_size):
        real = np.arange(len(rows)) < size
        batch = (activations[rows], true[rows] * real[:, None], true[order[rows]] * real[:, None], real)
        x, there, elsewhere, counted = widened([jnp.asarray(a) for a in batch])
        totals += np.stack(_counts(dictionary, x, there, elsewhere, counted, places, scale))
    fires, present, both, chance, product, square = totals

    def share(part, whole):
        return np.where(whole > 0, part / np.maximum(whole, 1), 0)

    precisions, recalls, f1s = share(both, fires), share(both, present), share(2 * both, fires + present)
    slopes = np.where(square > 0, product / np.where(square > 0, square, 1), np.nan)
    met = slopes[~np.isnan(slopes)]
    return FiringMatch(
        precision=bootstrap_mean(precisions, key=keys[0]),
        recall=bootstrap_mean(recalls, key=keys[1]),
        f1=bootstrap_mean(f1s, key=keys[2]),
        f1_null=float(share(2 * chance, fires + present).mean()),
        shrinkage=bootstrap_ratio(met, np.ones(len(met)), key=keys[3]) if len(met) > 1 else None,
        precisions=precisions,
        recalls=recalls,
        f1s=f1s,
        slopes=slopes,
    )


def _checked(activations, true_codes) -> int:
    if activations.shape[0] != true_codes.shape[0]:
        raise InputError(
            f"one row of true codes per activation: got {true_codes.shape[0]} rows for {activations.shape[0]}"
        )
    return activations.shape[0]
