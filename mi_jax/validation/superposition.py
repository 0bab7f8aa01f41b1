"""Synthetic superposition: activations whose dictionary and codes are known.

    x = z D + ε,    D [d_sae d_model] with rows of unit length,    z ≥ 0 sparse,    ε normal

Frequencies follow Zipf's law. Features can form trees, in which a child fires only if its parent does, and trees can
fire together. Both make it hard to learn the features that are there: a child absorbs its parent, and features that
fire together merge. What a dictionary finds is compared with `dictionary` and `codes`.

Source: the generator follows SynthSAEBench (arXiv 2602.14687); co-firing by a Gaussian copula leaves frequencies exact.
"""

import dataclasses
import math
from typing import Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from mi_jax.core.errors import InputError
from mi_jax.decomposition.coherence import Coherence, coherence
from mi_jax.decomposition.recovery import one_step_sparsity
from mi_jax.models.config import check_choices


@dataclasses.dataclass(frozen=True)
class SuperpositionConfig:
    """What is drawn.

    Attributes:
      mean_l0: features that fire per sample, on average.
      zipf_exponent: the i-th feature's frequency is proportional to (i + 1)^-exponent; 0 makes all alike.
      max_frequency: of a feature; what is cut off here is shared out among the others.
      n_roots: features without a parent, the most frequent ones; None means all. The others fill trees level by level.
      branching: children of a parent.
      correlation: of the normal variables that decide which roots fire; 0 leaves them independent.
      correlation_structure: "blocks" cuts the roots into `n_factors` runs of neighbours in frequency, whose members
        have `correlation` with each other and none with the rest. "low_rank" gives each root a random direction in
        `n_factors` dimensions; two roots have `correlation` times the cosine of theirs.
      amplitude: of a feature that fires: uniform on [1 − spread, 1 + spread], or lognormal with median 1 and `spread`
        the standard deviation of its logarithm.
      noise: standard deviation of ε in every coordinate.
    """

    n_features: int = 512
    d_model: int = 64
    mean_l0: float = 4.0
    zipf_exponent: float = 1.0
    max_frequency: float = 0.5
    n_roots: int | None = None
    branching: int = 4
    correlation: float = 0.0
    correlation_structure: Literal["blocks", "low_rank"] = "blocks"
    n_factors: int = 16
    amplitude: Literal["uniform", "lognormal"] = "uniform"
    amplitude_spread: float = 0.5
    noise: float = 0.0

    def __post_init__(self):
        check_choices(self)
        for field in ("n_features", "d_model", "branching", "n_factors"):
            if getattr(self, field) < 1:
                raise InputError(f"{field} must be at least 1, got {getattr(self, field)}")
        if not 1 <= self.roots <= self.n_features:
            raise InputError(f"n_roots must be from 1 to n_features={self.n_features}, or None; got {self.n_roots}")
        if not 0 < self.max_frequency < 1 or not 0 < self.mean_l0 < self.n_features * self.max_frequency:
            raise InputError(
                f"{self.n_features} features of frequency at most {self.max_frequency} (below 1) fire fewer than "
                f"{self.n_features * self.max_frequency:g} at a time; got mean_l0={self.mean_l0}"
            )
        if not 0 <= self.correlation < 1 or self.zipf_exponent < 0 or self.noise < 0:
            raise InputError(
                "correlation is in [0, 1), zipf_exponent and noise at least 0; got "
                f"{self.correlation}, {self.zipf_exponent} and {self.noise}"
            )
        if self.amplitude_spread < 0 or (self.amplitude == "uniform" and self.amplitude_spread >= 1):
            raise InputError(
                f"amplitude_spread is at least 0, and below 1 where uniform; got {self.amplitude_spread}: "
                "amplitudes would not be positive"
            )

    @property
    def roots(self) -> int:
        """Features without a parent."""
        return self.n_features if self.n_roots is None else self.n_roots

    @property
    def z_ratio(self) -> float:
        """The smallest amplitude over the root of the mean square one; 0 where amplitudes have no bound above 0."""
        if self.amplitude == "uniform":
            return (1 - self.amplitude_spread) / math.sqrt(1 + self.amplitude_spread**2 / 3)
        return 0.0 if self.amplitude_spread else 1.0

    @property
    def one_step_sparsity(self) -> int:
        """How many features may fire together for a tied encoder to typically tell which; noise is not counted."""
        return one_step_sparsity(self.d_model, self.n_features, self.z_ratio)


class Sample(NamedTuple):
    """Activations and the codes that made them."""

    x: Float[Array, "batch d_model"]
    codes: Float[Array, "batch feature"]


class Superposition(eqx.Module):
    """A dictionary and the distribution of its codes; make one with `superposition`.

    Attributes:
      frequencies: probability of each feature, in descending order.
      parents: of each feature, −1 for a root.
    """

    config: SuperpositionConfig = eqx.field(static=True)
    dictionary: Float[Array, "feature d_model"]
    frequencies: Float[Array, " feature"]
    parents: Int[Array, " feature"]
    thresholds: Float[Array, " feature"]
    loadings: Float[Array, "feature factor"]

    @property
    def mean_l0(self) -> Float[Array, ""]:
        """Features that fire per sample, on average."""
        return self.frequencies.sum()

    @property
    def coherence(self) -> Coherence:
        """How far the directions are from orthogonal."""
        return coherence(self.dictionary)

    def sample(self, n: int, *, key: PRNGKeyArray) -> Sample:
        """n independent samples. Batch t of a stream is `sample(n, key=jax.random.fold_in(key, t))`."""
        k_codes, k_noise = jax.random.split(key)
        codes = self.codes(n, key=k_codes)
        x = codes @ self.dictionary
        return Sample(x + self.config.noise * jax.random.normal(k_noise, x.shape, x.dtype), codes)

    def codes(self, n: int, *, key: PRNGKeyArray) -> Float[Array, "batch feature"]:
        """The codes of n samples."""
        k_fires, k_amplitude = jax.random.split(key)
        fires = self.fires(n, key=k_fires)
        spread = self.config.amplitude_spread
        if self.config.amplitude == "uniform":
            amplitude = jax.random.uniform(k_amplitude, fires.shape, minval=1 - spread, maxval=1 + spread)
        else:
            amplitude = jnp.exp(spread * jax.random.normal(k_amplitude, fires.shape))
        return jnp.where(fires, amplitude, 0.0)

    def fires(self, n: int, *, key: PRNGKeyArray) -> Bool[Array, "batch feature"]:
        """Which features fire in n samples."""
        k_shared, k_own = jax.random.split(key)
        n_features, n_factors = self.loadings.shape
        shared = jax.random.normal(k_shared, (n, n_factors)) @ self.loadings.T
        own = jnp.sqrt(1 - jnp.square(self.loadings).sum(1))[None, :] * jax.random.normal(k_own, (n, n_features))
        opens = shared + own < self.thresholds[None, :]
        fires = opens
        for _ in range(_depth(self.config)):
            fires = opens & jnp.where(self.parents[None, :] < 0, True, fires[:, self.parents])
        return fires


def superposition(config: SuperpositionConfig, *, key: PRNGKeyArray) -> Superposition:
    """Draws a dictionary of random unit directions, and works out when its features fire.

    Example:
      `truth = superposition(SuperpositionConfig(n_features=256, d_model=32), key=jax.random.key(0))` and then
      `x, codes = jax.jit(lambda t: truth.sample(1024, key=jax.random.fold_in(key, t)))(step)`

    Raises:
      InputError: trees in which a child is as frequent as its parent, so that the two could not be told apart.
    """
    k_dictionary, k_loadings = jax.random.split(key)
    frequencies, parents = _frequencies(config), _parents(config)
    conditional = np.where(parents < 0, frequencies, frequencies / frequencies[parents])
    if (conditional > 0.99).any():
        child = int(np.argmax(conditional))
        raise InputError(
            f"feature {child} fires whenever its parent {parents[child]} does: both have frequency "
            f"{frequencies[child]:.3g}; raise zipf_exponent or branching, or lower mean_l0 or max_frequency"
        )
    directions = jax.random.normal(k_dictionary, (config.n_features, config.d_model))
    return Superposition(
        config=config,
        dictionary=directions / jnp.linalg.norm(directions, axis=1, keepdims=True),
        frequencies=jnp.asarray(frequencies, jnp.float32),
        parents=jnp.asarray(parents, jnp.int32),
        thresholds=jnp.asarray(scipy.stats.norm.ppf(conditional), jnp.float32),
        loadings=_loadings(config, key=k_loadings),
    )


def _frequencies(config: SuperpositionConfig) -> np.ndarray:
    """Zipf's law, cut off at the largest frequency allowed, and scaled to the mean L0."""
    law = np.arange(1, config.n_features + 1, dtype=np.float64) ** -config.zipf_exponent
    low, high = 0.0, config.max_frequency / law[-1]
    for _ in range(200):
        middle = (low + high) / 2
        enough = np.minimum(middle * law, config.max_frequency).sum() >= config.mean_l0
        low, high = (low, middle) if enough else (middle, high)
    return np.minimum(high * law, config.max_frequency)


def _parents(config: SuperpositionConfig) -> np.ndarray:
    number = np.arange(config.n_features)
    return np.where(number < config.roots, -1, (number - config.roots) // config.branching)


def _depth(config: SuperpositionConfig) -> int:
    """Levels of the trees below their roots."""
    depth, last = 0, config.n_features - 1
    while last >= config.roots:
        depth, last = depth + 1, (last - config.roots) // config.branching
    return depth


def _loadings(config: SuperpositionConfig, *, key: PRNGKeyArray) -> Float[Array, "feature factor"]:
    """The loadings of the features' normal variables on shared factors; their inner products are the correlations."""
    number = jnp.arange(config.n_features, dtype=jnp.int32)
    if config.correlation_structure == "blocks":
        rows = jax.nn.one_hot(number * config.n_factors // config.roots, config.n_factors)
    else:
        rows = jax.random.normal(key, (config.n_features, config.n_factors))
        rows = rows / jnp.linalg.norm(rows, axis=1, keepdims=True)
    return jnp.where((number < config.roots)[:, None], config.correlation**0.5 * rows, 0.0)
