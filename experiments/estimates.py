"""Figures with their intervals, under the names that results.json uses."""

import numpy as np
from scipy import stats


def with_interval(name: str, value: float, low: float, high: float) -> dict[str, float]:
    """A figure and its interval."""
    return {name: float(value), f"{name}_ci_low": float(low), f"{name}_ci_high": float(high)}


def proportion(name: str, hits) -> dict[str, float]:
    """A share with its exact (Clopper–Pearson) 95 % interval."""
    hits = np.asarray(hits, bool)
    interval = stats.binomtest(int(hits.sum()), hits.size).proportion_ci(0.95)
    return with_interval(name, hits.mean(), interval.low, interval.high)


def mean(name: str, values, *, seed: int = 0) -> dict[str, float]:
    """A mean with its bootstrap 95 % interval over the first axis."""
    values = np.asarray(values, np.float64)
    draws = np.random.default_rng(seed).integers(0, len(values), (2000, len(values)))
    low, high = np.quantile(values[draws].reshape(2000, -1).mean(1), [0.025, 0.975])
    return with_interval(name, values.mean(), low, high)
