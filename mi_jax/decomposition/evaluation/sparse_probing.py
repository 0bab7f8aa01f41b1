"""Sparse probing: how well the k best latents tell a concept, by the formulas of SAEBench.

Sources: Gurnee et al. 2023, "Finding neurons in a haystack"; Karvonen et al. 2025, "SAEBench" (arXiv 2503.09532).
"""

import dataclasses
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mi_jax.core.errors import InputError
from mi_jax.decomposition.evaluation.estimates import Estimate, Null, bootstrap_ratio, generator
from mi_jax.decomposition.evaluation.logistic import LogisticProbe, balanced, fit_logistic, fit_probes
from mi_jax.decomposition.evaluation.pooling import (
    Examples,
    balanced_weights,
    class_means,
    codes_at,
    mean_activations,
)
from mi_jax.decomposition.evaluation.reconstructor import Reconstructor


@dataclasses.dataclass(frozen=True)
class SparseProbing:
    """Balanced accuracy on test examples, mean over concepts; guessing gives 0.5.

    Attributes:
      ks: numbers of latents.
      accuracy: of a logistic probe on the k latents whose mean codes differ most between the classes, for each k.
      null: of a probe on k latents drawn among those that fire.
      activations: of a probe on all dimensions of the activations.
      per_concept: `[k concept]`.
      latents: `[concept max_k]`, best first.
    """

    ks: tuple[int, ...]
    accuracy: tuple[Estimate, ...]
    null: tuple[Null, ...]
    activations: Estimate
    per_concept: np.ndarray
    latents: np.ndarray


def best_latents(
    difference: Float[np.ndarray, "concept d_sae"], k: int, *, signed: bool = False
) -> Int[np.ndarray, "concept k"]:
    """Latents with the largest |mean of the positive − mean of the negative class|, best first.

    Args:
      signed: the largest difference itself: latents that speak for the concept.

    Raises:
      InputError: k is not between 1 and d_sae.
    """
    if not 1 <= k <= difference.shape[1]:
        raise InputError(f"k must be from 1 to d_sae={difference.shape[1]}, got {k}")
    score = difference if signed else np.abs(difference)
    return np.argsort(-score, axis=1, kind="stable")[:, :k]


@partial(jax.jit, static_argnames="ks")
def k_sparse_probes(
    codes: Float[Array, "n concept max_k"], labels: Bool[Array, "n concept"], ks: tuple[int, ...]
) -> LogisticProbe:
    """Class-balanced probes on the first k places for each k; leaves have leading axes k and concept."""

    def fit(x, y, k):
        # an absent column is a column of zeros: its weight stays zero
        return fit_logistic(jnp.where((jnp.arange(x.shape[1]) < k)[None, :], x, 0), y, balanced(y))

    over_concepts = jax.vmap(fit, in_axes=(1, 1, None))
    return jax.vmap(over_concepts, in_axes=(None, None, 0))(codes, labels, jnp.asarray(ks))


@eqx.filter_jit
def log_odds(probes: LogisticProbe, codes: Float[Array, "n concept d_in"]) -> Float[Array, "k n concept"]:
    """Of every example, by every probe."""
    return jnp.einsum("ncd,kcd->knc", codes, probes.weight) + probes.bias[:, None, :]


def sparse_probing(
    dictionary: Reconstructor,
    train: Examples,
    test: Examples,
    *,
    key: Array,
    ks: tuple[int, ...] = (1, 2, 5),
    null_draws: int = 5,
    batch_size: int = 256,
) -> SparseProbing:
    """Probes on the k best latents, beside k random latents and the activations themselves.

    Args:
      dictionary: its codes are pooled over the tokens of an example.
      train: chooses the latents and fits the probes (L2-regularised, C = 1, classes balanced).
      test: measures the accuracy.
      key: draws the null's latents and the bootstrap of test examples.

    Raises:
      InputError: more latents than there are, or examples whose concepts do not match.
    """
    if train.labels.shape[1] != test.labels.shape[1]:
        raise InputError(f"{train.labels.shape[1]} concepts to train on, {test.labels.shape[1]} to test")
    ks, k_max = tuple(ks), max(ks)
    positive, negative = class_means(dictionary, train, batch_size)
    latents = best_latents(positive - negative, k_max)
    k_null, k_boot = jax.random.split(key)
    y, test_labels = jnp.asarray(train.labels), np.asarray(test.labels)
    weights = balanced_weights(test_labels)

    # latents that fire on some training example, else all
    alive = np.flatnonzero((positive + negative != 0).any(0))
    alive = alive if len(alive) >= k_max else np.arange(positive.shape[1])
    rng = generator(k_null)
    drawn = [[rng.permutation(alive)[:k_max] for _ in latents] for _ in range(null_draws)]
    # one pass over the examples serves the best latents and all draws
    chosen = np.concatenate([latents[None], np.reshape(drawn, (null_draws, *latents.shape)).astype(latents.dtype)])
    codes, test_codes = (jnp.asarray(codes_at(dictionary, side, chosen, batch_size)) for side in (train, test))

    def correct(i: int) -> Bool[np.ndarray, "k n concept"]:
        scores = log_odds(k_sparse_probes(codes[:, i], y, ks), test_codes[:, i])
        return (np.asarray(scores) > 0) == test_labels[None]

    own = correct(0)
    draws = [(correct(1 + i) * weights[None]).sum(1).mean(1) for i in range(null_draws)]
    dense = fit_probes(mean_activations(train, batch_size), y)
    scores = mean_activations(test, batch_size) @ dense.weight.T + dense.bias[None, :]
    keys = jax.random.split(k_boot, len(ks) + 1)

    def estimate(right: np.ndarray, key: Array) -> Estimate:
        return bootstrap_ratio((right * weights).sum(1), weights.sum(1), key=key)

    return SparseProbing(
        ks=ks,
        accuracy=tuple(estimate(right, k) for right, k in zip(own, keys, strict=False)),
        null=tuple(Null.of(values) for values in np.stack(draws, 1)),
        activations=estimate((np.asarray(scores) > 0) == test_labels, keys[-1]),
        per_concept=(own * weights[None]).sum(1),
        latents=latents,
    )
