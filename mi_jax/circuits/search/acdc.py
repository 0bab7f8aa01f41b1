"""ACDC (Conmy et al. 2023): edges are removed from the logits back where that costs less than a threshold.

Edge by edge, with L the loss of the circuit so far: the edge is removed if `L(without it) − L < threshold`. The order
is that of the published code (`reverse_topological`). What makes it fast here, with the same decisions:

- A window of the next edges into one reader is evaluated at once, each in the circuit that it would meet if the
  decisions before it were as guessed. Up to and including the first wrong guess these are the runs that the sequential
  rule makes; the rest is evaluated again in the next window, with what was just measured as the guess.
- Edges into a reader from which nothing leads to the logits any more are removed without a run: they change nothing.
- A run starts at the layer of the reader and computes what differs from the circuit so far: the heads or the MLP that
  read it, and later what some edge that is left leads to. All decisions about one reader are one program.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from mi_jax.circuits.ablation import ablation_values
from mi_jax.circuits.graph import Graph
from mi_jax.circuits.search.decide import WHOLE, decided, present
from mi_jax.circuits.search.layers import depend_on_each_other, groups_of
from mi_jax.circuits.search.objective import Objective, check_objective, loss_of
from mi_jax.circuits.search.order import changed_parts, reader_layers, reverse_topological, useful_readers
from mi_jax.circuits.search.resume import CleanRun, Plan, clean_run
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
      rounds: programs that were run one after the other.
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
      window: edges evaluated at once, half as many before the last layer; bounds the memory and does not change the
        result.
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
    decide = _Decisions(graph, model, task, clean_run(model, task, patch), threshold, objective, absolute, window)
    if not np.isfinite(decide.loss):
        raise InputError(f"task {task.name!r}: the loss {objective!r} of the whole model is {decide.loss}")
    full_loss, done = decide.loss, 0
    parts = _candidates(graph, whole_readers)
    n = sum(len(part) for part in parts)
    for part in parts:
        decide(part)
        done += len(part)
        if progress is not None:
            progress(done, n)
    mask = graph.edges & ~decide.removed
    found = mask, decide.scores, decide.loss, full_loss, decide.runs, decide.rounds
    return ACDC(graph, threshold, objective, *found)


def _candidates(graph: Graph, whole_readers: bool) -> list[np.ndarray]:
    """What is tried, in order: rows (source, reader) for one reader at a time, the source `WHOLE` for all its edges."""
    edges = reverse_topological(graph)
    by_reader = [edges[edges[:, 1] == r] for r in dict.fromkeys(edges[:, 1])]
    if not whole_readers:
        return by_reader
    layers, parts = reader_layers(graph), []
    for layer in range(graph.n_layers, -1, -1):
        inside = [part for part in by_reader if layers[part[0, 1]] == layer]
        heads = [part for part in inside if "<" in graph.readers[part[0, 1]]]
        whole = [np.asarray([(WHOLE, part[0, 1])], np.int32) for part in heads]
        parts += [*inside[: len(inside) - len(heads)], *whole, *heads]
    return parts


class _Decisions:
    """The circuit so far; called with the candidates of one reader, it decides about them."""

    def __init__(
        self,
        graph: Graph,
        model: Decoder,
        task: Task,
        clean: CleanRun,
        threshold: float,
        objective: Objective,
        absolute: bool,
        window: int,
    ):
        self._graph, self._model, self._task, self._clean = graph, model, task, clean
        self._absolute, self._window = jnp.asarray(absolute), window
        self._objective: Objective = objective
        # rounded up, a comparison of numbers of this dtype comes out as with the threshold itself
        rounded = clean.logits.dtype.type(threshold)
        up = np.nextafter(rounded, np.inf, dtype=rounded.dtype) if rounded < threshold else rounded
        self._threshold = jnp.asarray(up)
        self._layers, self._layer, self._now = reader_layers(graph), -1, None
        self._parts = {"n_groups": groups_of(model.config).n, "shared": depend_on_each_other(model.config)}
        self.removed, self.scores = np.zeros_like(graph.edges), np.zeros(graph.edges.shape)
        self.loss = float(loss_of(objective, task, clean.logits)(clean.logits))
        self.runs, self.rounds = 1, 1

    def __call__(self, candidates: np.ndarray) -> None:
        graph, reader = self._graph, int(candidates[0, 1])
        present = graph.edges[:, reader] & ~self.removed[:, reader]
        sources = candidates[:, 0]
        sources = sources[np.where(sources == WHOLE, present.any(), present[sources])]
        circuit = graph.edges & ~self.removed
        useful = useful_readers(graph, circuit)
        if not useful[reader]:
            self.removed[sources[sources != WHOLE], reader] = True
        elif len(sources):
            self._decide(reader, sources, useful)

    def _decide(self, reader: int, sources: np.ndarray, useful: np.ndarray) -> None:
        layer, at = int(self._layers[reader]), (self._model, self._task, self._clean, jnp.asarray(self.removed))
        if layer != self._layer:
            self._now = present(*at, layer) if layer < self._graph.n_layers else None
            self._layer = layer
        padded = np.zeros(self._graph.n_sources, np.int32)
        padded[: len(sources)] = sources
        found = decided(
            *at,
            jnp.asarray(reader, jnp.int32),
            jnp.asarray(padded),
            jnp.asarray(len(sources), jnp.int32),
            jnp.asarray(self.loss, self._clean.logits.dtype),
            self._threshold,
            self._absolute,
            self._now,
            self._plan(reader, useful),
            layer=layer,
            into_head="<" in self._graph.readers[reader],
            objective=self._objective,
            window=self._width(layer),
        )
        found = jax.device_get(found)
        if (self.removed[:, reader] != found.row).any():
            self._layer = -1
            self.removed[:, reader] = found.row
        if sources[0] != WHOLE:
            self.scores[sources, reader] = found.costs[: len(sources)]
        self.loss = float(found.loss)
        self.runs, self.rounds = self.runs + int(found.runs), self.rounds + int(found.rounds)

    def _width(self, layer: int) -> int:
        """Edges at once: where a run is more than its last layer, a wrong guess costs more than a program."""
        width = self._window if layer >= self._graph.n_layers - 1 else -(-self._window // 2)
        return min(width, 1 + layer * self._graph.layer_sources)

    def _plan(self, reader: int, useful: np.ndarray) -> Plan:
        changes = changed_parts(self._graph, self._graph.edges & ~self.removed, useful, reader, **self._parts)
        groups = changes[:, :-1]
        order = np.argsort(~groups, axis=1, kind="stable").astype(np.int32)
        found = order, groups.sum(1, dtype=np.int32), changes[:, -1]
        return Plan(*(jnp.asarray(v) for v in found))
