"""Targeted probe perturbation (TPP) and spurious correlation removal (SCR), by the formulas of SAEBench.

Both ablate the n latents that matter most to a probe, x − Σ_{j∈S} z_j w_dec_j (what the dictionary does not explain
stays), and ask what probes of the activations still find. A probe is linear, so its log-odds change by
−Σ_{j∈S} z̄_j ⟨w_dec_j, w⟩, with z̄ the codes pooled over tokens; no ablated activation is formed.

Sources: Karvonen et al. 2025, "SAEBench" (arXiv 2503.09532); Marks et al. 2024, "Sparse feature circuits" (SHIFT).
"""

import dataclasses
from collections.abc import Iterator

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mi_jax.core.errors import InputError
from mi_jax.decomposition.evaluation.estimates import Estimate, Null, bootstrap, bootstrap_ratio, generator
from mi_jax.decomposition.evaluation.logistic import LogisticProbe, fit_probes
from mi_jax.decomposition.evaluation.pooling import (
    Examples,
    balanced_weights,
    class_means,
    codes_at,
    linear_decoder,
    mean_activations,
)
from mi_jax.decomposition.evaluation.reconstructor import Reconstructor

N_VALUES = (2, 5, 10, 20, 50, 100, 500)


@dataclasses.dataclass(frozen=True)
class TargetedPerturbation:
    """TPP for each number n of ablated latents; intervals from resampled test examples.

    Attributes:
      n_values: latents ablated.
      score: mean over classes of intended − unintended.
      intended: fall of balanced accuracy of the class's own probe.
      unintended: mean fall of the other classes' probes.
      null: score when n latents that fire are drawn at random.
      clean_accuracy: per class.
      latents: `[class n]`, most important first.
    """

    n_values: tuple[int, ...]
    score: tuple[Estimate, ...]
    intended: tuple[Estimate, ...]
    unintended: tuple[Estimate, ...]
    null: tuple[Null, ...]
    clean_accuracy: np.ndarray
    latents: np.ndarray


@dataclasses.dataclass(frozen=True)
class SpuriousRemoval:
    """SCR for each number n of ablated latents; intervals from resampled test examples.

    Attributes:
      n_values: latents ablated.
      score: (changed − original) / (clean − original), 0 where the denominator is below 0.001.
      null: the same when n latents that fire are drawn at random.
      kept: 0 or 1, the attribute that the biased probe is to be left with; the one it reads worse.
      original_accuracy: of the biased probe on that attribute, on test examples without the correlation.
      clean_accuracy: of a probe trained without the correlation.
      changed_accuracy: of the biased probe after the ablation, for each n.
    """

    n_values: tuple[int, ...]
    score: tuple[Estimate, ...]
    null: tuple[Null, ...]
    kept: int
    original_accuracy: float
    clean_accuracy: float
    changed_accuracy: np.ndarray


def probe_effects(
    difference: Float[np.ndarray, "concept d_sae"],
    w_dec: Float[Array, "d_sae d_model"],
    probes: LogisticProbe,
    *,
    signed: bool,
) -> Float[np.ndarray, "concept d_sae"]:
    """Effect of each latent on each probe, (mean code with the concept − without) · ⟨w_dec_j, w⟩.

    `signed` (TPP) counts only latents that fire more with the concept; else (SCR) the effects are absolute.
    """
    along = np.asarray(probes.weight @ w_dec.T, np.float64)
    return np.maximum(difference, 0) * along if signed else np.abs(difference * along)


def _ranked(effects: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The n largest effects per concept, and how many of them may count: effects of 0 are no effects."""
    order = np.argsort(-effects, axis=1, kind="stable")[:, :n]
    return order, np.minimum((effects != 0).sum(1), n)


@eqx.filter_jit
def _removed(codes: Array, w_dec: Array, latents: Array, limits: Array, probes: LogisticProbe) -> Array:
    """Fall of the log-odds of every probe when the first `limits` latents are ablated, `[limit n probe]`."""
    along = w_dec[latents] @ probes.weight.T
    keep = jnp.arange(codes.shape[1])[None, :] < limits[:, None]
    return jnp.einsum("nj,vj,jc->vnc", codes, keep.astype(codes.dtype), along)


def targeted_probe_perturbation(
    dictionary: Reconstructor,
    train: Examples,
    test: Examples,
    *,
    key: Array,
    n_values: tuple[int, ...] = N_VALUES,
    null_draws: int = 5,
    batch_size: int = 256,
) -> TargetedPerturbation:
    """Whether ablating the latents of one class hurts its probe and no other.

    Args:
      dictionary: with fixed decoder directions.
      train: fits one probe per class and finds its latents; labels from `one_vs_rest`.
      test: measures accuracies, with both sides of each probe counting alike.
      key: draws the null and the bootstrap.
      n_values: those over d_sae are left out.

    Raises:
      InputError: fewer than two classes, or a decoder without fixed directions.
    """
    setting = _Setting.of(dictionary, train, test, n_values, batch_size)
    n_classes = train.labels.shape[1]
    if n_classes < 2:
        raise InputError("TPP compares classes: give labels of two or more, such as one_vs_rest(classes)")
    probes = fit_probes(mean_activations(train, batch_size), jnp.asarray(train.labels))
    logits = np.asarray(mean_activations(test, batch_size) @ probes.weight.T + probes.bias[None, :])
    labels = np.asarray(test.labels)
    weights = balanced_weights(labels)
    clean = ((logits > 0) == labels) * weights
    effects = probe_effects(setting.difference, setting.w_dec, probes, signed=True)

    def falls(order, limits) -> Float[np.ndarray, "ablated value n probe"]:
        out = []
        for removed in setting.removed(order, limits, probes):
            out.append(clean[None] - (((logits[None] - removed) > 0) == labels[None]) * weights[None])
        return np.stack(out)

    def parts(fall) -> tuple[np.ndarray, np.ndarray]:
        """Per value and example: the mean fall of own probes and of the others."""
        own = np.einsum("cvnc->vnc", fall)
        return own.mean(-1), (fall.sum(-1).transpose(1, 2, 0) - own).mean(-1) / (n_classes - 1)

    order, limits = _ranked(effects, setting.n_values[-1])
    intended, unintended = parts(falls(order, limits))
    k_null, k_boot = jax.random.split(key)
    draws = []
    for random_order, random_limits in setting.random_orders(k_null, null_draws, n_classes):
        a, b = parts(falls(random_order, random_limits))
        draws.append((a - b).sum(1))

    def estimates(values):
        n = values.shape[1]
        return tuple(
            bootstrap_ratio(row * n, np.ones(n), key=k)
            for row, k in zip(values, jax.random.split(k_boot, len(values)), strict=True)
        )

    return TargetedPerturbation(
        n_values=setting.n_values,
        score=estimates(intended - unintended),
        intended=estimates(intended),
        unintended=estimates(unintended),
        null=tuple(Null.of(values) for values in np.stack(draws, 1)),
        clean_accuracy=clean.sum(0),
        latents=order,
    )


def spurious_correlation_removal(
    dictionary: Reconstructor,
    train: Examples,
    test: Examples,
    *,
    key: Array,
    n_values: tuple[int, ...] = N_VALUES,
    null_draws: int = 5,
    batch_size: int = 256,
) -> SpuriousRemoval:
    """Whether ablating the latents of a spurious attribute frees a biased probe of it.

    The biased probe is trained where both attributes agree, so it cannot tell them apart.

    Args:
      dictionary: with fixed decoder directions.
      train, test: labels `[n 2]`, two attributes in all four combinations.
      key: draws the null and the bootstrap.
      n_values: those over d_sae are left out.

    Raises:
      InputError: not two attributes, a combination without examples, or a decoder without fixed directions.
    """
    setting = _Setting.of(dictionary, train, test, n_values, batch_size)
    y, labels = np.asarray(train.labels), np.asarray(test.labels)
    for name, side in (("train", y), ("test", labels)):
        if side.shape[1] != 2 or len(np.unique(side @ np.array([1, 2]))) < 4:
            raise InputError(f"SCR needs two attributes in all four combinations; the {name} labels do not have them")
    x = mean_activations(train, batch_size)
    agree = y[:, 0] == y[:, 1]
    clean_probes = fit_probes(x, jnp.asarray(y))
    biased = fit_probes(x[np.flatnonzero(agree)], jnp.asarray(y[agree, :1]))
    test_x, weights = mean_activations(test, batch_size), balanced_weights(labels)
    logits = np.asarray(test_x @ biased.weight.T + biased.bias[None, :])[:, 0]
    kept = int(np.argmin((((logits > 0)[:, None] == labels) * weights).sum(0)))
    target, weight = labels[:, kept], weights[:, kept]
    original = ((logits > 0) == target) * weight
    clean_logits = np.asarray(test_x @ clean_probes.weight[kept] + clean_probes.bias[kept])
    clean = ((clean_logits > 0) == target) * weight
    effects = probe_effects(setting.difference, setting.w_dec, clean_probes, signed=False)[1 - kept]

    def changed(order, limit) -> Float[np.ndarray, "value n"]:
        removed = next(setting.removed(order[None], limit[None], biased))[..., 0]
        return (((logits[None] - removed) > 0) == target[None]) * weight[None]

    def score(totals):
        gain, room = totals[..., 0], totals[..., 1]
        return np.where(room < 1e-3, 0.0, gain / np.where(room < 1e-3, 1.0, room))

    order, limits = _ranked(effects[None], setting.n_values[-1])
    after = changed(order[0], limits[0])
    k_null, k_boot = jax.random.split(key)
    draws = []
    for random_order, random_limits in setting.random_orders(k_null, null_draws, 1):
        gain = (changed(random_order[0], random_limits[0]) - original[None]).sum(1)
        draws.append(score(np.stack([gain, np.full_like(gain, (clean - original).sum())], -1)))
    return SpuriousRemoval(
        n_values=setting.n_values,
        score=tuple(
            bootstrap(score, np.stack([row - original, clean - original], 1), key=k)
            for row, k in zip(after, jax.random.split(k_boot, len(after)), strict=True)
        ),
        null=tuple(Null.of(values) for values in np.stack(draws, 1)),
        kept=kept,
        original_accuracy=float(original.sum()),
        clean_accuracy=float(clean.sum()),
        changed_accuracy=after.sum(1),
    )


@dataclasses.dataclass(frozen=True)
class _Setting:
    """What both scores compute once."""

    dictionary: Reconstructor
    test: Examples
    w_dec: Float[Array, "d_sae d_model"]
    difference: Float[np.ndarray, "concept d_sae"]
    alive: Int[np.ndarray, " n"]
    n_values: tuple[int, ...]
    batch_size: int

    @classmethod
    def of(cls, dictionary, train: Examples, test: Examples, n_values, batch_size) -> "_Setting":
        w_dec = linear_decoder(dictionary)
        values = tuple(sorted(n for n in n_values if n <= w_dec.shape[0]))
        if not values or values[0] < 1:
            raise InputError(f"n_values must hold numbers from 1 to d_sae={w_dec.shape[0]}; got {n_values}")
        if train.labels.shape[1] != test.labels.shape[1]:
            raise InputError(f"{train.labels.shape[1]} concepts to train on, {test.labels.shape[1]} to test")
        positive, negative = class_means(dictionary, train, batch_size)
        fires: Bool[np.ndarray, " d_sae"] = (positive + negative != 0).any(0)
        return cls(dictionary, test, w_dec, positive - negative, np.flatnonzero(fires), values, batch_size)

    def removed(self, orders: np.ndarray, limits: np.ndarray, probes: LogisticProbe) -> Iterator[np.ndarray]:
        """Per row of `orders`, the fall of the log-odds for every number of latents, `[value n probe]`."""
        codes = codes_at(self.dictionary, self.test, orders, self.batch_size)
        for i, (latents, limit) in enumerate(zip(orders, limits, strict=True)):
            numbers = jnp.asarray(np.minimum(self.n_values, limit))
            fall = _removed(jnp.asarray(codes[:, i]), self.w_dec, jnp.asarray(latents), numbers, probes)
            yield np.asarray(fall, np.float64)

    def random_orders(self, key: Array, draws: int, n_concepts: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """As many latents that fire, in random order; `n_values` beyond their number ablate all of them."""
        rng, n = generator(key), self.n_values[-1]
        for _ in range(draws):
            orders = np.stack([np.resize(rng.permutation(self.alive), n) for _ in range(n_concepts)])
            yield orders, np.full(n_concepts, min(n, len(self.alive)))
