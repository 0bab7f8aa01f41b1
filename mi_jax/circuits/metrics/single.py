"""What one circuit does, on its own and by its absence, beside random circuits.

Sufficiency is f(C). Necessity is `1 − f(M∖C)`: what the model loses when the circuit alone is ablated. KL and agreement
compare the predictions of circuit and model. Interchange accuracy is the fraction of prompts on which ablating the
circuit alone already gives the prediction of the run with every edge ablated: with the ablation "resample", whether
the circuit carries the counterfactual answer. Unlike f, the last three cannot be raised by overshooting.
"""

import dataclasses

import numpy as np
from jaxtyping import Array, Bool, Float

from mi_jax.circuits.graph import Graph
from mi_jax.circuits.metrics.controls import random_circuits
from mi_jax.circuits.metrics.faithfulness import normalized, over_prompts, with_ends
from mi_jax.data.task import Task
from mi_jax.decomposition.evaluation.estimates import Estimate, Null, bootstrap_mean
from mi_jax.models.decoder import Decoder


@dataclasses.dataclass(frozen=True)
class Compared:
    """A figure of a circuit with its 95 % interval over prompts, and that of random circuits.

    Attributes:
      null: random circuits of the same number of edges.
      null_layers: those with as many edges in every pair of layers.
    """

    found: Estimate
    null: Null
    null_layers: Null

    def flat(self, name: str) -> dict[str, float]:
        """The entries of results.json: the figure, its interval and its two nulls."""
        return {
            name: self.found.value,
            f"{name}_ci_low": self.found.ci_low,
            f"{name}_ci_high": self.found.ci_high,
            f"{name}_null": self.null.mean,
            f"{name}_null_layers": self.null_layers.mean,
        }


@dataclasses.dataclass(frozen=True)
class CircuitMetrics:
    """See the head of this file; `n_edges` is the size of the circuit."""

    n_edges: int
    sufficiency: Compared
    necessity: Compared
    kl: Compared
    agreement: Compared
    interchange: Compared


def circuit_metrics(
    model: Decoder,
    task: Task,
    circuit: Bool[np.ndarray, "source reader"],
    *,
    key: Array,
    null_circuits: int = 10,
    seed: int = 0,
    ablation: str | Array = "resample",
    reference: Task | None = None,
    batch_size: int | None = None,
) -> CircuitMetrics:
    """Runs the circuit, its complement, and both for random circuits, in one program.

    Args:
      key: draws the bootstrap.
      seed: draws the random circuits.

    Raises:
      InputError: one prompt, or a metric that does not move.
    """
    graph, n = Graph.of(model.config), null_circuits
    masks = [circuit & graph.edges]
    for kind in ("size", "layers"):
        masks += [one for (one,) in random_circuits(graph, masks[:1], n, kind=kind, seed=seed)]
    complements = [graph.edges & ~m for m in masks]
    runs = with_ends(model, task, masks + complements, ablation, reference, batch_size)
    f = normalized(runs.metric, task.name)
    m = len(masks)
    ablated = runs.prediction[-2]

    def compared(found: Estimate, all_values: Float[np.ndarray, " circuit"]) -> Compared:
        return Compared(found, Null.of(all_values[1 : n + 1]), Null.of(all_values[n + 1 :]))

    def mean_of(values: np.ndarray) -> Compared:
        values = values.astype(np.float64)
        return compared(bootstrap_mean(values[0], key=key), values.mean(1))

    return CircuitMetrics(
        int(masks[0].sum()),
        compared(over_prompts(lambda x: x[..., 0], runs.metric, key=key), f[:m]),
        compared(over_prompts(lambda x: 1 - x[..., m], runs.metric, key=key), 1 - f[m:]),
        mean_of(runs.kl[:m]),
        mean_of(runs.agreement[:m]),
        mean_of(runs.prediction[m : 2 * m] == ablated[None]),
    )
