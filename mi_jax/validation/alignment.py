"""How well a found circuit agrees with the true one, beside circuits that were drawn at random."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

from mi_jax.circuits.graph import Graph
from mi_jax.circuits.metrics.faithfulness import random_edges

Edges = Bool[np.ndarray, "source reader"]


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Edges in common. Several can be added up: the sum counts the edges of all."""

    common: int
    found: int
    true: int

    @property
    def precision(self) -> float:
        return self.common / self.found if self.found else 0.0

    @property
    def recall(self) -> float:
        return self.common / self.true if self.true else 0.0

    @property
    def f1(self) -> float:
        """`2 · common / (found + true)`, the harmonic mean of precision and recall."""
        return 2 * self.common / (self.found + self.true) if self.found + self.true else 1.0

    def __add__(self, other: "Agreement") -> "Agreement":
        return Agreement(self.common + other.common, self.found + other.found, self.true + other.true)


@dataclasses.dataclass(frozen=True)
class RandomF1:
    """F1 of random circuits: mean and the range that holds 95 % of them."""

    mean: float
    low: float
    high: float
    n: int


def agreement(found: np.ndarray, true: np.ndarray) -> Agreement:
    """Counts edges in common.

    Raises:
      ValueError: masks of different graphs.
    """
    if found.shape != true.shape:
        raise ValueError(f"the found circuit has shape {found.shape}, the true one {true.shape}: not the same graph")
    return Agreement(int((found & true).sum()), int(found.sum()), int(true.sum()))


def random_null(graph: Graph, found: Sequence[Edges], true: Sequence[Edges], *, seeds: Sequence[int]) -> RandomF1:
    """F1, pooled over mechanisms, of circuits with as many edges as the found ones, drawn uniformly."""
    return _null(
        [
            sum(
                (
                    agreement(random_edges(graph, int(f.sum()), seed=seed + 10_007 * i), t)
                    for i, (f, t) in enumerate(zip(found, true, strict=True))
                ),
                Agreement(0, 0, 0),
            ).f1
            for seed in seeds
        ]
    )


def layer_matched_null(
    graph: Graph, found: Sequence[Edges], true: Sequence[Edges], *, seeds: Sequence[int]
) -> RandomF1:
    """The same with as many edges between every two layers as the found circuits have.

    A method that only knows between which layers the edges run does as well as this.
    """
    groups = _layer_groups(graph)
    return _null(
        [
            sum(
                (
                    agreement(_shuffled(f, groups, seed + 10_007 * i), t)
                    for i, (f, t) in enumerate(zip(found, true, strict=True))
                ),
                Agreement(0, 0, 0),
            ).f1
            for seed in seeds
        ]
    )


def _null(values: Sequence[float]) -> RandomF1:
    low, high = np.quantile(values, [0.025, 0.975])
    return RandomF1(float(np.mean(values)), float(low), float(high), len(values))


def _stage(name: str) -> tuple[str, str]:
    """The kind and layer of a node: all heads of a layer are one stage."""
    return name[0], name.partition(".")[0]


def _layer_groups(graph: Graph) -> list[np.ndarray]:
    """The edges of the graph, `[edge 2]`, grouped by the stage they come from and the stage they go to."""
    groups: dict[tuple, list[tuple[int, int]]] = {}
    for s, r in np.argwhere(graph.edges).tolist():
        groups.setdefault((_stage(graph.sources[s]), _stage(graph.readers[r])), []).append((s, r))
    return [np.asarray(g) for g in groups.values()]


def _shuffled(mask: Edges, groups: Sequence[np.ndarray], seed: int) -> Edges:
    rng, out = np.random.default_rng(seed), np.zeros_like(mask)
    for group in groups:
        n = int(mask[group[:, 0], group[:, 1]].sum())
        chosen = group[rng.permutation(len(group))[:n]]
        out[chosen[:, 0], chosen[:, 1]] = True
    return out
