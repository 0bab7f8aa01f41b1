"""How well a dictionary reconstructs, how sparse it is, and what a model loses when it is spliced in."""

import dataclasses
from typing import Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

DENSITY_EDGES = tuple(np.linspace(-5.0, 0.0, 21))


@runtime_checkable
class Dictionary(Protocol):
    """What is evaluated: an `SAE`, a `PCA`, or any pytree with these two calls."""

    def encode(self, x: Array) -> Array: ...

    def __call__(self, x: Array) -> Array: ...


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number with its 95 % bootstrap interval."""

    value: float
    ci_low: float
    ci_high: float


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Scores of a dictionary on one set of tokens.

    Attributes:
      fraction_variance_unexplained: Σ‖x − x̂‖² / Σ‖x − mean‖², `mean` being the training data's.
      l0: codes per token that are not zero.
      dead_fraction: latents that fire on none of these tokens.
      cosine: mean cosine of x − mean and x̂ − mean.
      density: per latent, the fraction of tokens on which it fires.
      density_histogram: latents per bin of log10 density, between `DENSITY_EDGES`; dead latents are in none.
      n_tokens: tokens evaluated.
    """

    fraction_variance_unexplained: Estimate
    l0: float
    dead_fraction: float
    cosine: float
    density: np.ndarray
    density_histogram: np.ndarray
    n_tokens: int


def bootstrap_ratio(
    numerator: Float[Array, " block"], denominator: Float[Array, " block"], *, key: Array, resamples: int = 2000
) -> Estimate:
    """Σ numerator / Σ denominator, with the percentile interval of resampled blocks.

    Blocks are what is independent (sequences or documents): tokens of one text are not.

    Raises:
      ValueError: fewer than two blocks, or shapes that differ.
    """
    if numerator.shape != denominator.shape or numerator.shape[0] < 2:
        raise ValueError(f"need two or more blocks in equal number, got {numerator.shape} and {denominator.shape}")
    n = numerator.shape[0]
    drawn = jax.random.randint(key, (resamples, n), 0, n)
    ratios = numerator[drawn].sum(1) / denominator[drawn].sum(1)
    low, high = jnp.percentile(ratios, jnp.array([2.5, 97.5]))
    return Estimate(float(numerator.sum() / denominator.sum()), float(low), float(high))


@eqx.filter_jit
def _batch_scores(dictionary, x, mean):
    error = x - dictionary(x)
    centred = x - mean[None, :]
    guess = centred - error
    norms = jnp.linalg.norm(centred, axis=-1) * jnp.linalg.norm(guess, axis=-1)
    cosine = (centred * guess).sum(-1) / jnp.maximum(norms, 1e-30)
    fires = dictionary.encode(x) != 0
    return (error**2).sum(-1), (centred**2).sum(-1), cosine.sum(), fires.sum(0, dtype=jnp.int32)


def evaluate(
    dictionary: Dictionary,
    activations: Float[Array, "n d_model"],
    *,
    mean: Float[Array, " d_model"],
    blocks: Int[Array | np.ndarray, " token"],
    key: Array,
    batch_size: int = 2048,
) -> Evaluation:
    """Scores a dictionary on held-out activations.

    Args:
      dictionary: an `SAE`, a `PCA`, or anything with their calls.
      activations: one row per token.
      mean: of the *training* activations; predicting it is an FVU of 1 there.
      blocks: which sequence (or document) each token is from, counted from 0; the bootstrap draws these.
      key: draws the bootstrap.
      batch_size: tokens at a time; [batch_size, d_sae] codes are held at once.

    Raises:
      ValueError: `blocks` does not name one block per token.
    """
    n = activations.shape[0]
    if blocks.shape != (n,):
        raise ValueError(f"blocks must give one block per token, shape ({n},), got {blocks.shape}")
    batches = [_batch_scores(dictionary, activations[i : i + batch_size], mean) for i in range(0, n, batch_size)]
    errors, variances, cosines, fires = zip(*batches, strict=True)
    _, block = np.unique(np.asarray(blocks), return_inverse=True)
    per_block = [jnp.asarray(np.bincount(block, np.concatenate(a)), jnp.float32) for a in (errors, variances)]
    density = np.sum(fires, axis=0) / n
    with np.errstate(divide="ignore"):
        histogram, _ = np.histogram(np.log10(density), DENSITY_EDGES)
    return Evaluation(
        fraction_variance_unexplained=bootstrap_ratio(*per_block, key=key),
        l0=float(density.sum()),
        dead_fraction=float((density == 0).mean()),
        cosine=float(np.sum(cosines) / n),
        density=density,
        density_histogram=histogram,
        n_tokens=n,
    )


def cross_entropy_recovered(
    ce_clean: Float[Array, " sequence"],
    ce_spliced: Float[Array, " sequence"],
    ce_mean_ablated: Float[Array, " sequence"],
    *,
    key: Array,
) -> Estimate:
    """Share of what mean ablation costs that the spliced-in dictionary saves, (ablated − spliced) / (ablated − clean).

    The arguments are cross-entropies per sequence (mean over its tokens, or their sum); 1 is a splice without loss,
    0 one that is no better than the mean. The interval is from resampled sequences.

    Raises:
      ValueError: mean ablation costs nothing over all, so that the ratio has no meaning.
    """
    cost = ce_mean_ablated - ce_clean
    if not float(cost.sum()) > 0:
        raise ValueError(
            f"mean ablation must raise the cross-entropy; it changed it by {float(cost.mean()):.3g} on average"
        )
    return bootstrap_ratio(ce_mean_ablated - ce_spliced, cost, key=key)
