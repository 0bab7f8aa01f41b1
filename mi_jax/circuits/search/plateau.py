"""How many of the best-scored edges make the circuit: the size that is the answer for the widest range of targets.

A target fixes a size: the smallest whose faithfulness is within `1 ± (1 − target)`. Which target to take is arbitrary,
and where a weak edge or two stand just inside or outside it, a small change of the network moves the size from a
handful of edges to dozens. The size that stays the answer over the widest range of targets does not depend on one.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from mi_jax.circuits.discover import Circuit
from mi_jax.circuits.graph import Graph
from mi_jax.circuits.graph.selection import select_edges
from mi_jax.circuits.metrics.faithfulness import faithfulness
from mi_jax.circuits.scores import edge_scores
from mi_jax.core.errors import InputError
from mi_jax.data.task import Task
from mi_jax.models.decoder import Decoder

# sizes that are run before it is looked whether a later one could still have a wider range
_AT_ONCE = 8


@dataclasses.dataclass(frozen=True)
class Plateau:
    """A size and the targets for which it is the answer.

    Attributes:
      index: of the size, in the order that was given.
      low, high: the targets.
    """

    index: int
    low: float
    high: float

    @property
    def width(self) -> float:
        return self.high - self.low


def plateau(values: Sequence[float] | np.ndarray, *, least: float = 0.5) -> Plateau:
    """The smallest size that is the answer for the widest range of targets from `least` to 1.

    With `d_n = |1 − f_n|`, the answer for a target t is the first size with `d_n ≤ 1 − t`: a size is the answer for
    some target only where `d_n` is smaller than at all sizes before.

    Args:
      values: faithfulness f of every size, ascending in size.
      least: a circuit that keeps less than this of the behaviour is no answer.

    Raises:
      InputError: no size, values that are not finite, a `least` outside [0, 1), or no size that keeps so much.
    """
    f = np.asarray(values, np.float64)
    if not 0 <= least < 1:
        raise InputError(f"least is a faithfulness from 0 on and below 1, got {least}")
    if f.ndim != 1 or not f.size or not np.isfinite(f).all():
        raise InputError(f"a plateau needs the faithfulness of every size, as finite numbers; got {values}")
    best, reached = None, least
    for i, target in enumerate(_targets(f)):
        if target > reached:
            found = Plateau(i, reached, float(target))
            # of equal ranges the smaller size, whatever their rounding
            if best is None or found.width > best.width + 1e-9:
                best = found
            reached = float(target)
    if best is None:
        raise InputError(f"no circuit keeps {least:g} of the behaviour; the most is {_targets(f).max():.3g}")
    return best


def plateau_circuit(
    model: Decoder, task: Task, *, method: str = "eap-ig", steps: int = 5, least: float = 0.5, batch_size: int = 16
) -> tuple[Circuit, Plateau]:
    """The circuit of best-scored edges that is the answer for the widest range of targets, and that range.

    Every size is run, from one edge on, until no later one could have a wider range.

    Args:
      method, steps, batch_size: of the scores, see `edge_scores`.
      least: see `plateau`.

    Raises:
      InputError: see `edge_scores` and `faithfulness`.
    """
    graph = Graph.of(model.config)
    scores = edge_scores(model, task, method=method, steps=steps, batch_size=batch_size)
    masks: list[np.ndarray] = []
    values = np.zeros(0)
    for start in range(1, graph.n_edges + 1, _AT_ONCE):
        sizes = range(start, min(start + _AT_ONCE, graph.n_edges + 1))
        masks += [graph.prune(select_edges(graph, scores, n)) for n in sizes]
        values = np.append(values, faithfulness(model, task, masks[start - 1 :]))
        reached = _targets(values).max()
        # the targets above what was reached are all that is left to a later size
        if reached > least and plateau(values, least=least).width >= 1 - reached:
            break
    best = plateau(values, least=least)
    return Circuit(graph, method, scores, masks[best.index], float(values[best.index])), best


def _targets(f: np.ndarray) -> np.ndarray:
    """The highest target that each size meets."""
    return 1 - np.abs(1 - f)
