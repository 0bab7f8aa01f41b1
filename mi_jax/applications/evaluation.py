"""How good a monitor is: ranking, rate of detection at a calibrated threshold, and how early it warns."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import stats

from mi_jax.features.detection import auroc


@dataclasses.dataclass(frozen=True)
class Rate:
    """A share of sequences with its exact (Clopper–Pearson) 95 % interval."""

    value: float
    ci_low: float
    ci_high: float
    n: int


def rate(hits: Bool[np.ndarray, " n"]) -> Rate:
    """The share of True.

    Raises:
      ValueError: nothing to count.
    """
    hits = np.asarray(hits, bool)
    if not hits.size:
        raise ValueError("a rate needs at least one sequence")
    interval = stats.binomtest(int(hits.sum()), hits.size).proportion_ci(0.95)
    return Rate(float(hits.mean()), float(interval.low), float(interval.high), hits.size)


@dataclasses.dataclass(frozen=True)
class Lead:
    """Tokens from the alarm to the event, over the sequences that were detected before it."""

    values: tuple[int, ...]

    @property
    def median(self) -> float:
        return float(np.median(self.values))

    @property
    def quartiles(self) -> tuple[float, float]:
        low, high = np.quantile(self.values, [0.25, 0.75])
        return float(low), float(high)


def sequence_scores(
    running: Float[np.ndarray, "batch pos"], end: Int[np.ndarray, " batch"]
) -> Float[np.ndarray, " batch"]:
    """The running score just before `end`: what the monitor knows before the event, or at the end of the sequence."""
    return np.take_along_axis(running, end[:, None] - 1, axis=1)[:, 0]


def lead(alarms: Bool[np.ndarray, "batch pos"], event: Int[np.ndarray, " batch"]) -> Lead:
    """Lead of every sequence whose alarm comes before the event."""
    first = np.where(alarms.any(1), alarms.argmax(1), alarms.shape[1])
    detected = first < event
    return Lead(tuple((event - first)[detected].tolist()))


def auroc_interval(
    scores: Float[np.ndarray, " n"], labels: Bool[np.ndarray, " n"], *, seed: int, n_boot: int = 1000
) -> tuple[float, float, float]:
    """AUROC and its 95 % bootstrap interval, positives and negatives resampled apart."""
    rng = np.random.default_rng(seed)
    positive, negative = scores[labels], scores[~labels]
    truth = np.repeat([True, False], [len(positive), len(negative)])
    draws = [
        auroc(np.concatenate([rng.choice(positive, len(positive)), rng.choice(negative, len(negative))]), truth)
        for _ in range(n_boot)
    ]
    low, high = np.quantile(draws, [0.025, 0.975])
    return auroc(scores, labels), float(low), float(high)


def roc(scores: Float[np.ndarray, " n"], labels: Bool[np.ndarray, " n"]) -> tuple[Sequence[float], Sequence[float]]:
    """False- and true-positive rates over all thresholds, from (0, 0) to (1, 1), at most 200 points."""
    order = np.argsort(-scores, kind="stable")
    hit = labels[order]
    # equal scores fall together
    last = np.append(np.diff(scores[order]) != 0, True)
    tpr = np.append(0.0, (np.cumsum(hit) / hit.sum())[last])
    fpr = np.append(0.0, (np.cumsum(~hit) / (~hit).sum())[last])
    keep = np.unique(np.linspace(0, len(tpr) - 1, 200).round().astype(int))
    return fpr[keep].tolist(), tpr[keep].tolist()
