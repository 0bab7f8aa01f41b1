"""Faithfulness of circuits: how much of the metric is left when everything outside the circuit is ablated.

`f(C) = (m(C) − m(∅)) / (m(N) − m(∅))`, with m(∅) all edges ablated and m(N) none (Mueller et al. 2025, MIB).

Over the fraction of edges kept, by the trapezoid rule: CPR is the area under f (higher is better, and unbounded, since
a circuit may overshoot), CMD the area under |1 − f| (lower is better). MIB takes the edges of CPR by signed score and
those of CMD by absolute score, at the fractions `FRACTIONS`, deletes dangling edges, and keeps the nominal fraction on
the axis, which starts at its first point. `Curve.cpr` and `Curve.cmd` do the same; `cpr_from_zero` and `cmd_from_zero`
put every circuit at the edges that it really has and start at none, where f = 0.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Float

from mi_jax.circuits.graph import Graph
from mi_jax.circuits.graph.selection import Prune as Prune
from mi_jax.circuits.graph.selection import Select as Select
from mi_jax.circuits.graph.selection import pruned as pruned
from mi_jax.circuits.graph.selection import random_edges as random_edges
from mi_jax.circuits.graph.selection import top_edges as top_edges
from mi_jax.circuits.runs.circuits import CircuitRuns, circuit_runs
from mi_jax.core.errors import InputError
from mi_jax.data.task import Task, warn_unless_done
from mi_jax.decomposition.evaluation.estimates import Estimate, bootstrap
from mi_jax.models.decoder import Decoder

FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclasses.dataclass(frozen=True)
class Curve:
    """Faithfulness over circuit sizes.

    Attributes:
      fractions: of all edges that were asked for.
      edges: numbers of edges that were asked for.
      values: f of every size.
      kept: edges that were left after pruning; empty stands for `edges`.
      n_edges: of the whole graph; 0 stands for the last of `edges`.
      runs: those of the sizes, then of no edge and of the whole graph; what intervals are made from.
    """

    fractions: tuple[float, ...]
    edges: tuple[int, ...]
    values: tuple[float, ...]
    kept: tuple[int, ...] = ()
    n_edges: int = 0
    runs: CircuitRuns | None = dataclasses.field(default=None, compare=False, repr=False)

    @property
    def cmd(self) -> float:
        return float(_area(np.abs(1 - np.asarray(self.values)), self.fractions))

    @property
    def cpr(self) -> float:
        return float(_area(np.asarray(self.values), self.fractions))

    @property
    def cmd_from_zero(self) -> float:
        values = np.asarray((0.0, *self.values))
        return float(_area(np.abs(1 - values), self._true_fractions))

    @property
    def cpr_from_zero(self) -> float:
        return float(_area(np.asarray((0.0, *self.values)), self._true_fractions))

    @property
    def kl(self) -> np.ndarray:
        """KL of every size from the whole model in nats, mean over prompts."""
        return self._own_runs.kl[:-2].mean(1)

    @property
    def agreement(self) -> np.ndarray:
        """Fraction of prompts on which every size predicts the token that the whole model predicts."""
        return self._own_runs.agreement[:-2].mean(1)

    @property
    def _own_runs(self) -> CircuitRuns:
        if self.runs is None:
            raise InputError("this curve was made by hand and has no runs behind it; make it with `curve`")
        return self.runs

    @property
    def _true_fractions(self) -> np.ndarray:
        return np.asarray((0, *(self.kept or self.edges))) / (self.n_edges or self.edges[-1])

    def intervals(self, *, key: Array) -> dict[str, Estimate]:
        """`cmd`, `cpr` and `f_0`, `f_1`, … (f of every size), each with its 95 % interval over prompts.

        Raises:
          InputError: a curve without its runs, or a task of one prompt.
        """
        metric = self._own_runs.metric
        x = self.fractions
        out = {
            "cmd": over_prompts(lambda f: _area(np.abs(1 - f), x), metric, key=key),
            "cpr": over_prompts(lambda f: _area(f, x), metric, key=key),
        }
        for i in range(len(x)):
            out[f"f_{i}"] = over_prompts(lambda f, i=i: f[..., i], metric, key=key)
        return out


def _area(values: np.ndarray, fractions: Sequence[float] | np.ndarray) -> np.ndarray:
    return np.asarray(np.trapezoid(values, np.asarray(fractions), axis=-1))


def faithfulness(
    model: Decoder,
    task: Task,
    circuits: Sequence[np.ndarray],
    *,
    ablation: str | Array = "resample",
    reference: Task | None = None,
    batch_size: int | None = None,
) -> np.ndarray:
    """f of each circuit, a boolean mask `[source reader]`; the metric is averaged over the pairs of the task.

    Args:
      ablation: what the edges outside a circuit carry, see `ablation_values`.
      reference: prompts that mean ablations are taken over.
      batch_size: circuits at once, which bounds the memory; None: one on a CPU, eight on an accelerator.

    Raises:
      InputError: ablating every edge leaves the metric as it is, so f is not defined.
    """
    return normalized(with_ends(model, task, circuits, ablation, reference, batch_size).metric, task.name)


def with_ends(
    model: Decoder,
    task: Task,
    circuits: Sequence[np.ndarray],
    ablation: str | Array = "resample",
    reference: Task | None = None,
    batch_size: int | None = None,
) -> CircuitRuns:
    """Runs of the circuits, then of no edge, then of the whole graph."""
    edges = Graph.of(model.config).edges
    shape = np.shape(circuits[0]) if len(circuits) else edges.shape
    whole = np.broadcast_to(edges.reshape(edges.shape + (1,) * (len(shape) - 2)), shape)
    stacked = [*circuits, np.zeros(shape, bool), whole]
    return circuit_runs(model, task, stacked, ablation=ablation, reference_task=reference, batch_size=batch_size)


def normalized(metric: Float[np.ndarray, "circuit batch"], name: str = "") -> Float[np.ndarray, " found"]:
    """f of circuits, from the metric of theirs, of no edge and of the whole graph (the order of `with_ends`).

    Raises:
      InputError: both ends have the same metric.
    """
    *_, empty, whole = mean = metric.astype(np.float64).mean(1)
    if not abs(whole - empty) > 1e-6 * max(1.0, abs(whole), abs(empty)):
        raise InputError(
            f"task {name!r}: faithfulness is undefined: clean and corrupt prompts give the same metric ({whole:.6g}), "
            "whether all edges are ablated or none. Take prompts, a metric or an ablation for which they differ"
        )
    warn_unless_done(name, whole, empty)
    return (mean[:-2] - empty) / (whole - empty)


def over_prompts(statistic, metric: Float[np.ndarray, "circuit batch"], *, key: Array) -> Estimate:
    """A statistic of f of all circuits, with its interval over resampled prompts.

    Args:
      statistic: of f `[… circuit]`, over the last axis.
      metric: of circuits, then of no edge and of the whole graph.

    Raises:
      InputError: fewer than two prompts.
    """
    if metric.shape[1] < 2:
        raise InputError("an interval over prompts needs two or more of them; this task has one")

    def of_totals(totals):
        empty, whole = totals[..., -2:-1], totals[..., -1:]
        # a resample may hold only prompts that the two ends do not tell apart
        with np.errstate(divide="ignore", invalid="ignore"):
            return statistic((totals[..., :-2] - empty) / (whole - empty))

    return bootstrap(of_totals, metric.T.astype(np.float64), key=key)


def sizes(
    graph: Graph, fractions: Sequence[float] = FRACTIONS, *, floor: bool = False, n_pos: int = 1
) -> tuple[int, ...]:
    """Numbers of edges that are these fractions of all edges: rounded and at least one, or rounded down as in MIB."""
    n = graph.n_edges * n_pos
    if floor:
        return tuple(int(f * n) for f in fractions)
    return tuple(max(1, round(f * n)) for f in fractions)


def curve(
    model: Decoder,
    task: Task,
    scores: np.ndarray,
    fractions: Sequence[float] = FRACTIONS,
    *,
    select: Select = "absolute",
    prune: Prune = "none",
    floor: bool = False,
    ablation: str | Array = "resample",
    reference: Task | None = None,
    batch_size: int | None = None,
) -> Curve:
    """Faithfulness of the circuits that keep the best-scored edges, at each fraction of all edges.

    MIB's CPR is `curve(…, select="signed", prune="mib", floor=True).cpr`, its CMD
    `curve(…, select="absolute", prune="mib", floor=True).cmd`.

    Raises:
      InputError: ablating every edge leaves the metric as it is.
    """
    graph = Graph.of(model.config)
    ns = sizes(graph, fractions, floor=floor, n_pos=scores.shape[2] if scores.ndim == 3 else 1)
    masks = [pruned(top_edges(scores, graph, n, select=select), graph, prune, ablation=ablation) for n in ns]
    runs = with_ends(model, task, masks, ablation, reference, batch_size)
    return curve_of(graph, tuple(fractions), ns, masks, runs, task.name)


def curve_of(graph: Graph, fractions, ns, masks, runs: CircuitRuns, name: str = "") -> Curve:
    """The curve of circuits that have been run already, with the two ends (`with_ends`)."""
    kept = tuple(int(m.sum()) for m in masks)
    n_edges = int(graph.edges_like(masks[0]).sum())
    return Curve(fractions, ns, tuple(normalized(runs.metric, name).tolist()), kept, n_edges, runs)


def random_curves(
    model: Decoder,
    task: Task,
    fractions: Sequence[float] = FRACTIONS,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    prune: Prune = "none",
    positions: bool = False,
    ablation: str | Array = "resample",
    reference: Task | None = None,
    batch_size: int | None = None,
) -> list[Curve]:
    """The same for random circuits of equal size, one nested family a seed.

    Args:
      positions: circuits of token edges.
    """
    graph = Graph.of(model.config)
    n_pos = task.clean.shape[1] if positions else None
    ns = sizes(graph, fractions, n_pos=n_pos or 1)
    drawn = [random_edges(graph, n, seed=s, n_pos=n_pos) for s in seeds for n in ns]
    masks = [pruned(mask, graph, prune, ablation=ablation) for mask in drawn]
    runs = with_ends(model, task, masks, ablation, reference, batch_size)
    families = [np.r_[k * len(ns) : (k + 1) * len(ns), len(masks), len(masks) + 1] for k in range(len(seeds))]
    parts = [masks[k * len(ns) : (k + 1) * len(ns)] for k in range(len(seeds))]
    return [
        curve_of(graph, tuple(fractions), ns, part, runs[rows], task.name)
        for part, rows in zip(parts, families, strict=True)
    ]
