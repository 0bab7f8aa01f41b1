"""`edge_scores`: scores of all edges by any method of a table.

A score is positive where the edge supports the metric: where giving it its ablation value lowers the mean metric.
"""

import dataclasses
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mi_jax.circuits.ablation.values import ablation_values
from mi_jax.circuits.graph import Graph
from mi_jax.circuits.graph.selection import Rule
from mi_jax.circuits.runs.exact import exact_edges
from mi_jax.circuits.runs.sources import source_outputs
from mi_jax.circuits.scores import corrected, paths, routes, source_paths
from mi_jax.circuits.scores.gradients import Pairs
from mi_jax.core.errors import InputError
from mi_jax.data.task import Task
from mi_jax.models.decoder import Decoder


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to score edges.

    Attributes:
      does: in a line.
      score: from a model and prompt pairs to scores; None for single runs of every edge.
      integrates: whether the number of steps matters.
      rule: how a circuit is taken by these scores; see `select_edges`.
    """

    does: str
    score: Callable[..., Float[Array, "source reader *pos"]] | None
    integrates: bool = False
    rule: Rule = "top"


_EAP_IG = Method(
    "gradient averaged over embeddings between corrupt and clean",
    paths.eap_ig_inputs,
    True,
)
METHODS: dict[str, Method] = {
    "eap": Method("gradient on the clean run", paths.eap),
    "eap-ig": _EAP_IG,
    "eap-ig-inputs": _EAP_IG,
    "eap-ig-activations": Method(
        "gradient averaged over interpolations of every layer-wise node, as the EAP-IG package does",
        paths.eap_ig_activations,
        True,
    ),
    "ig-activations": Method(
        "gradient averaged over interpolations of the edge's own source",
        source_paths.ig_activations,
        True,
    ),
    "clean-corrupted": Method("mean gradient of the clean and the corrupt embedding", paths.clean_corrupted),
    "eap-gp": Method(
        "gradient averaged along a path that follows differences of gradients",
        paths.eap_gp,
        True,
    ),
    "relp": Method("clean run with the backward pass of relevance propagation", paths.relevance),
    "atp+qk": Method(
        "gradient on the clean run, the change of the attention pattern exact",
        corrected.qk_fixed,
    ),
    "atp*": Method(
        "the same, absolute, averaged over dropping each layer's gradient",
        corrected.grad_dropped,
    ),
    "ifr": Method(
        "share of each source in what a reader reads; no metric, no corrupt run",
        routes.information_flow,
    ),
    "exact": Method("every edge ablated on its own, one run each", None),
}


def edge_scores(
    model: Decoder,
    task: Task,
    *,
    method: str = "eap-ig",
    steps: int = 5,
    ablation: str | Array = "resample",
    reference: Task | None = None,
    positions: bool = False,
    batch_size: int = 16,
) -> np.ndarray:
    """Scores of all edges, `[source reader]`, zero where there is none.

    Args:
      method: a key of `METHODS`.
      steps: points of the integral, where the method has one.
      ablation: what an ablated source writes; see `ablation_values`.
      reference: prompts that means are taken over.
      positions: scores of every position, `[source reader pos]`; they add up to those of the edge. With "atp*" absolute
        values are taken of each, with "exact" each is patched on its own, so there they do not.
      batch_size: pairs at once (for "exact": edges at once); bounds the memory.

    Raises:
      InputError: an unknown method, or numbers that make no sense.
    """
    if method not in METHODS:
        raise InputError(f"no method {method!r} for edge scores; there are {', '.join(METHODS)}")
    for name, value in (("steps", steps), ("batch_size", batch_size)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    score = METHODS[method].score
    if score is None:
        values = ablation if reference is None else ablation_values(model, task, ablation, reference)
        return exact_edges(model, task, ablation=values, positions=positions, batch_size=batch_size)
    # what every pair has of its own is computed with the pair; the rest is computed once, before
    resample = isinstance(ablation, str) and ablation == "resample"
    patch = None if resample or method == "ifr" else ablation_values(model, task, ablation, reference)
    options = (
        steps if METHODS[method].integrates else 1,
        positions,
        min(batch_size, len(task)),
    )
    return np.asarray(_scores(model, task, patch, score, *options))


@eqx.filter_jit
def _scores(
    model: Decoder,
    task: Task,
    patch: Float[Array, "source batch pos d_model"] | None,
    score: Callable[..., Array],
    steps: int,
    positions: bool,
    batch_size: int,
) -> Float[Array, "source reader *pos"]:
    """The sum over the pairs, `batch_size` at a time; the last ones are filled up with pairs of no weight."""
    n = len(task)
    n_chunks = -(-n // batch_size)
    rows = np.arange(n_chunks * batch_size)
    weights = jnp.asarray(np.where(rows < n, 1 / n, 0.0), jnp.float32).reshape(n_chunks, batch_size)
    chosen = rows.clip(max=n - 1).reshape(n_chunks, batch_size)

    def of(row):
        rows, weight = row
        some = task[rows]
        clean = source_outputs(model, some.clean, some.mask)
        other = source_outputs(model, some.corrupt, some.mask) if patch is None else patch[:, rows].astype(clean.dtype)
        # what stands at padding depends on the tokens there and acts on nothing
        real = jnp.broadcast_to(some.mask[None, :, :, None], clean.shape)
        pairs = Pairs(some, weight, clean[0], jnp.where(real, clean - other, 0))
        return score(model, pairs, steps=steps, positions=positions)

    first = jnp.asarray(chosen[0], jnp.int32), weights[0]
    if n_chunks == 1:
        total = of(first)
    else:
        shape = jax.eval_shape(of, first)
        chunks = jnp.asarray(chosen, jnp.int32), weights
        zeros = jnp.zeros(shape.shape, shape.dtype)
        total, _ = jax.lax.scan(lambda total, row: (total + of(row), None), zeros, chunks)
    edges = jnp.asarray(Graph.of(model.config).edges)
    return jnp.where(edges[:, :, None] if positions else edges, total, 0)
