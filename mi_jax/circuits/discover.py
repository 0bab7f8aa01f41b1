"""`discover`: a task in, a circuit out."""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, PRNGKeyArray

from mi_jax.circuits.graph import Graph
from mi_jax.circuits.graph.selection import Rule, circuit_of_size, select_edges
from mi_jax.circuits.metrics.faithfulness import faithfulness
from mi_jax.circuits.scores import METHODS, edge_scores
from mi_jax.circuits.search import acdc, learn_mask
from mi_jax.circuits.search.learned import MASK_METHODS, MaskMethod
from mi_jax.core.errors import InputError
from mi_jax.data.task import Task
from mi_jax.models.decoder import Decoder

# Sizes that are tried, as fractions of all edges: about 8 to a factor of ten.
_GRID = tuple(10 ** (-k / 8) for k in range(32, -1, -1))
# circuits that are run before it is looked whether one of them is good enough
_AT_ONCE = 8

Report = Callable[[int, int], None]
# from a model, a task and options to a circuit, and to scores of all edges if the search has any
Search = Callable[..., tuple[np.ndarray, np.ndarray | None]]


@dataclasses.dataclass(frozen=True)
class Circuit:
    """A circuit and how it was chosen.

    Attributes:
      scores: of all edges, `[source reader]`, positive where an edge supports the metric; None where the method gives
        none.
      mask: the edges of the circuit, those that change no run of it removed (`Graph.prune`).
      faithfulness: of exactly these edges, on the pairs they were chosen with; measure it again on others.
      ablation: what the edges outside carry.
    """

    graph: Graph
    method: str
    scores: np.ndarray | None
    mask: np.ndarray
    faithfulness: float
    ablation: str | Array = "resample"

    def __len__(self) -> int:
        return int(self.mask.sum())

    @property
    def edges(self) -> list[str]:
        """Names of the edges, such as `a0.h0->a1.h0<k>`."""
        return self.graph.names(self.mask)

    def top(self, k: int) -> list[tuple[str, float]]:
        """The k edges of the circuit with the largest absolute score, the strongest first.

        Raises:
          InputError: a method that gives no scores.
        """
        if self.scores is None:
            raise InputError(f"method {self.method!r} gives no scores to order edges by; `edges` has all of them")
        scores = self.scores[self.mask]
        names = self.graph.names(self.mask)
        return [(names[i], float(scores[i])) for i in np.argsort(-np.abs(scores), kind="stable")[:k]]

    def faithfulness_on(self, model: Decoder, task: Task, *, ablation: str | Array | None = None) -> float:
        """Faithfulness of this circuit on other prompts.

        Args:
          ablation: None is the circuit's own.

        Raises:
          InputError: a model of another shape, or a task on which faithfulness is undefined.
        """
        if Graph.of(model.config) != self.graph:
            raise InputError(f"this circuit is of another model: {self.graph}; {model.config.name} has another graph")
        ablation = self.ablation if ablation is None else ablation
        return float(faithfulness(model, task, [self.mask], ablation=ablation)[0])


def _acdc(model, task, *, n_edges, key, threshold=0.01, **options) -> tuple[np.ndarray, np.ndarray]:
    if n_edges is not None:
        raise InputError("ACDC has a threshold, not a size: leave n_edges out and give threshold=")
    found = acdc(model, task, threshold, **options)
    return found.mask, found.scores


def _learned(method: MaskMethod) -> Search:
    def search(model, task, *, n_edges, key, progress, **options) -> tuple[np.ndarray, np.ndarray]:
        if key is None:
            raise InputError(f"method {method!r} draws gates at random: give key=jax.random.key(0)")
        found = learn_mask(model, task, method=method, n_edges=n_edges, key=key, **options)
        if found.scores.ndim != 2:
            raise InputError("a circuit has no position axis: train its gates with by_position=False")
        return found.mask(n_edges), np.where(found.graph.edges, found.scores, 0)

    return search


# Methods that find a circuit without ranking all edges first; they get `n_edges`, `ablation`, `key` and `progress`.
SEARCHES: dict[str, Search] = {"acdc": _acdc} | {name: _learned(name) for name in MASK_METHODS}


def discover(
    model: Decoder,
    task: Task,
    *,
    method: str = "eap-ig",
    n_edges: int | None = None,
    target: float = 0.95,
    steps: int = 5,
    scores: np.ndarray | None = None,
    positions: bool = False,
    ablation: str | Array = "resample",
    batch_size: int = 16,
    key: PRNGKeyArray | None = None,
    progress: Report | None = None,
    **options: Any,
) -> Circuit:
    """A circuit for a task, by any method.

    With a method of `METHODS`, which scores edges, it has the `n_edges` best that are on a path from input to logits;
    without `n_edges` it is the smallest one whose faithfulness is within `1 ± (1 − target)`. Sizes are tried on a grid
    of eight to a factor of ten (all sizes where the graph has at most 256 edges); the whole graph has faithfulness 1,
    so there is always an answer, and a warning says so if it is the whole graph. A method of `SEARCHES` decides on the
    edges itself. Nothing about the true circuit enters.

    Args:
      n_edges: of the circuit; fewer only where no more edges of the graph can be on a path ("greedy" selection).
      steps: points of the integral, for a method that has one.
      scores: edge scores that were computed before; None computes them with `method`.
      positions: a circuit of token edges, whose mask and scores have a third axis.
      ablation: what the edges outside the circuit carry; see `ablation_values`.
      batch_size: pairs at once while scoring ("exact": edges); bounds the memory.
      key: for the searches that draw at random.
      progress: called with the number of finished and of all parts, such as `mi_jax.run.bar.Bar("circuit")`.
      options: of the search.

    Raises:
      InputError: an unknown method, a size that the graph does not have, a target outside (0, 1], or a metric that
        is the same for clean and corrupt prompts, so that faithfulness is not defined.

    Example:
      `discover(model, task, method="eap-ig", n_edges=200).edges`
    """
    graph = Graph.of(model.config)
    if method not in METHODS and method not in SEARCHES:
        raise InputError(f"no method {method!r}; there are {', '.join([*METHODS, *SEARCHES])}")
    total = graph.n_edges * (task.clean.shape[1] if positions else 1)
    if n_edges is not None and not 0 < n_edges <= total:
        raise InputError(f"the graph has {total} edges; n_edges is between 1 and that, got {n_edges}")
    if positions and (method not in METHODS or METHODS[method].rule != "top"):
        raise InputError(f"method {method!r} finds no circuits of token edges; take one that scores every position")
    if not 0 < target <= 1:
        raise InputError(f"target is a faithfulness above 0 and at most 1, got {target}")
    # before anything costly: where the two ends have the same metric this raises
    faithfulness(model, task, [], ablation=ablation)
    if method in SEARCHES and scores is None:
        mask, found = SEARCHES[method](
            model, task, n_edges=n_edges, ablation=ablation, key=key, progress=progress, **options
        )
        mask = graph.prune(mask, ablation=ablation)
        value = faithfulness(model, task, [mask], ablation=ablation)[0]
        return Circuit(graph, method, found, mask, float(value), ablation)
    if options:
        raise InputError(f"method {method!r} has no option {', '.join(options)}")
    grid = [n_edges] if n_edges is not None else _grid(total)
    parts = 1 + -(-len(grid) // _AT_ONCE)
    report = progress or (lambda done, total: None)
    if scores is None:
        options = {"steps": steps, "ablation": ablation, "positions": positions, "batch_size": batch_size}
        scores = edge_scores(model, task, method=method, **options)
    report(1, parts)
    rule = METHODS[method].rule if method in METHODS else "top"
    for part, start in enumerate(range(0, len(grid), _AT_ONCE), 2):
        masks = [_of_size(graph, scores, n, rule, ablation, n_edges) for n in grid[start : start + _AT_ONCE]]
        values = faithfulness(model, task, masks, ablation=ablation)
        good = np.flatnonzero(np.abs(1 - values) <= 1 - target + 1e-6) if n_edges is None else [0]
        for done in range(part, parts + 1 if len(good) else part + 1):
            report(done, parts)
        if len(good):
            mask, value = masks[good[0]], float(values[good[0]])
            if n_edges is None and mask.sum() == total:
                warnings.warn(
                    f"task {task.name!r}: no circuit by {method!r} smaller than the whole graph has a faithfulness "
                    f"within {1 - target:.3g} of 1, so this circuit is the whole graph. Take another method, a lower "
                    "target, or n_edges",
                    stacklevel=2,
                )
            return Circuit(graph, method, scores, mask, value, ablation)
    raise AssertionError("the whole graph has faithfulness 1")


def _grid(total: int) -> Sequence[int]:
    return range(1, total + 1) if total <= 256 else sorted({max(1, round(f * total)) for f in _GRID})


def _of_size(graph: Graph, scores, n: int, rule: Rule, ablation: str | Array, asked: int | None) -> np.ndarray:
    """The pruned circuit of the n best edges, or where a size was asked for, of so many that it has that size."""
    if asked is not None:
        return circuit_of_size(graph, scores, n, rule=rule, ablation=ablation)
    return graph.prune(select_edges(graph, scores, n, rule=rule), ablation=ablation)
