"""ACDC (Conmy et al. 2023): edges are removed from the logits back where that costs less than a threshold.

Edge by edge, with L the loss of the circuit so far: the edge is removed if `L(without it) − L < threshold`. The order
is that of the published code (`reverse_topological`). What makes it fast here, with the same decisions:

- Before the layer of the reader nothing is corrupted yet, so a run resumes the clean run there.
- A window of the next edges into one reader is evaluated at once (`mi_jax.circuits.search.windows`).
- Edges into a reader from which nothing leads to the logits any more are removed without a run: they change nothing.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mi_jax.circuits.ablation.values import ablation_values
from mi_jax.circuits.graph import Graph
from mi_jax.circuits.graph.paths import reverse_topological, useful_readers
from mi_jax.circuits.runs.masked import head_logits
from mi_jax.circuits.runs.resume import MaskedRun, masked_run, resumed_stream
from mi_jax.circuits.search.objective import Objective, check_objective, loss_of
from mi_jax.circuits.search.windows import WHOLE, Decided, in_windows
from mi_jax.core.errors import InputError
from mi_jax.data.task import Task
from mi_jax.models.decoder import Decoder


@dataclasses.dataclass(frozen=True)
class ACDC:
    """What ACDC kept.

    Attributes:
      mask: the edges that were kept, `[source reader]`.
      scores: what removing each edge cost in the circuit it was tried in, `[source reader]`; at or above the threshold
        exactly where the edge was kept, and 0 where no run was needed.
      loss: of the circuit, and `full_loss` of the whole model.
      runs: evaluated circuits, those that were repeated after a wrong guess included.
      rounds: windows that were run one after the other.
    """

    graph: Graph
    threshold: float
    objective: str
    mask: np.ndarray
    scores: np.ndarray
    loss: float
    full_loss: float
    runs: int
    rounds: int

    @property
    def edges(self) -> list[str]:
        """Names of the edges that were kept, such as `a0.h0->a1.h0<k>`."""
        return self.graph.names(self.mask)

    def to_json(self) -> dict[str, Any]:
        """Numbers that fit into a table of results."""
        names = ("threshold", "objective", "loss", "full_loss", "runs", "rounds")
        return {"edges": int(self.mask.sum())} | {name: getattr(self, name) for name in names}


def acdc(
    model: Decoder,
    task: Task,
    threshold: float,
    *,
    objective: Objective = "kl",
    absolute: bool = False,
    whole_readers: bool = False,
    ablation: str | Array = "resample",
    window: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> ACDC:
    """The circuit that ACDC finds at a threshold.

    Args:
      threshold: an edge whose removal costs less is removed; in the unit of the objective.
      objective: the loss: "kl" from the whole model in nats, "metric" for minus the task's metric, or "squared".
      absolute: compare the size of the change, so that edges whose removal lowers the loss by more are kept too.
      whole_readers: first try to remove all edges into a query, key or value at once, as the authors' code does.
      ablation: what removed edges carry, see `ablation_values`.
      window: edges evaluated at once; bounds the memory and does not change the result.
      progress: called with the number of decided edges and of all edges.

    Raises:
      InputError: an unknown objective, a threshold that is not positive, or a loss of the whole model that is not
        finite.
    """
    check_objective(objective)
    if not threshold > 0:
        raise InputError(f"the threshold is what an edge may cost, above 0; got {threshold}")
    if window < 1:
        raise InputError(f"window is the number of edges evaluated at once, at least 1; got {window}")
    graph = Graph.of(model.config)
    patch = ablation_values(model, task, ablation)
    clean = _clean_run(model, task, patch, objective)
    loss = full_loss = float(clean.loss)
    if not np.isfinite(loss):
        raise InputError(f"task {task.name!r}: the loss {objective!r} of the whole model is {loss}")
    # rounded up, a comparison of numbers of this dtype comes out as with the threshold itself
    kind = np.asarray(clean.loss).dtype.type
    limit = kind(threshold) if kind(threshold) >= threshold else np.nextafter(kind(threshold), kind(np.inf))
    kept, scores = graph.edges.copy(), np.zeros(graph.edges.shape)
    runs, rounds, done = 1, 1, 0
    parts = _candidates(graph, whole_readers)
    for reader, sources in parts:
        done += len(sources)
        if progress is not None:
            progress(done, sum(len(part[1]) for part in parts))
        tried = sources[np.where(sources == WHOLE, kept[:, reader].any(), kept[sources, reader])]
        if not graph.normed_bias and not useful_readers(graph, kept[:, :, None])[reader, 0]:
            kept[tried[tried != WHOLE], reader] = False
            continue
        if not len(tried):
            continue
        padded = np.zeros(graph.n_sources, np.int32)
        padded[: len(tried)] = tried
        found = _decided(
            model,
            task,
            patch,
            clean,
            jnp.asarray(kept),
            reader=jnp.asarray(reader, jnp.int32),
            layer=jnp.asarray(graph.reader_layers[reader], jnp.int32),
            candidates=jnp.asarray(padded),
            n=jnp.asarray(len(tried), jnp.int32),
            loss=jnp.asarray(loss, kind),
            threshold=jnp.asarray(limit),
            absolute=jnp.asarray(absolute),
            objective=objective,
            window=window,
        )
        found = jax.device_get(found)
        kept[:, reader] &= ~found.removed
        if tried[0] != WHOLE:
            scores[tried, reader] = found.costs[: len(tried)]
        loss, runs, rounds = float(found.loss), runs + int(found.runs), rounds + int(found.rounds)
    return ACDC(graph, threshold, objective, kept, scores, loss, full_loss, runs, rounds)


def _candidates(graph: Graph, whole_readers: bool) -> list[tuple[int, np.ndarray]]:
    """What is tried, in order: a reader and the sources of edges into it, or `WHOLE` for all of them at once."""
    edges = reverse_topological(graph)
    by_reader = [(int(r), edges[edges[:, 1] == r, 0]) for r in dict.fromkeys(edges[:, 1])]
    if not whole_readers:
        return by_reader
    parts = []
    for layer in range(graph.n_layers, -1, -1):
        inside = [part for part in by_reader if graph.reader_layers[part[0]] == layer]
        heads = [part for part in inside if "<" in graph.readers[part[0]]]
        whole = [(reader, np.asarray([WHOLE], np.int32)) for reader, _ in heads]
        parts += [*inside[: len(inside) - len(heads)], *whole, *heads]
    return parts


class _Clean(eqx.Module):
    """The whole model on the clean prompts: its logits, their loss, and what runs of circuits resume."""

    run: MaskedRun
    logits: Float[Array, "batch 1 d_vocab"]
    loss: Float[Array, ""]


@eqx.filter_jit
def _clean_run(model: Decoder, task: Task, patch: Array, objective: Objective) -> _Clean:
    none = jnp.zeros(Graph.of(model.config).edges.shape, patch.dtype)
    run = masked_run(model, task.clean, none, patch, task.mask)
    logits = model(task.clean, task.mask, output_pos=task.position)
    return _Clean(run, logits, loss_of(objective, task, logits)(logits))


@eqx.filter_jit
def _decided(
    model: Decoder,
    task: Task,
    patch: Float[Array, "source batch pos d_model"],
    clean: _Clean,
    kept: Bool[Array, "source reader"],
    *,
    reader: Int[Array, ""],
    layer: Int[Array, ""],
    candidates: Int[Array, " candidate"],
    n: Int[Array, ""],
    loss: Float[Array, ""],
    threshold: Float[Array, ""],
    absolute: Bool[Array, ""],
    objective: Objective,
    window: int,
) -> Decided:
    """Tries to remove the first n candidates, sources or `WHOLE`, from what a reader of a layer reads."""
    exists = jnp.asarray(Graph.of(model.config).edges)
    measure = loss_of(objective, task, clean.logits)

    def loss_without(removed: Bool[Array, " source"]) -> Float[Array, ""]:
        circuit = kept.at[:, reader].set(kept[:, reader] & ~removed)
        cut = (exists & ~circuit).astype(patch.dtype)
        stream = resumed_stream(model, clean.run, layer, cut, patch, task.mask, task.position)
        return measure(head_logits(model, stream))

    losses = jax.vmap(loss_without)
    return in_windows(losses, exists[:, reader], candidates, n, loss, threshold, absolute, window)
