"""`discover`: a task in, a circuit out."""

import dataclasses

import numpy as np

from mi_jax.circuits.faithfulness import faithfulness, sizes, top_edges
from mi_jax.circuits.graph import Graph
from mi_jax.circuits.scores import Method, edge_scores
from mi_jax.data.task import Task
from mi_jax.models.decoder import Decoder

# Sizes that are tried, as fractions of all edges: about 8 to a factor of ten.
_GRID = tuple(10 ** (-k / 8) for k in range(32, -1, -1))


@dataclasses.dataclass(frozen=True)
class Circuit:
    """A circuit and how it was chosen.

    Attributes:
      scores: of all edges, `[source reader]`.
      mask: the edges of the circuit, those on no path from input to logits removed.
      faithfulness: of exactly these edges, on the pairs they were chosen with; measure it again on others.
    """

    graph: Graph
    method: str
    scores: np.ndarray
    mask: np.ndarray
    faithfulness: float

    @property
    def edges(self) -> list[str]:
        """Names of the edges, such as `a0.h0->a1.h0<k>`."""
        return self.graph.names(self.mask)


def discover(
    model: Decoder,
    task: Task,
    *,
    method: Method = "eap-ig",
    steps: int = 5,
    target: float = 0.95,
    scores: np.ndarray | None = None,
) -> Circuit:
    """The smallest circuit of best-scored edges whose faithfulness is within `1 ± (1 − target)`.

    Sizes are tried on a grid of eight to a factor of ten (all sizes where the graph has at most 256 edges); the whole
    graph has faithfulness 1, so there is always an answer. Nothing about the true circuit enters.

    Args:
      scores: edge scores that were computed before; None computes them with `method`.
    """
    graph = Graph.of(model.config)
    if scores is None:
        scores = edge_scores(model, task, method=method, steps=steps)
    grid = range(1, graph.n_edges + 1) if graph.n_edges <= 256 else sorted(set(sizes(graph, _GRID)))
    for n, f in _faithfulness_by_size(model, task, scores, list(grid)):
        if abs(1 - f) <= 1 - target + 1e-6:
            return Circuit(graph, method, scores, _circuit(scores, graph, n), f)
    raise AssertionError("the whole graph has faithfulness 1")


def _circuit(scores: np.ndarray, graph: Graph, n: int) -> np.ndarray:
    return graph.prune(top_edges(scores, graph, n))


def _faithfulness_by_size(model: Decoder, task: Task, scores: np.ndarray, grid: list[int]):
    """Pairs (size, faithfulness), small sizes first, in chunks of one shape so that nothing compiles twice."""
    graph, chunk = Graph.of(model.config), min(8, len(grid))
    for start in range(0, len(grid), chunk):
        ns = grid[start : start + chunk]
        padded = ns + ns[-1:] * (chunk - len(ns))
        values = faithfulness(model, task, [_circuit(scores, graph, n) for n in padded])
        yield from zip(ns, values.tolist(), strict=False)
