"""Directions of one dictionary matched with those of another, or with the true features.

Sources: Sharkey et al. 2022 (mean max cosine similarity); Hyvärinen and Morioka 2016 (mean correlation coefficient);
Song et al. 2025 (arXiv 2505.20254; pairwise MCC of several dictionaries).
"""

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array, Float, Int
from scipy.optimize import linear_sum_assignment

from mi_jax.core.errors import InputError
from mi_jax.decomposition.evaluation.estimates import Estimate, Null, bootstrap_mean, bootstrap_ratio, generator


@dataclasses.dataclass(frozen=True)
class DirectionMatch:
    """How well n_true directions are found among d_sae; intervals from resampled true directions.

    Attributes:
      mmcs: mean over true directions of the largest |cos| with any other.
      mcc: mean |cos| of the one-to-one matching with the largest sum (Hungarian method). A true direction that is left
        without a partner, as some are where d_sae < n_true, counts 0.
      uniqueness: distinct true directions that are nearest to some latent / min(d_sae, n_true).
      mmcs_null, mcc_null, uniqueness_null: of as many random unit directions.
      latents: the partner of each true direction; −1 for none.
      cosines: with its partner, signed; 0 for none.
    """

    mmcs: Estimate
    mcc: Estimate
    uniqueness: float
    mmcs_null: Null
    mcc_null: Null
    uniqueness_null: Null
    latents: np.ndarray
    cosines: np.ndarray


def cosines(
    a: Float[Array | np.ndarray, "n_a d_a"], b: Float[Array | np.ndarray, "n_b d_b"]
) -> Float[np.ndarray, "n_a n_b"]:
    """Cosine of every row of `a` with every row of `b`; 0 where a row is zero.

    Raises:
      InputError: directions of different spaces.
    """
    if a.shape[1] != b.shape[1]:
        raise InputError(f"directions of {a.shape[1]} and {b.shape[1]} dimensions cannot be compared")

    def unit(rows):
        rows = np.asarray(rows, np.float32)
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)

    return unit(a) @ unit(b).T


def assign(similarity: Float[np.ndarray, "n_true d_sae"]) -> Int[np.ndarray, " n_true"]:
    """The one-to-one matching of largest total similarity; −1 where a row is left over."""
    rows, columns = linear_sum_assignment(similarity, maximize=True)
    partner = np.full(similarity.shape[0], -1)
    partner[rows] = columns
    return partner


def at_partner(values: Float[np.ndarray, "n_true d_sae"], partner: Int[np.ndarray, " n_true"]) -> np.ndarray:
    """The entry of each row at its partner, 0 where it has none."""
    return np.where(partner >= 0, np.take_along_axis(values, np.maximum(partner, 0)[:, None], 1)[:, 0], 0)


def uniqueness(similarity: Float[np.ndarray, "n_true d_sae"]) -> float:
    """Distinct rows that are the best of some column, as a share of how many there could be."""
    return len(np.unique(similarity.argmax(0))) / min(similarity.shape)


def mean_max_cosine(
    directions: Float[Array | np.ndarray, "d_sae d_model"], true: Float[Array | np.ndarray, "n_true d_model"]
) -> float:
    """MMCS: mean over true directions of the largest |cos| with any of `directions`."""
    return float(np.abs(cosines(true, directions)).max(1).mean())


def match_directions(
    directions: Float[Array | np.ndarray, "d_sae d_model"],
    true: Float[Array | np.ndarray, "n_true d_true"],
    *,
    key: Array,
    null_draws: int = 5,
) -> DirectionMatch:
    """MMCS, MCC and uniqueness against true directions, beside as many random ones.

    The matching holds one [n_true, d_sae] array.

    Raises:
      InputError: directions of different spaces.
      ValueError: fewer than two true directions.
    """
    k_null, k_mmcs, k_mcc = jax.random.split(key, 3)
    signed = cosines(true, directions)
    size = np.abs(signed)
    partner = assign(size)
    rng, nulls = generator(k_null), []
    for _ in range(null_draws):
        random = np.abs(cosines(true, rng.standard_normal(directions.shape)))
        nulls.append((random.max(1).mean(), at_partner(random, assign(random)).mean(), uniqueness(random)))
    mmcs_null, mcc_null, uniqueness_null = (Null.of(draws) for draws in np.array(nulls).T)
    return DirectionMatch(
        mmcs=bootstrap_mean(size.max(1), key=k_mmcs),
        mcc=bootstrap_mean(at_partner(size, partner), key=k_mcc),
        uniqueness=uniqueness(size),
        mmcs_null=mmcs_null,
        mcc_null=mcc_null,
        uniqueness_null=uniqueness_null,
        latents=partner,
        cosines=at_partner(signed, partner),
    )


@dataclasses.dataclass(frozen=True)
class SeedConsistency:
    """PW-MCC: mean over pairs of dictionaries of the MCC of their directions.

    Attributes:
      value: with the interval of resampled matched pairs of latents, dictionaries fixed.
      null: of random unit directions of the same shapes.
      per_pair: `[dictionary dictionary]`, 1 on the diagonal.
    """

    value: Estimate
    null: Null
    per_pair: np.ndarray


def seed_consistency(
    decoders: Sequence[Float[Array | np.ndarray, "d_sae d_model"]], *, key: Array, null_draws: int = 1
) -> SeedConsistency:
    """Whether trainings that differ in their seed find the same directions.

    Latents beyond the smaller of two dictionaries have no partner and do not count.

    Raises:
      InputError: fewer than two dictionaries, or of different spaces.
    """
    if len(decoders) < 2:
        raise InputError(f"consistency compares two or more dictionaries, got {len(decoders)}")
    k_null, k_boot = jax.random.split(key)

    def matched(rows: Sequence) -> dict[tuple[int, int], np.ndarray]:
        out = {}
        for i, j in itertools.combinations(range(len(rows)), 2):
            size = np.abs(cosines(rows[i], rows[j]))
            partner = assign(size)
            out[i, j] = at_partner(size, partner)[partner >= 0]
        return out

    pairs = matched(decoders)
    per_pair = np.eye(len(decoders))
    for (i, j), found in pairs.items():
        per_pair[i, j] = per_pair[j, i] = found.mean()
    rng = generator(k_null)
    draws = [matched([rng.standard_normal(d.shape) for d in decoders]) for _ in range(null_draws)]
    # every pair counts alike, also where the dictionaries differ in size
    weighted = np.concatenate([found / len(found) for found in pairs.values()])
    weights = np.concatenate([np.full(len(found), 1 / len(found)) for found in pairs.values()])
    value = bootstrap_ratio(weighted, weights, key=k_boot)
    return SeedConsistency(value, Null.of(np.array([np.mean([f.mean() for f in d.values()]) for d in draws])), per_pair)
