"""How well edge scores rank the edges of a known circuit above all others.

AUROC is the probability that a true edge scores above another one, ties counting half (the Mann–Whitney statistic).
Average precision is `Σ_k (R_k − R_{k−1}) P_k` over the distinct scores; chance is the fraction of true edges.

`mib_auroc` is what MIB's InterpBench column shows under that name (Mueller et al. 2025): greedy circuits at ten sizes,
the trapezoid of TPR over FPR / FPR of the last, with no point at (0, 0). It is no area under a ROC curve: the part
before the first circuit is missing, so a perfect ranking can come out below 1. Compare it with published figures only.
"""

import dataclasses
import math

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mi_jax.circuits.graph import Graph
from mi_jax.circuits.graph.selection import pruned, select_edges
from mi_jax.circuits.metrics.faithfulness import FRACTIONS
from mi_jax.core.errors import InputError
from mi_jax.decomposition.evaluation.estimates import Estimate, generator

_RESAMPLES = 500


@dataclasses.dataclass(frozen=True)
class EdgeRanking:
    """Agreement of edge scores with a known circuit.

    Attributes:
      auroc, average_precision: with 95 % intervals over true and other edges, resampled apart from each other.
      average_precision_null: of a random ranking; that of AUROC is 1/2.
      mib_auroc: the figure that MIB reports.
    """

    auroc: Estimate
    average_precision: Estimate
    average_precision_null: float
    mib_auroc: float
    n_true: int
    n_edges: int


def edge_ranking(
    scores: Float[np.ndarray, "source reader"],
    truth: Bool[np.ndarray, "source reader"],
    graph: Graph,
    *,
    key: Array,
    absolute: bool = True,
    resamples: int = _RESAMPLES,
) -> EdgeRanking:
    """Ranks all edges of the graph by score and compares with the true ones.

    Args:
      absolute: rank by |score|, as a circuit may need edges that lower the metric.

    Raises:
      InputError: arrays of another graph, scores that are not finite, no true edge or no other.
    """
    for name, x in (("scores", scores), ("truth", truth)):
        if x.shape != graph.edges.shape:
            raise InputError(f"this graph has {graph.edges.shape} sources and readers; {name} have {x.shape}")
    if (truth & ~graph.edges).any():
        raise InputError("the truth holds edges that the graph does not have; is it of another model?")
    values = np.asarray(scores, np.float64)[graph.edges]
    if not np.isfinite(values).all():
        raise InputError(f"{int((~np.isfinite(values)).sum())} of {values.size} edge scores are not finite")
    values = np.abs(values) if absolute else values
    positive = truth[graph.edges]
    if positive.all() or not positive.any():
        raise InputError(f"a ranking needs true and other edges; {int(positive.sum())} of {positive.size} are true")
    rng = generator(key)
    order = np.argsort(-values, kind="stable")
    ends = np.flatnonzero(np.r_[np.diff(values[order]) != 0, True])
    true_in_order = positive[order]
    auroc, precision = _areas(np.ones((1, values.size), int), true_in_order, ends)
    drawn = np.zeros((resamples, 2))
    for i in range(resamples):
        counts = np.zeros((1, values.size), int)
        for rows in (np.flatnonzero(true_in_order), np.flatnonzero(~true_in_order)):
            counts[0, rows] = np.bincount(rng.integers(0, rows.size, rows.size), minlength=rows.size)
        drawn[i] = np.concatenate(_areas(counts, true_in_order, ends))
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    return EdgeRanking(
        Estimate(float(auroc[0]), float(low[0]), float(high[0])),
        Estimate(float(precision[0]), float(low[1]), float(high[1])),
        float(positive.mean()),
        mib_auroc(scores, truth, graph, absolute=absolute),
        int(positive.sum()),
        positive.size,
    )


def _areas(
    counts: Int[np.ndarray, "draw edge"], positive: Bool[np.ndarray, " edge"], ends: Int[np.ndarray, " step"]
) -> tuple[np.ndarray, np.ndarray]:
    """AUROC and average precision of edges that are sorted by score and each counted so many times.

    Args:
      ends: the last edge of every run of equal scores.
    """
    true = np.cumsum(counts * positive[None, :], 1)[:, ends]
    false = np.cumsum(counts * ~positive[None, :], 1)[:, ends]
    start = np.zeros((len(counts), 1))
    recall = np.concatenate([start, true / true[:, -1:]], 1)
    fallout = np.concatenate([start, false / false[:, -1:]], 1)
    precision = true / np.maximum(true + false, 1)
    return np.asarray(np.trapezoid(recall, fallout, axis=1)), (np.diff(recall, axis=1) * precision).sum(1)


def mib_auroc(
    scores: Float[np.ndarray, "source reader"],
    truth: Bool[np.ndarray, "source reader"],
    graph: Graph,
    *,
    absolute: bool = True,
) -> float:
    """The area that MIB calls AUROC; see the head of this file."""
    n_true, n_other = truth.sum(), (graph.edges & ~truth).sum()
    sizes = [math.ceil(f * graph.n_edges) for f in FRACTIONS]
    greedy = [select_edges(graph, scores, n, rule="greedy", absolute=absolute) for n in sizes]
    circuits = [pruned(mask, graph, "mib") for mask in greedy]
    tpr = np.array([(c & truth).sum() / n_true for c in circuits])
    fpr = np.array([(c & graph.edges & ~truth).sum() / n_other for c in circuits])
    return float(np.trapezoid(tpr, fpr / fpr[-1]))
