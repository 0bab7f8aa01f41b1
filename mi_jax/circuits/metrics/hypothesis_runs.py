"""The tests of hypotheses for a circuit of a model, from one program that runs all the circuits they compare."""

import dataclasses
from typing import Literal, get_args

import numpy as np
from jaxtyping import Array, Bool

from mi_jax.circuits.graph import Graph
from mi_jax.circuits.metrics.controls import path_circuit
from mi_jax.circuits.metrics.faithfulness import random_edges
from mi_jax.circuits.metrics.hypotheses import (
    ALPHA,
    HypothesisTest,
    MinimalityTest,
    equivalence_test,
    independence_test,
    minimality_test,
    non_equivalence_test,
    partial_necessity_test,
    sufficiency_test,
)
from mi_jax.circuits.runs.circuits import circuit_runs
from mi_jax.core.errors import InputError
from mi_jax.data.task import Task
from mi_jax.models.decoder import Decoder

Draw = Literal["paths", "edges"]


@dataclasses.dataclass(frozen=True)
class HypothesisTests:
    """The five tests, equivalence in both directions."""

    sufficiency: HypothesisTest
    partial_necessity: HypothesisTest
    non_equivalence: HypothesisTest
    equivalence: HypothesisTest
    independence: HypothesisTest
    minimality: MinimalityTest

    @property
    def tests(self) -> tuple[HypothesisTest, ...]:
        first = self.sufficiency, self.partial_necessity, self.non_equivalence, self.equivalence, self.independence
        return (*first, self.minimality.overall)


def hypothesis_tests(
    model: Decoder,
    task: Task,
    circuit: Bool[np.ndarray, "source reader"],
    *,
    key: Array,
    draw: str = "paths",
    random: int = 100,
    max_edges: int | None = 200,
    quantile: float = 0.9,
    epsilon: float = 0.1,
    permutations: int = 1000,
    alpha: float = ALPHA,
    seed: int = 0,
    ablation: str | Array = "resample",
    reference: Task | None = None,
    batch_size: int | None = None,
) -> HypothesisTests:
    """Runs the circuit, its complement, its parts and random circuits in one program, and tests them.

    Args:
      key: draws the permutations.
      draw: what random circuits are made of. "paths", as in Shi et al.: random paths from the input to the logits until
        there are as many edges as in the circuit; for minimality such a path is added to the circuit, and one of the
        edges that it brought taken away. "edges": as many single edges, which mostly lead nowhere, so that these tests
        are easier to pass; for minimality, one edge is added and taken away.
      random: random circuits, and random edges for minimality.
      max_edges: edges that minimality tests, drawn at random; None tests all.
      seed: draws circuits and edges.

    Raises:
      InputError: a circuit without edges or with all of them, fewer than four prompts, or an unknown draw.
    """
    graph = Graph.of(model.config)
    circuit = circuit & graph.edges
    if draw not in get_args(Draw):
        raise InputError(f"draw is one of {', '.join(get_args(Draw))}, got {draw!r}")
    places = np.argwhere(circuit)
    if not 0 < len(places) < graph.n_edges:
        raise InputError(f"the tests need edges in the circuit and outside; it has {len(places)} of {graph.n_edges}")
    if len(task) < 4:
        raise InputError(f"the tests compare prompts and need four or more; this task has {len(task)}")
    rng = np.random.default_rng(seed)
    tested = places[np.sort(rng.permutation(len(places))[:max_edges])]
    without = np.repeat(circuit[None], len(tested), 0)
    without[np.arange(len(tested)), tested[:, 0], tested[:, 1]] = False
    make = path_circuit if draw == "paths" else random_edges
    same_size = np.stack([make(graph, len(places), seed=seed + i) for i in range(random)])
    inflated = np.stack([_inflated(graph, circuit, draw, seed + i) for i in range(random)])
    added = np.stack([rng.permutation(np.argwhere(one & ~circuit))[0] for one in inflated])
    deflated = inflated.copy()
    deflated[np.arange(random), added[:, 0], added[:, 1]] = False
    masks = [
        graph.edges[None],
        circuit[None],
        graph.edges[None] & ~circuit[None],
        same_size,
        graph.edges[None] & ~same_size,
        without,
        inflated,
        deflated,
    ]
    runs = circuit_runs(
        model, task, np.concatenate(masks), ablation=ablation, reference_task=reference, batch_size=batch_size
    )
    parts = np.split(runs.metric.astype(np.float64), np.cumsum([len(m) for m in masks])[:-1])
    (whole,), (own,), (complement,), kept, knocked, less, more, back = parts

    def distance(x, y):
        return np.abs(x - y).mean(-1)

    return HypothesisTests(
        sufficiency_test(float(distance(own, whole)), distance(kept, whole[None]), quantile=quantile, alpha=alpha),
        partial_necessity_test(
            float(distance(complement, whole)), distance(knocked, whole[None]), quantile=quantile, alpha=alpha
        ),
        non_equivalence_test(own - whole, epsilon=epsilon, alpha=alpha),
        equivalence_test(own - whole, epsilon=epsilon, alpha=alpha),
        independence_test(complement, whole, key=key, permutations=permutations, alpha=alpha),
        minimality_test(
            tuple(f"{graph.sources[s]}->{graph.readers[r]}" for s, r in tested),
            distance(less, own[None]),
            distance(more, back),
            quantile=quantile,
            alpha=alpha,
        ),
    )


def _inflated(graph: Graph, circuit: Bool[np.ndarray, "source reader"], draw: str, seed: int) -> np.ndarray:
    """The circuit and something random that brings an edge or more."""
    if draw == "paths":
        return circuit | path_circuit(graph, 1, seed=seed, beyond=circuit)
    others = np.argwhere(graph.edges & ~circuit)
    out = circuit.copy()
    out[*others[np.random.default_rng(seed).integers(len(others))]] = True
    return out
