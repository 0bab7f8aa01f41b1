"""Circuits of neurons: the units of `attn.z` in every head and of `mlp.post`.

Scores are positive where a neuron supports the metric. `mi_jax.circuits.runs.neurons` runs circuits of neurons.
"""

import dataclasses

import equinox as eqx
import numpy as np
from jaxtyping import Array, Bool, Float

from mi_jax.circuits.graph import Graph
from mi_jax.circuits.scores.nodes import node_circuit
from mi_jax.core.attribution import attribute
from mi_jax.core.errors import InputError
from mi_jax.data.task import Task
from mi_jax.models.decoder import Decoder

NEURON_SITES = ("attn.z", "mlp.post")


@dataclasses.dataclass(frozen=True)
class Neurons:
    """A value for every neuron: scores, or True where a circuit has it.

    Attributes:
      heads: units of `attn.z`.
      mlp: units of `mlp.post`; None in a model without MLPs.
    """

    heads: np.ndarray
    mlp: np.ndarray | None

    def __post_init__(self):
        if self.heads.ndim != 3 or (self.mlp is not None and self.mlp.ndim != 2):
            raise InputError("neurons of heads have the axes layer, head and d_head, those of MLPs layer and d_mlp")

    @property
    def flat(self) -> np.ndarray:
        """All neurons in one row, those of the heads first."""
        return self.heads.ravel() if self.mlp is None else np.concatenate([self.heads.ravel(), self.mlp.ravel()])

    def kept_share(self, graph: Graph) -> Float[np.ndarray, " source"]:
        """Of every source the share of its neurons that are not 0; 1 for the input."""
        by_layer = (self.heads != 0).mean(-1)
        if self.mlp is not None:
            by_layer = np.concatenate([by_layer, (self.mlp != 0).mean(-1)[:, None]], 1)
        share = np.concatenate([[1.0], by_layer.ravel()])
        if share.shape != (graph.n_sources,):
            raise InputError(f"these neurons are of {len(share)} sources, the graph has {graph.n_sources}")
        return share

    def circuit(self, graph: Graph) -> Bool[np.ndarray, "source reader"]:
        """All edges between the nodes that keep a neuron."""
        return node_circuit(graph, self.kept_share(graph) > 0)

    def weighted_edge_count(self, graph: Graph) -> float:
        """Edges after pruning, each counted as the share of its source's neurons that are kept (MIB)."""
        return float((graph.prune(self.circuit(graph)) * self.kept_share(graph)[:, None]).sum())


def neuron_scores(model: Decoder, task: Task, *, method: str = "atp", steps: int = 8, batch_size: int = 16) -> Neurons:
    """The score of every neuron, positions added up, against the task's corrupt prompts.

    Args:
      method: of `mi.attribute`: "atp", "ig", "ig-activations" or "exact".

    Raises:
      InputError: a mixture of experts, or an unknown method.
    """
    graph = checked_for_neurons(model)
    effects = _neuron_effects(model, task, method, steps, batch_size)
    return Neurons(np.asarray(-effects["attn.z"]), np.asarray(-effects["mlp.post"]) if graph.has_mlp else None)


@eqx.filter_jit
def _neuron_effects(model: Decoder, task: Task, method: str, steps: int, batch_size: int) -> dict[str, Array]:
    scored = attribute(
        model,
        task.metric,
        NEURON_SITES if model.config.d_mlp else NEURON_SITES[:1],
        method=method,
        steps=steps,
        direction="noising",
        axes=("layer", "head", "unit"),
        batch_size=batch_size,
    )
    return scored(task.clean, task.corrupt, mask=task.mask, output_pos=task.position).values


def top_neurons(scores: Neurons, n: int, *, absolute: bool = True) -> Neurons:
    """The n best-scored neurons, True where the circuit has one.

    Raises:
      InputError: scores that are no numbers, or another number of neurons than there are.
    """
    if np.isnan(scores.flat).any():
        raise InputError(f"{int(np.isnan(scores.flat).sum())} neurons have NaN for a score; they cannot be ranked")
    ranks = np.abs(scores.flat) if absolute else scores.flat
    return _first(scores, np.argsort(-ranks, kind="stable"), n)


def random_neurons(like: Neurons, n: int, *, seed: int) -> Neurons:
    """n neurons drawn without regard to anything: the control of a circuit of that size; nested for one seed."""
    return _first(like, np.random.default_rng(seed).permutation(len(like.flat)), n)


def _first(like: Neurons, order: np.ndarray, n: int) -> Neurons:
    if not 0 <= n <= len(order):
        raise InputError(f"there are {len(order)} neurons; n is between 0 and that, got {n}")
    mask = np.zeros(len(order), bool)
    mask[order[:n]] = True
    heads = mask[: like.heads.size].reshape(like.heads.shape)
    return Neurons(heads, None if like.mlp is None else mask[like.heads.size :].reshape(like.mlp.shape))


def checked_for_neurons(model: Decoder) -> Graph:
    """The graph of a model that has neurons.

    Raises:
      InputError: a mixture of experts.
    """
    if model.config.n_experts:
        raise InputError(f"{model.config.name} is a mixture of experts; its nodes have scores, its neurons have none")
    return Graph.of(model.config)
