"""Feature splitting and absorption, by the formulas of SAEBench.

A concept is *split* when several latents share it, and *absorbed* where its latents stay silent and another, more
specific one stands in for them.

Sources: Chanin et al. 2024, "A is for absorption" (arXiv 2409.14507); Karvonen et al. 2025, "SAEBench", appendix.
"""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from mi_jax.core.errors import InputError
from mi_jax.decomposition.evaluation.batches import row_slices, widened
from mi_jax.decomposition.evaluation.estimates import Estimate, bootstrap, generator
from mi_jax.decomposition.evaluation.logistic import fit_probes
from mi_jax.decomposition.evaluation.pooling import (
    Examples,
    class_means,
    codes_at,
    linear_decoder,
)
from mi_jax.decomposition.evaluation.reconstructor import Reconstructor
from mi_jax.decomposition.evaluation.sparse_probing import best_latents, k_sparse_probes, log_odds


@dataclasses.dataclass(frozen=True)
class AbsorptionThresholds:
    """What counts as absorption; the defaults are SAEBench's.

    Attributes:
      full_cosine: of the absorbing latent with the probe, for full absorption.
      fraction_cosine: of each absorbing latent with the probe, for the fraction.
      projection_share: of the activation's projection on the probe that the absorbing latents must make up.
      max_absorbing: latents that may absorb together, for the fraction.
      f1_jump: F1 that one more latent must add to be part of the split.
      max_k: latents that a concept may be split into.
    """

    full_cosine: float = 0.025
    fraction_cosine: float = 0.1
    projection_share: float = 0.4
    max_absorbing: int = 3
    f1_jump: float = 0.03
    max_k: int = 10


@dataclasses.dataclass(frozen=True)
class Absorption:
    """Means over concepts, with intervals from resampled examples.

    Attributes:
      fraction: mean absorption fraction of the examples that have the concept and that the probe finds.
      full_rate: share of these on which the concept is fully absorbed by one latent.
      fraction_null, full_rate_null: the same with the decoder's directions dealt to other latents.
      splits: latents per concept, less one.
      fractions, full_rates: per concept.
      latents: per concept, the latents that it is split into.
      f1: `[concept max_k]`, of probes on the k best latents.
      n_found: examples per concept that the probe finds.
    """

    fraction: Estimate
    full_rate: Estimate
    fraction_null: float
    full_rate_null: float
    splits: float
    fractions: np.ndarray
    full_rates: np.ndarray
    latents: tuple[tuple[int, ...], ...]
    f1: np.ndarray
    n_found: np.ndarray


def n_split(f1: Float[np.ndarray, " max_k"], jump: float = 0.03) -> int:
    """How many latents share a concept: k grows as long as each further one adds over `jump` to the F1 of k − 1."""
    k = 1
    while k < len(f1) and f1[k] > f1[k - 1] + jump:
        k += 1
    return k


@eqx.filter_jit
def absorption_scores(
    dictionary: Reconstructor,
    w_dec: Float[Array, "d_sae d_model"],
    x: Float[Array, "n d_model"],
    direction: Float[Array, " d_model"],
    main: Bool[Array, " d_sae"],
    thresholds: AbsorptionThresholds,
) -> tuple[Float[Array, " n"], Bool[Array, " n"]]:
    """Absorption fraction and full absorption of each example.

    With p_j = z_j ⟨w_dec_j, u⟩ the projection of latent j on the unit probe u, M = Σ_main p_j, A the sum of the
    (up to 3) largest p_j > 0 of other latents aligned with u, and P = ⟨x, u⟩, the fraction is 0 where M ≥ P or
    A / P < 0.4, 1 where else M ≤ 0, and else a / (a + M), a = min(A, P − M). Absorption is full where no main latent
    fires, and the latent of largest p_j is aligned with u and has p_j / P ≥ 0.4, P > 0.

    Args:
      w_dec: the directions to score with; those of the dictionary, or of a null.
      direction: u, of any length.
      main: the latents that the concept is split into.
    """
    unit = direction / jnp.linalg.norm(direction)
    codes = dictionary.encode(x)
    along = w_dec @ unit
    cosine = along / jnp.maximum(jnp.linalg.norm(w_dec, axis=1), 1e-30)
    projections, total = codes * along[None, :], x @ unit
    mains = jnp.where(main[None, :], projections, 0).sum(1)

    aligned = ~main & (cosine >= thresholds.fraction_cosine)
    candidates = jnp.where(aligned[None, :], jnp.maximum(projections, 0), 0)
    absorbed = jax.lax.top_k(candidates, min(thresholds.max_absorbing, candidates.shape[1]))[0].sum(1)
    safe = jnp.where(total == 0, 1, total)
    none = (mains >= total) | (absorbed / safe < thresholds.projection_share)
    part = jnp.minimum(absorbed, total - mains)
    share = part / jnp.where(part + mains > 0, part + mains, 1)
    fraction = jnp.where(none, 0.0, jnp.where(mains <= 0, 1.0, jnp.clip(share, 0, 1)))

    silent = ~jnp.where(main[None, :], codes > 1e-8, False).any(1)
    top = jnp.argmax(projections, 1)
    largest = jnp.take_along_axis(projections, top[:, None], 1)[:, 0]
    full = (total > 0) & (largest / safe >= thresholds.projection_share) & (cosine[top] >= thresholds.full_cosine)
    return fraction, silent & full


def feature_absorption(
    dictionary: Reconstructor,
    train: Examples,
    test: Examples,
    *,
    key: Array,
    thresholds: AbsorptionThresholds | None = None,
    batch_size: int = 256,
) -> Absorption:
    """How far the latents of each concept are absorbed by others.

    The latents of a concept are those with the largest difference of mean codes, as many as `n_split` finds (SAEBench
    ranks them by the weights of an L1-regularised probe instead). SAEBench's concepts are the first letters of words.

    Args:
      train: one activation an example, without a token axis; fits the probes and finds the latents.
      test: where splitting and absorption are measured.
      key: draws the null and the bootstrap.

    Raises:
      InputError: examples with a token axis, a decoder without fixed directions, or a concept whose probe finds none
        of its test examples.
    """
    thresholds, dictionary = thresholds or AbsorptionThresholds(), widened(dictionary)
    if train.x.ndim != 2 or test.x.ndim != 2:
        raise InputError("absorption is a score of single activations: pass x of shape [n, d_model]")
    w_dec = linear_decoder(dictionary)
    labels = np.asarray(test.labels)
    x, test_x = (jnp.asarray(examples.x, jnp.float32) for examples in (train, test))
    probes = fit_probes(x, jnp.asarray(train.labels))
    found = (np.asarray(test_x @ probes.weight.T + probes.bias[None, :]) > 0) & labels
    if not found.any(0).all():
        raise InputError(f"the probes of concepts {np.flatnonzero(~found.any(0)).tolist()} find none of their examples")

    positive, negative = class_means(dictionary, train, batch_size)
    ranked = best_latents(positive - negative, min(thresholds.max_k, w_dec.shape[0]), signed=True)
    sparse = k_sparse_probes(
        jnp.asarray(codes_at(dictionary, train, ranked, batch_size)),
        jnp.asarray(train.labels),
        tuple(range(1, ranked.shape[1] + 1)),
    )
    guessed = np.asarray(log_odds(sparse, jnp.asarray(codes_at(dictionary, test, ranked, batch_size)))) > 0
    f1 = 2 * (guessed & labels[None]).sum(1) / (guessed.sum(1) + labels.sum(0)[None, :])
    latents = [row[: n_split(f1[:, c], thresholds.f1_jump)] for c, row in enumerate(ranked)]

    k_null, k_boot = jax.random.split(key)
    shuffled = w_dec[jnp.asarray(generator(k_null).permutation(w_dec.shape[0]))]

    def scored(directions):
        shared = (dictionary, directions, test_x)
        per_concept = [
            _of_concept(*shared, probes.weight[c], latents[c], found[:, c], thresholds, batch_size)
            for c in range(labels.shape[1])
        ]
        return np.stack(per_concept, 2)

    own, null = scored(w_dec), scored(shuffled)
    counts = found.sum(0)

    def mean_of_found(totals):
        values, sizes = np.split(totals, 2, -1)
        shares = np.where(sizes > 0, values / np.maximum(sizes, 1), 0)
        # a resample may have drawn no example of a concept
        return shares.sum(-1) / np.maximum((sizes > 0).sum(-1), 1)

    estimates = [
        bootstrap(mean_of_found, np.concatenate([scores, found], 1), key=k)
        for scores, k in zip(own, jax.random.split(k_boot), strict=True)
    ]
    fractions, full_rates = own.sum(1) / counts[None, :]
    return Absorption(
        fraction=estimates[0],
        full_rate=estimates[1],
        fraction_null=float((null[0].sum(0) / counts).mean()),
        full_rate_null=float((null[1].sum(0) / counts).mean()),
        splits=float(np.mean([len(one) - 1 for one in latents])),
        fractions=fractions,
        full_rates=full_rates,
        latents=tuple(tuple(int(j) for j in one) for one in latents),
        f1=f1.T,
        n_found=counts,
    )


def _of_concept(
    dictionary, w_dec, x, direction, latents, found, thresholds, batch_size
) -> Float[np.ndarray, "score n"]:
    """Fraction and full absorption at the examples that the probe finds, 0 at the others."""
    places = np.flatnonzero(found)
    main = jnp.zeros(w_dec.shape[0], bool).at[jnp.asarray(latents)].set(True)
    out = np.zeros((2, len(found)))
    for rows, n in row_slices(len(places), batch_size):
        # every concept has another number of examples: one size serves all
        chosen = np.resize(places[rows], batch_size)
        scores = absorption_scores(dictionary, w_dec, x[chosen], direction, main, thresholds)
        out[:, chosen[:n]] = np.stack([np.asarray(s, np.float64)[:n] for s in scores])
    return out
