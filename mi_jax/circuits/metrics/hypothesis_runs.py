"""The tests of hypotheses for a circuit of a model, from one program that runs all the circuits they compare."""

import dataclasses

import numpy as np
from jaxtyping import Array, Bool

from mi_jax.circuits.faithfulness import random_edges
from mi_jax.circuits.graph import Graph
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
from mi_jax.circuits.runs import circuit_runs
from mi_jax.core.errors import InputError
from mi_jax.data.task import Task
from mi_jax.models.decoder import Decoder


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
      random: random circuits, and random edges for minimality.
      max_edges: edges that minimality tests, drawn at random; None tests all.
      seed: draws circuits and edges.

    Raises:
      InputError: a circuit without edges or with all of them, or fewer than four prompts.
    """
    graph = Graph.of(model.config)
    circuit = circuit & graph.edges
    places, others = np.argwhere(circuit), np.argwhere(graph.edges & ~circuit)
    if not len(places) or not len(others):
        raise InputError(f"the tests need edges in the circuit and outside; it has {len(places)} of {graph.n_edges}")
    if len(task) < 4:
        raise InputError(f"the tests compare prompts and need four or more; this task has {len(task)}")
    rng = np.random.default_rng(seed)
    tested = places[np.sort(rng.permutation(len(places))[:max_edges])]
    added = others[rng.integers(0, len(others), random)]
    same_size = np.stack([random_edges(graph, len(places), seed=seed + i) for i in range(random)])
    without, inflated = (np.repeat(circuit[None], len(e), 0) for e in (tested, added))
    without[np.arange(len(tested)), tested[:, 0], tested[:, 1]] = False
    inflated[np.arange(random), added[:, 0], added[:, 1]] = True
    masks = [
        graph.edges[None],
        circuit[None],
        graph.edges[None] & ~circuit[None],
        same_size,
        graph.edges[None] & ~same_size,
        without,
        inflated,
    ]
    runs = circuit_runs(
        model, task, np.concatenate(masks), ablation=ablation, reference_task=reference, batch_size=batch_size
    )
    parts = np.split(runs.metric.astype(np.float64), np.cumsum([len(m) for m in masks])[:-1])
    (whole,), (own,), (complement,), kept, knocked, less, more = parts

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
            distance(more, own[None]),
            quantile=quantile,
            alpha=alpha,
        ),
    )
