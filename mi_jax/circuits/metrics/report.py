"""`evaluate_circuit`: everything that can be said about a circuit, in one call."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array, Bool, Float

from mi_jax.circuits.ablation.values import ablation_values
from mi_jax.circuits.graph import Graph
from mi_jax.circuits.graph.selection import Rule
from mi_jax.circuits.metrics.completeness import Completeness, Minimality, completeness, minimality
from mi_jax.circuits.metrics.controls import KINDS, random_circuits
from mi_jax.circuits.metrics.faithfulness import FRACTIONS, Curve, curve_of, pruned, sizes, top_edges, with_ends
from mi_jax.circuits.metrics.hypothesis_runs import HypothesisTests, hypothesis_tests
from mi_jax.circuits.metrics.ranking import EdgeRanking, edge_ranking
from mi_jax.circuits.metrics.single import CircuitMetrics, Compared, circuit_metrics
from mi_jax.circuits.metrics.stability import Stability, bootstrap_stability, group_stability, split_stability
from mi_jax.core.errors import InputError
from mi_jax.data.task import Task
from mi_jax.decomposition.evaluation.estimates import Estimate, Null
from mi_jax.models.decoder import Decoder

# fractions of the edges at which f is reported beside CMD
SMALL = (0.001, 0.005, 0.01)


def faithfulness_at(fraction: float) -> str:
    """What f at a fraction of the edges is called: `faithfulness_at_0_1_percent`."""
    return f"faithfulness_at_{100 * fraction:g}_percent".replace(".", "_")


@dataclasses.dataclass(frozen=True)
class Curves:
    """Circuits of every size, selected and measured as in MIB, beside random ones.

    Attributes:
      signed: edges by signed score; what CPR is taken from.
      absolute: edges by absolute score; what CMD is taken from.
      small: by fraction, f of the circuits by absolute score at `SMALL`. CMD is nearly all about larger ones: those of
        less than 1 % of the edges are a hundredth of its axis.
    """

    signed: Curve
    absolute: Curve
    cpr: Compared
    cmd: Compared
    small: dict[float, Compared]

    def flat(self, prefix: str = "") -> dict[str, float]:
        """The entries of results.json: CMD, CPR and f at the small fractions, each with its interval and nulls."""
        out = self.cmd.flat(f"{prefix}cmd") | self.cpr.flat(f"{prefix}cpr")
        for fraction, found in self.small.items():
            out |= found.flat(prefix + faithfulness_at(fraction))
        return out

    def table(self) -> list[dict[str, float]]:
        """A row for every size of the curve by absolute score."""
        c = self.absolute
        columns = {"edges": c.edges, "kept": c.kept, "faithfulness": c.values, "kl": c.kl, "agreement": c.agreement}
        rows = zip(c.fractions, *columns.values(), strict=True)
        return [dict(zip(("fraction", *columns), map(float, row), strict=True)) for row in rows]


@dataclasses.dataclass(frozen=True)
class CircuitReport:
    """What `evaluate_circuit` found; what was not asked for, or cannot be asked, is None.

    Attributes:
      mask: the circuit that everything but the curves is about.
      curves: where scores were given.
      tests: where the circuit is a proper part of the graph and there are four prompts.
      ranking: where the true edges were given.
      stability: by name, where the scores of every prompt were given: `split`, with groups `paraphrase`, and
        `bootstrap`, whose circuits share prompts.
    """

    mask: Bool[np.ndarray, "source reader"]
    curves: Curves | None
    metrics: CircuitMetrics
    completeness: Completeness
    minimality: Minimality
    tests: HypothesisTests | None
    ranking: EdgeRanking | None
    stability: dict[str, Stability]

    def to_json(self) -> dict[str, float | int | bool]:
        """Flat names to numbers, figures beside `_ci_low`, `_ci_high` and `_null`; what is not finite is left out."""
        out: dict[str, float | int | bool] = {"n_edges": self.metrics.n_edges}
        if self.curves is not None:
            out |= self.curves.flat()
            out |= {
                "cmd_from_zero": self.curves.absolute.cmd_from_zero,
                "cpr_from_zero": self.curves.signed.cpr_from_zero,
            }
        out |= self.metrics.sufficiency.flat("faithfulness")
        for name in ("necessity", "kl", "agreement", "interchange"):
            out |= getattr(self.metrics, name).flat(name)
        out |= _flat("incompleteness", self.completeness.incompleteness, self.completeness.incompleteness_null.mean)
        out |= {"incompleteness_worst": self.completeness.worst} | _flat("kl_under_knockouts", self.completeness.kl)
        out["redundant_edges"] = len(self.minimality.redundant()) / len(self.minimality.names)
        for test in self.tests.tests if self.tests is not None else ():
            name = f"test_{test.name.replace(' ', '_').replace('-', '_')}"
            out |= {name: test.statistic, f"{name}_p_value": test.p_value, f"{name}_rejects": test.rejects}
        if self.ranking is not None:
            out |= _flat("auroc", self.ranking.auroc, 0.5)
            out |= _flat("average_precision", self.ranking.average_precision, self.ranking.average_precision_null)
            out["mib_auroc"] = self.ranking.mib_auroc
        for name, stability in self.stability.items():
            key = "stability_jaccard" if name == "split" else f"stability_{name}_jaccard"
            out |= _flat(key, stability.jaccard, stability.null.mean)
        return {name: value for name, value in out.items() if math.isfinite(value)}


def _flat(name: str, found: Estimate, null: float | None = None) -> dict[str, float]:
    out = {name: found.value, f"{name}_ci_low": found.ci_low, f"{name}_ci_high": found.ci_high}
    return out if null is None else out | {f"{name}_null": null}


def evaluate_curves(
    model: Decoder,
    task: Task,
    scores: Float[np.ndarray, "source reader"],
    *,
    key: Array,
    fractions: Sequence[float] = FRACTIONS,
    rule: Rule = "top",
    null_curves: int = 5,
    seed: int = 0,
    ablation: str | Array = "resample",
    reference: Task | None = None,
    batch_size: int | None = None,
) -> Curves:
    """CPR, CMD and the curves behind them, with those of random circuits, all sizes of all of them in one program.

    Args:
      key: draws the bootstrap.
      rule: how edges are taken by score; see `top_edges`.
      null_curves: random families of either kind, matched to the edges by absolute score before pruning.
      seed: draws them.

    Raises:
      InputError: one prompt, or ablating every edge leaves the metric as it is.
    """
    graph = Graph.of(model.config)
    ns = sizes(graph, fractions, floor=True)
    chosen = [[top_edges(scores, graph, n, select=select, rule=rule) for n in ns] for select in ("signed", "absolute")]
    families = [[pruned(m, graph, "mib") for m in family] for family in chosen]
    for kind in KINDS:
        families += random_circuits(graph, chosen[1], null_curves, kind=kind, seed=seed, prune="mib")
    runs = with_ends(model, task, [m for family in families for m in family], ablation, reference, batch_size)
    total = len(families) * len(ns)
    curves = [
        curve_of(graph, tuple(fractions), ns, family, runs[np.r_[i * len(ns) : (i + 1) * len(ns), total, total + 1]])
        for i, family in enumerate(families)
    ]
    signed, absolute, *random = curves

    def compared(found: Curve, name: str) -> Compared:
        null = np.array([getattr(c, name) for c in random])
        interval = found.intervals(key=key)[name]
        return Compared(interval, Null.of(null[:null_curves]), Null.of(null[null_curves:]))

    def at(fraction: float) -> Compared:
        i = tuple(fractions).index(fraction)
        null = np.array([c.values[i] for c in random])
        return Compared(intervals[f"f_{i}"], Null.of(null[:null_curves]), Null.of(null[null_curves:]))

    intervals = absolute.intervals(key=key)
    small = {fraction: at(fraction) for fraction in SMALL if fraction in fractions}
    return Curves(signed, absolute, compared(signed, "cpr"), compared(absolute, "cmd"), small)


def evaluate_circuit(
    model: Decoder,
    task: Task,
    scores_or_mask: np.ndarray,
    *,
    key: Array,
    n_edges: int | None = None,
    truth: Bool[np.ndarray, "source reader"] | None = None,
    per_prompt: Float[np.ndarray, "batch source reader"] | None = None,
    groups: Sequence[str | int] | None = None,
    null_circuits: int = 10,
    knockouts: int = 16,
    random: int = 100,
    max_edges: int | None = 100,
    seed: int = 0,
    ablation: str | Array = "resample",
    reference: Task | None = None,
    batch_size: int | None = None,
) -> CircuitReport:
    """Every metric of a circuit, each with its interval and with what random circuits give.

    Args:
      scores_or_mask: edge scores `[source reader]`, for the curves too, or the boolean mask of a circuit.
      key: draws bootstraps and permutations.
      n_edges: edges that the circuit takes from the scores before dangling ones are deleted; None takes the smallest
        size of the curve whose faithfulness is within 0.1 of 1, or the closest to 1 short of the whole graph.
      truth: the known circuit, for AUROC and average precision.
      per_prompt: scores of every prompt (`per_prompt_scores`), for stability.
      groups: a label for each prompt, such as its template, for stability under paraphrase.
      null_circuits: random circuits of either kind; half as many families of curves.
      knockouts: for completeness.
      random: random circuits of the hypothesis tests.
      max_edges: edges that minimality looks at, drawn at random; None takes all.
      seed: draws random circuits and knockouts.
      ablation: what edges outside a circuit carry; see `ablation_values`.
      reference: prompts that mean ablations are taken over.
      batch_size: circuits at once, which bounds the memory; None: one on a CPU, eight on an accelerator.

    Raises:
      InputError: arrays of another graph, an empty circuit, one prompt, or a metric that does not move.

    Example:
      report = evaluate_circuit(model, task, edge_scores(model, task), key=jax.random.key(0))
      workdir.add_results({f"circuit.{k}": v for k, v in report.to_json().items()})
    """
    graph = Graph.of(model.config)
    scores_or_mask = np.asarray(scores_or_mask)
    if scores_or_mask.ndim != 2:
        raise InputError(f"`evaluate_circuit` takes edges [source reader], got shape {scores_or_mask.shape}")
    graph.edges_like(scores_or_mask)
    keys = jax.random.split(key, 8)
    options = {
        "ablation": ablation_values(model, task, ablation, reference),
        "batch_size": batch_size,
        "seed": seed,
    }
    if scores_or_mask.dtype == bool:
        if truth is not None or per_prompt is not None or n_edges is not None:
            raise InputError("a ranking, stability and n_edges need edge scores; a mask of a circuit was given")
        mask, curves = scores_or_mask & graph.edges, None
    else:
        curves = evaluate_curves(
            model, task, scores_or_mask, key=keys[0], null_curves=max(1, null_circuits // 2), **options
        )
        n_edges = _size_for(curves.absolute) if n_edges is None else n_edges
        mask = graph.prune(top_edges(scores_or_mask, graph, n_edges), ablation=ablation)
    if not mask.any():
        raise InputError("the circuit has no edges (after dangling ones were deleted); take more")
    stability = {}
    if per_prompt is not None:
        n = n_edges or int(mask.sum())
        stability["bootstrap"] = bootstrap_stability(per_prompt, graph, n, key=keys[1])
        stability["split"] = split_stability(per_prompt, graph, n, key=keys[2])
        if groups is not None:
            stability["paraphrase"] = group_stability(per_prompt, groups, graph, n, key=keys[3])
    testable = len(task) >= 4 and not (mask == graph.edges).all()
    limits = {"random": random, "max_edges": max_edges}
    return CircuitReport(
        mask,
        curves,
        circuit_metrics(model, task, mask, key=keys[4], null_circuits=null_circuits, **options),
        completeness(model, task, mask, key=keys[5], knockouts=knockouts, **options),
        minimality(model, task, mask, max_parts=max_edges, **options),
        hypothesis_tests(model, task, mask, key=keys[6], **limits, **options) if testable else None,
        edge_ranking(scores_or_mask, truth, graph, key=keys[7]) if truth is not None else None,
        stability,
    )


def _size_for(found: Curve) -> int:
    """The smallest size within 0.1 of the whole model's metric, or the closest to it short of the whole graph."""
    usable = [i for i, kept in enumerate(found.kept) if 0 < kept < found.n_edges]
    if not usable:
        return found.n_edges
    near = [i for i in usable if abs(1 - found.values[i]) <= 0.1]
    best = near[0] if near else min(usable, key=lambda i: abs(1 - found.values[i]))
    return found.edges[best]
