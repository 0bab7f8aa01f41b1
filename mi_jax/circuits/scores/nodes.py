"""Circuits of nodes: whole heads, MLPs and experts.

Scores are positive where a node supports the metric: they are what the mean metric loses when it is corrupted.

Nodes are the sources of the graph. With weights w of all nodes, 0 for their own value and 1 for the ablation value in
everything that reads them, m(w) is the mean metric and
- `"nap"`, node attribution patching, is `−∂m/∂w_s` at w = 0;
- `"nap-ig"` averages that gradient over w = (α, …, α) for α from 0 to 1, by Gauss–Legendre quadrature, so that the
  scores add up to what the metric loses when every node is corrupted;
- `"exact"` is m(0) − m with this one node corrupted.
"""

from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from mi_jax.circuits.ablation.values import ablation_values
from mi_jax.circuits.graph import Graph
from mi_jax.circuits.runs.masked import masked_forward
from mi_jax.core.errors import InputError
from mi_jax.data.task import Task
from mi_jax.models.decoder import Decoder

NodeMethod = Literal["nap", "nap-ig", "exact"]


def node_scores(
    model: Decoder,
    task: Task,
    *,
    method: NodeMethod = "nap-ig",
    steps: int = 8,
    ablation: str | Array = "resample",
    batch_size: int = 16,
) -> Float[np.ndarray, " source"]:
    """The score of every source of the graph, the input included.

    Args:
      steps: points of the integral, for "nap-ig".
      ablation: what a corrupted node is replaced by, see `ablation_values`.
      batch_size: nodes at once, for "exact"; bounds the memory.

    Raises:
      InputError: an unknown method or ablation, or no steps.
    """
    if method not in ("nap", "nap-ig", "exact"):
        raise InputError(f"method must be 'nap', 'nap-ig' or 'exact', got {method!r}")
    if steps < 1 or batch_size < 1:
        raise InputError(f"steps and batch_size are at least 1, got {steps} and {batch_size}")
    points, weights = np.polynomial.legendre.leggauss(steps) if method == "nap-ig" else (np.array([-1.0]), [2.0])
    rule = jnp.asarray(np.stack([(points + 1) / 2, np.asarray(weights) / 2], 1), jnp.float32)
    patch = ablation_values(model, task, ablation)
    return np.asarray(_node_scores(model, task, patch, rule, method == "exact", batch_size))


@eqx.filter_jit
def _node_scores(
    model: Decoder, task: Task, patch: Array, rule: Float[Array, "step 2"], exact: bool, batch_size: int
) -> Float[Array, " source"]:
    exists = jnp.asarray(Graph.of(model.config).edges)

    def metric(w):
        edges = jnp.where(exists, jnp.broadcast_to(w[:, None], exists.shape), 0).astype(patch.dtype)
        return task.metric(masked_forward(model, task.clean, edges, patch, task.mask, output_pos=task.position)).mean()

    none = jnp.zeros(exists.shape[0], jnp.float32)
    if exact:
        one_each = jnp.eye(exists.shape[0], dtype=jnp.float32)
        return metric(none) - jax.lax.map(metric, one_each, batch_size=batch_size)

    def add(total, point):
        return total - point[1] * jax.grad(metric)(jnp.full_like(none, point[0])), None

    return jax.lax.scan(add, none, rule)[0]


def node_circuit(graph: Graph, nodes: Bool[np.ndarray, " source"]) -> Bool[np.ndarray, "source reader"]:
    """All edges between these nodes, those from the input and into the logits included.

    A key or value that a group of heads shares is read if the circuit has any of them.
    """
    if nodes.shape != (graph.n_sources,):
        raise InputError(f"nodes is a mask of the {graph.n_sources} sources of the graph, got shape {nodes.shape}")
    kept = nodes | (np.arange(graph.n_sources) == 0)
    read = np.any(graph.own_readers[kept], axis=0)
    read[-1] = True
    return graph.edges & kept[:, None] & read[None, :]


def top_nodes(
    graph: Graph, scores: Float[np.ndarray, " source"], n: int, *, absolute: bool = True
) -> Bool[np.ndarray, " source"]:
    """Mask of the n best-scored heads, MLPs and experts; the input is always in it and is not counted."""
    if scores.shape != (graph.n_sources,) or not 0 <= n < graph.n_sources:
        raise InputError(f"the graph has {graph.n_sources - 1} nodes beside the input; got {scores.shape} and n={n}")
    ranks = np.abs(scores[1:]) if absolute else scores[1:]
    mask = np.zeros(graph.n_sources, bool)
    mask[[0, *(1 + np.argsort(-ranks, kind="stable")[:n])]] = True
    return mask
