"""Faithfulness of circuits: how much of the metric is left when everything outside the circuit is corrupted.

`f(C) = (m(C) − m(∅)) / (m(N) − m(∅))`, with m(∅) all edges corrupted and m(N) none (Mueller et al. 2025, MIB).
CMD is the area between |1 − f| and 0 over the fraction of edges kept, by the trapezoid rule: lower is better.
"""

import dataclasses
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from mi_jax.circuits.graph import Graph
from mi_jax.circuits.masked import masked_forward, source_outputs
from mi_jax.data.task import Task
from mi_jax.models.decoder import Decoder

FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclasses.dataclass(frozen=True)
class Curve:
    """Faithfulness over circuit sizes, `values[size]`, with the number of edges that each circuit has."""

    fractions: tuple[float, ...]
    edges: tuple[int, ...]
    values: tuple[float, ...]

    @property
    def cmd(self) -> float:
        return float(np.trapezoid(np.abs(1 - np.asarray(self.values)), self.fractions))


@eqx.filter_jit
def _metric_of_circuits(
    model: Decoder, task: Task, circuits: Bool[Array, "circuit source reader"]
) -> Float[Array, "circuit batch"]:
    patch = source_outputs(model, task.corrupt, task.mask)
    edges = jnp.asarray(Graph.of(model.config).edges)

    def one(circuit):
        corrupted = (edges & ~circuit).astype(patch.dtype)
        logits = masked_forward(model, task.clean, corrupted, patch, task.mask, output_pos=task.position)
        return task.logit_difference(logits)

    return jax.lax.map(one, circuits)


def faithfulness(model: Decoder, task: Task, circuits: Sequence[np.ndarray]) -> np.ndarray:
    """f of each circuit, a boolean mask `[source reader]`; the metric is averaged over the pairs of the task.

    Raises:
      ValueError: corrupting every edge leaves the metric as it is, so f is not defined.
    """
    edges = Graph.of(model.config).edges
    stacked = np.stack([np.zeros_like(edges), edges, *circuits])
    metric = np.asarray(_metric_of_circuits(model, task, jnp.asarray(stacked))).mean(1)
    empty, full = metric[:2]
    if abs(full - empty) < 1e-6:
        raise ValueError(f"task {task.name!r}: clean and corrupt prompts give the same metric ({full:.6f})")
    return (metric[2:] - empty) / (full - empty)


def top_edges(scores: np.ndarray, graph: Graph, n: int) -> np.ndarray:
    """Mask of the n edges with the largest absolute score."""
    flat = np.where(graph.edges, np.abs(scores), -1.0).ravel()
    chosen = np.argsort(-flat, kind="stable")[:n]
    mask = np.zeros(flat.shape, bool)
    mask[chosen] = True
    return mask.reshape(scores.shape) & graph.edges


def random_edges(graph: Graph, n: int, *, seed: int) -> np.ndarray:
    """Mask of n edges drawn without regard to anything: the control of a circuit of that size."""
    places = np.argwhere(graph.edges)
    chosen = places[np.random.default_rng(seed).permutation(len(places))[:n]]
    mask = np.zeros_like(graph.edges)
    mask[chosen[:, 0], chosen[:, 1]] = True
    return mask


def sizes(graph: Graph, fractions: Sequence[float] = FRACTIONS) -> tuple[int, ...]:
    """Numbers of edges, at least one, that are these fractions of all edges."""
    return tuple(max(1, round(f * graph.n_edges)) for f in fractions)


def curve(model: Decoder, task: Task, scores: np.ndarray, fractions: Sequence[float] = FRACTIONS) -> Curve:
    """Faithfulness of the circuits that keep the best-scored edges, at each fraction of all edges."""
    graph = Graph.of(model.config)
    ns = sizes(graph, fractions)
    values = faithfulness(model, task, [top_edges(scores, graph, n) for n in ns])
    return Curve(tuple(fractions), ns, tuple(float(v) for v in values))


def random_curves(
    model: Decoder, task: Task, fractions: Sequence[float] = FRACTIONS, *, seeds: Sequence[int] = (0, 1, 2)
) -> list[Curve]:
    """The same for random circuits of equal size, one nested family a seed."""
    graph = Graph.of(model.config)
    ns = sizes(graph, fractions)
    values = faithfulness(model, task, [random_edges(graph, n, seed=s) for s in seeds for n in ns])
    rows = values.reshape(len(seeds), len(ns))
    return [Curve(tuple(fractions), ns, tuple(float(v) for v in row)) for row in rows]
