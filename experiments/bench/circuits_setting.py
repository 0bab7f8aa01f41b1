"""What circuits are timed on: random models, pairs of prompts, and how scores of two programs compare."""

import dataclasses
from collections.abc import Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from experiments.bench.setting import BATCH, GPT2_SMALL, N_POS, SMOKE, TOKENS, Setting
from mi_jax.circuits.graph import Graph
from mi_jax.circuits.runs.masked import masked_forward
from mi_jax.core.errors import InputError
from mi_jax.data.task import Task
from mi_jax.models import Decoder

# what edges are patched on one by one: as GPT-2 small, but for its size
FOUR_LAYERS = dataclasses.replace(
    GPT2_SMALL,
    name="four-layers",
    n_layers=4,
    d_model=256,
    n_heads=8,
    n_kv_heads=8,
    d_head=32,
    d_mlp=1024,
    d_vocab=512,
    n_ctx=64,
)
# shape, prompts and tokens of each
SHAPES = {
    "gpt2-small": (GPT2_SMALL, BATCH, N_POS),
    "four-layers": (FOUR_LAYERS, BATCH, N_POS),
    "smoke": (SMOKE, 2, 6),
}


def task_of(made: Setting) -> Task:
    """The prompts of a setting, with the difference of two tokens' logits at the last position as the metric."""
    batch = made.clean.shape[0]
    answer, distractor = (jnp.full((batch,), token, jnp.int32) for token in TOKENS)
    return Task("pairs", made.clean, made.corrupt, jnp.ones(made.clean.shape, bool), answer, distractor, made.last)


def swapped(task: Task) -> Task:
    """The same with clean and corrupt prompts exchanged."""
    return dataclasses.replace(task, clean=task.corrupt, corrupt=task.clean)


def scores_of(graph: Graph, named: Mapping[str, float]) -> Float[np.ndarray, "source reader"]:
    """Scores by the names of edges, as a matrix.

    Raises:
      InputError: some edge of the graph has no score, or a name is not an edge.
    """
    if len(named) != graph.n_edges:
        raise InputError(f"the graph has {graph.n_edges} edges, and there are {len(named)} scores")
    out = np.zeros(graph.edges.shape)
    for name, value in named.items():
        out[graph.index(name)] = value
    return out


def relative_difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference over the largest score of theirs."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def jaccard(first: Bool[np.ndarray, "source reader"], second: Bool[np.ndarray, "source reader"]) -> float:
    """Edges in both over edges in either; 1 where both are empty."""
    either = (first | second).sum()
    return float((first & second).sum() / either) if either else 1.0


def sampled_edges(graph: Graph, n: int, *, seed: int) -> list[str]:
    """Names of some edges, drawn without replacement; all if there are no more."""
    names = graph.names(graph.edges)
    chosen = np.random.default_rng(seed).choice(len(names), min(n, len(names)), replace=False)
    return [names[i] for i in chosen]


@eqx.filter_jit
def metric_without(
    model: Decoder, task: Task, patch: Float[Array, "source batch pos d_model"], edge: Int[Array, "2"]
) -> Float[Array, ""]:
    """The mean metric when one edge, `(source, reader)`, carries the patch: what a loop over edges calls."""
    graph = Graph.of(model.config)
    edges = jnp.zeros(graph.edges.shape, patch.dtype).at[edge[0], edge[1]].set(1)
    logits = masked_forward(model, task.clean, edges, patch, task.mask, output_pos=task.position)
    return task.metric(logits).mean()


@eqx.filter_jit
def mask_gradients(
    model: Decoder, task: Task, patch: Float[Array, "source batch pos d_model"], points: Float[Array, " point"]
) -> Float[Array, "source reader"]:
    """Minus the sum of the gradients with respect to the weights of edges, all weights at each of some points.

    This is what auto-circuit calls integrated gradients; at 0 alone it is edge attribution patching.
    """
    edges = jnp.asarray(Graph.of(model.config).edges, patch.dtype)

    def metric(weights):
        logits = masked_forward(model, task.clean, weights, patch, task.mask, output_pos=task.position)
        return task.metric(logits).mean()

    found = jax.lax.map(lambda point: jax.grad(metric)(point * edges), points)
    return -found.sum(0) * edges
