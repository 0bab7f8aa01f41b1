"""How good a monitor is: ranking, rate of detection at a calibrated threshold, and how early it warns."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import optimize, stats

from mi_jax.core.errors import InputError
from mi_jax.features.detection import auroc

_Z = float(stats.norm.ppf(0.975))


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
    """How early a monitor warns.

    Attributes:
      values: tokens from the alarm to the event, over the sequences whose alarm comes after its cause and before it.
      premature: sequences whose alarm comes before the cause, so that it cannot have been raised by it.
      n: all sequences.
    """

    values: tuple[int, ...]
    premature: int
    n: int

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
    """The running score just before `end`: what the monitor knows before the event, or at the end of the sequence.

    An event at the first token leaves nothing to be known: −∞.

    Raises:
      InputError: an end outside the sequence (its length is the last one there is).
    """
    length = running.shape[1]
    if ((end < 0) | (end > length)).any():
        raise InputError(f"sequences of {length} tokens end at 0 to {length}; got {int(end.min())} to {int(end.max())}")
    before = np.take_along_axis(running, np.maximum(end, 1)[:, None] - 1, axis=1)[:, 0]
    return np.where(end > 0, before, -np.inf)


def lead(
    alarms: Bool[np.ndarray, "batch pos"], event: Int[np.ndarray, " batch"], cause: Int[np.ndarray, " batch"]
) -> Lead:
    """Lead of every sequence whose first alarm comes at its cause or later, and before the event.

    An alarm before the cause is a false one that happens to precede an event: it is counted apart, as premature.

    Args:
      alarms: True from the token on at which the alarm is raised.
      event: index of the token that is warned of.
      cause: index of the token at which the event can be known for the first time.

    Raises:
      InputError: a cause at or after its event.
    """
    if (cause >= event).any():
        i = int(np.argmax(cause >= event))
        raise InputError(
            f"a cause comes before its event; in sequence {i} it is at {cause[i]}, the event at {event[i]}"
        )
    first = np.where(alarms.any(1), alarms.argmax(1), alarms.shape[1])
    detected = (first >= cause) & (first < event)
    return Lead(tuple((event - first)[detected].tolist()), int((first < cause).sum()), len(event))


def auroc_interval(scores: Float[np.ndarray, " n"], labels: Bool[np.ndarray, " n"]) -> tuple[float, float, float]:
    """AUROC θ̂ and its 95 % score interval, which is right where the classes separate: θ̂ = 1 has a lower end below 1.

    The interval holds every θ with `|θ̂ − θ| ≤ 1.96 √V(θ)`. V is the larger of two variances, with m positives, n
    negatives and `N = (m + n) / 2`: Hanley and McNeil's

        V(θ) = θ (1 − θ) [1 + (N − 1) ((1 − θ) / (2 − θ) + θ / (1 + θ))] / (m n)

    and DeLong's of these scores, scaled by `θ (1 − θ) / θ̂ (1 − θ̂)`: the first takes both classes to spread alike, the
    second vanishes where they separate, so that by itself its interval would be [1, 1].

    Source: Newcombe 2006, "Confidence intervals for an effect size measure based on the Mann–Whitney statistic", part
    2, method 5 (the first variance); DeLong et al. 1988 (the second).

    Raises:
      ValueError: only one class is there.
    """
    value = auroc(scores, labels)
    m, n = int(np.sum(labels)), int(np.sum(~labels))
    half = (m + n) / 2 - 1
    seen = _delong_variance(scores, labels) / (value * (1 - value)) if 0 < value < 1 else 0.0

    def excess(theta: float) -> float:
        alike = (1 + half * ((1 - theta) / (2 - theta) + theta / (1 + theta))) / (m * n)
        return (value - theta) ** 2 - _Z**2 * theta * (1 - theta) * max(alike, seen)

    # positive at 0 and 1 and negative next to θ̂, unless θ̂ is one of the two: there the interval ends
    def end(one: float, other: float) -> float:
        return float(optimize.root_scalar(excess, bracket=(one, other)).root)

    low = end(0.0, value - 1e-12) if value > 1e-9 else 0.0
    high = end(value + 1e-12, 1.0) if value < 1 - 1e-9 else 1.0
    return value, low, high


def _delong_variance(scores: np.ndarray, labels: np.ndarray) -> float:
    """Variance of the AUROC from how the values of each class are placed among those of the other; 0 for one value."""
    ranks, parts = stats.rankdata(scores), []
    for own in (labels, ~labels):
        placed = (ranks[own] - stats.rankdata(scores[own])) / (~own).sum()
        parts.append(placed.var(ddof=1) / own.sum() if own.sum() > 1 else 0.0)
    return float(sum(parts))


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
