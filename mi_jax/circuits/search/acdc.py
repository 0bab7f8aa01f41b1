"""ACDC (Conmy et al. 2023): edges are removed from the logits back where that costs less than a threshold.

Edge by edge, with L the loss of the circuit so far: the edge is removed if `L(without it) − L < threshold`. The order
is that of the published code (`reverse_topological`). What makes it fast here, with the same decisions:

- A window of the next edges is evaluated at once, each in the circuit that it would meet if the decisions before it
  were as guessed. Up to and including the first wrong guess these are the runs that the sequential rule makes; the rest
  is evaluated again in the next window, with what was just measured as the guess.
- Edges into a reader from which nothing leads to the logits any more are removed without a run: they change nothing.
- A run starts at the layer of the earliest reader of the window: before it nothing is corrupted yet.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mi_jax.circuits.ablation import ablation_values
from mi_jax.circuits.graph import Graph
from mi_jax.circuits.search.objective import Objective, check_objective, loss_of
from mi_jax.circuits.search.order import reader_layers, reverse_topological, useful_readers
from mi_jax.circuits.search.resume import CleanRun, clean_run, resumed, start_before
from mi_jax.core.errors import InputError
from mi_jax.data.task import Task
from mi_jax.models.decoder import Decoder

# Candidates that are no single source: all edges into the reader, and none.
_WHOLE, _NOTHING = -1, -2


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
    evaluate = _Evaluation(model, task, ablation_values(model, task, ablation), objective, window)
    order, layers = _candidates(graph, whole_readers), reader_layers(graph)
    removed, scores = np.zeros_like(graph.edges), np.zeros(graph.edges.shape)
    guesses = np.ones(len(order), bool)
    full_loss = evaluate(removed, np.asarray([[_NOTHING, 0]]), guesses[:1], graph.n_layers)[0]
    if not np.isfinite(full_loss):
        raise InputError(f"task {task.name!r}: the loss {objective!r} of the whole model is {full_loss}")
    loss, start, rounds = full_loss, 0, 1
    while True:
        useful = useful_readers(graph, graph.edges & ~removed)
        ahead = np.arange(start, len(order))
        live = ahead[useful[order[ahead, 1]] & _present(graph, order[ahead], removed)]
        chosen = live[:window]
        idle = order[start : chosen[-1] if len(chosen) else len(order)]
        idle = idle[~useful[idle[:, 1]] & (idle[:, 0] >= 0)]
        removed[idle[:, 0], idle[:, 1]] = True
        if not len(chosen):
            break
        values = evaluate(removed, order[chosen], guesses[chosen], int(layers[order[chosen, 1]].min()))
        before, rounds, wrong = loss, rounds + 1, False
        for i, value in zip(chosen, values, strict=True):
            cost = value - before
            removable = bool((abs(cost) if absolute else cost) < threshold)
            if not wrong:
                _decide(graph, order[i], removable, cost, removed, scores)
                loss, start = value if removable else loss, i + 1
            wrong, before = wrong or removable != guesses[i], value if guesses[i] else before
            guesses[i] = removable
        if progress is not None:
            progress(start, len(order))
    mask = graph.edges & ~removed
    return ACDC(graph, threshold, objective, mask, scores, float(loss), float(full_loss), evaluate.runs, rounds)


def _candidates(graph: Graph, whole_readers: bool) -> np.ndarray:
    """What is tried, in order: rows (source, reader), with source −1 for all edges into a reader."""
    edges = reverse_topological(graph)
    if not whole_readers:
        return edges
    layers, rows = reader_layers(graph), []
    for layer in range(graph.n_layers, -1, -1):
        heads = [r for r in reversed(range(graph.n_readers)) if layers[r] == layer and "<" in graph.readers[r]]
        inside = edges[layers[edges[:, 1]] == layer]
        into_heads = np.isin(inside[:, 1], heads)
        whole = np.asarray([(_WHOLE, r) for r in heads], np.int32).reshape(-1, 2)
        rows += [inside[~into_heads], whole, inside[into_heads]]
    return np.concatenate(rows)


def _present(graph: Graph, candidates: np.ndarray, removed: np.ndarray) -> np.ndarray:
    """Whether there is anything left to remove in a candidate."""
    single = ~removed[candidates[:, 0], candidates[:, 1]]
    return np.where(candidates[:, 0] >= 0, single, (graph.edges & ~removed)[:, candidates[:, 1]].any(0))


def _decide(
    graph: Graph, candidate: np.ndarray, removable: bool, cost: float, removed: np.ndarray, scores: np.ndarray
) -> None:
    source, reader = candidate
    if source >= 0:
        scores[source, reader] = cost
        removed[source, reader] = removable
    elif removable:
        removed[:, reader] = graph.edges[:, reader]


class _Evaluation:
    """Losses of circuits that differ from a common one in the edges of a window."""

    def __init__(self, model: Decoder, task: Task, patch: Array, objective: Objective, window: int):
        self.runs = 0
        self._model, self._task, self._window = model, task, window
        self._objective: Objective = objective
        self._clean = clean_run(model, task, patch)

    def __call__(self, removed: np.ndarray, candidates: np.ndarray, guesses: np.ndarray, layer: int) -> np.ndarray:
        n = len(candidates)
        padded, guessed = np.full((self._window, 2), (_NOTHING, 0), np.int32), np.zeros(self._window, bool)
        padded[:n], guessed[:n] = candidates, guesses
        self.runs += n
        losses = _losses(
            self._model,
            self._task,
            self._clean,
            jnp.asarray(removed),
            jnp.asarray(padded),
            jnp.asarray(guessed),
            start_before(self._model.config.n_layers, layer),
            self._objective,
        )
        return np.asarray(losses, np.float64)[:n]


@eqx.filter_jit
def _losses(
    model: Decoder,
    task: Task,
    clean: CleanRun,
    removed: Bool[Array, "source reader"],
    candidates: Int[Array, "edge 2"],
    guesses: Bool[Array, " edge"],
    layer: int,
    objective: Objective,
) -> Float[Array, " edge"]:
    """The loss with each candidate removed, after the candidates before it that are guessed to be removed."""
    edges = jnp.asarray(Graph.of(model.config).edges)
    source, reader = candidates[:, 0], candidates[:, 1]
    rows = jax.nn.one_hot(source, edges.shape[0], dtype=bool) | (source == _WHOLE)[:, None]
    added = rows[:, :, None] & jax.nn.one_hot(reader, edges.shape[1], dtype=bool)[:, None, :] & edges[None]
    loss = loss_of(objective, task, clean.logits)

    def one(before, row):
        added, guess = row
        tried = before | added
        return jnp.where(guess, tried, before), tried

    tried = jax.lax.scan(one, removed, (added, guesses))[1]
    return jax.vmap(lambda mask: loss(resumed(model, task, clean, mask, layer)))(tried)
