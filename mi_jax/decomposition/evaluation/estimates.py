"""Numbers with intervals, from blocks (sequences, documents, examples) that are independent of each other."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Array, Float

RESAMPLES = 2000


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval."""

    value: float
    ci_low: float
    ci_high: float


@dataclasses.dataclass(frozen=True)
class Null:
    """What chance gives: the mean of several draws, and the smallest and the largest of them."""

    mean: float
    smallest: float
    largest: float

    @classmethod
    def of(cls, draws: Float[np.ndarray, " draw"]) -> "Null":
        return cls(float(np.mean(draws)), float(np.min(draws)), float(np.max(draws)))


def generator(key: Array) -> np.random.Generator:
    """A generator of numpy's for what is drawn on the host."""
    return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray],
    sums: Float[np.ndarray, "block term"],
    *,
    key: Array,
    resamples: int = RESAMPLES,
) -> Estimate:
    """A function of totals over blocks, with the percentile interval of resampled blocks.

    Args:
      statistic: of `[… term]` totals, elementwise over the leading axes.
      sums: of every block.
      key: draws the blocks.

    Raises:
      ValueError: fewer than two blocks.
    """
    n = len(sums)
    if n < 2:
        raise ValueError(f"an interval needs two or more blocks, got {n}")
    sums = np.asarray(sums, np.float64)
    rng = generator(key)
    totals = np.empty((resamples, sums.shape[1]))
    # some at a time, so that a million blocks need no [resamples, block] array
    step = max(1, 2**24 // n)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        drawn = rng.integers(0, n, (rows, n)) + n * np.arange(rows)[:, None]
        totals[start : start + rows] = np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n) @ sums
    low, high = np.percentile(statistic(totals), [2.5, 97.5])
    return Estimate(float(statistic(sums.sum(0))), float(low), float(high))


def bootstrap_ratio(
    numerator: Float[Array | np.ndarray, " block"],
    denominator: Float[Array | np.ndarray, " other_block"],
    *,
    key: Array,
    resamples: int = RESAMPLES,
) -> Estimate:
    """Σ numerator / Σ denominator, with the percentile interval of resampled blocks.

    Blocks are what is independent (sequences or documents): tokens of one text are not.

    Raises:
      ValueError: fewer than two blocks, or shapes that differ.
    """
    if numerator.shape != denominator.shape or numerator.shape[0] < 2:
        raise ValueError(f"need two or more blocks in equal number, got {numerator.shape} and {denominator.shape}")
    sums = np.stack([np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)], 1)

    def ratio(totals):
        # a resample may have drawn no block that the denominator counts
        with np.errstate(divide="ignore", invalid="ignore"):
            return totals[..., 0] / totals[..., 1]

    return bootstrap(ratio, sums, key=key, resamples=resamples)


def bootstrap_mean(values: Float[Array | np.ndarray, " block"], *, key: Array, resamples: int = RESAMPLES) -> Estimate:
    """The mean of one number per block, with the percentile interval of resampled blocks.

    Raises:
      ValueError: fewer than two blocks.
    """
    return bootstrap_ratio(values, np.ones(values.shape[0]), key=key, resamples=resamples)


def jackknife(statistic: Callable[..., float], *sums: Float[np.ndarray, "group ..."]) -> Estimate:
    """A function of totals over groups of blocks, value ± 1.96 standard errors by leaving one group out at a time.

    SE² = (G − 1)/G · Σ_g (θ_g − mean θ)². For totals too large to keep per block, such as firings per latent.

    Args:
      statistic: of one total per argument.
      sums: `[group …]`; at least two groups.

    Raises:
      ValueError: fewer than two groups.
    """
    n = len(sums[0])
    if n < 2:
        raise ValueError(f"an interval needs two or more groups of blocks, got {n}")
    totals = [s.sum(0) for s in sums]
    left_out = np.array([statistic(*(t - s[g] for t, s in zip(totals, sums, strict=True))) for g in range(n)])
    error = float(np.sqrt((n - 1) / n * ((left_out - left_out.mean()) ** 2).sum()))
    value = float(statistic(*totals))
    return Estimate(value, value - 1.96 * error, value + 1.96 * error)
