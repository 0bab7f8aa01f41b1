"""Completeness and minimality of a circuit C in a model M, by knocking parts of C out of both.

Completeness (Wang et al. 2023, IOI): for K ⊂ C, `|F(C∖K) − F(M∖K)|` is small: circuit and model break alike.
Same under knockouts: `KL(M∖K ‖ C∖K)` is small, which also sees what the metric does not.
Minimality: for every part v of C there is a K with `|F(C∖(K ∪ v)) − F(C∖K)|` large.

F is faithfulness (0 with every edge ablated, 1 with none). A part is an edge, or a node: all edges out of a source.
"""

import dataclasses

import numpy as np
import scipy.stats
from jaxtyping import Array, Bool, Float

from mi_jax.circuits.graph import Graph
from mi_jax.circuits.metrics.controls import random_circuits
from mi_jax.circuits.metrics.faithfulness import normalized, over_prompts, with_ends
from mi_jax.circuits.metrics.multiple import holm
from mi_jax.circuits.runs.circuits import circuit_runs
from mi_jax.core.errors import InputError
from mi_jax.data.task import Task
from mi_jax.decomposition.evaluation.estimates import Estimate, Null, bootstrap_mean
from mi_jax.models.decoder import Decoder

LEVELS = ("edge", "node")
Mask = Bool[np.ndarray, "source reader"]


def parts(graph: Graph, circuit: Mask, level: str) -> tuple[list[str], np.ndarray]:
    """Names of the parts of a circuit and, for each, the edges `[part source reader]` of the graph that it owns.

    Raises:
      InputError: an unknown level, or a circuit without parts.
    """
    circuit = circuit & graph.edges
    if level == "edge":
        places = np.argwhere(circuit)
        owned = np.zeros((len(places), *circuit.shape), bool)
        owned[np.arange(len(places)), places[:, 0], places[:, 1]] = True
        names = graph.names(circuit)
    elif level == "node":
        # what a node reads does not matter once nothing reads the node
        rows = 1 + np.flatnonzero(circuit[1:].any(1))
        names = [graph.sources[row] for row in rows]
        owned = np.zeros((len(rows), *circuit.shape), bool)
        owned[np.arange(len(rows)), rows] = graph.edges[rows]
    else:
        raise InputError(f"parts of a circuit are one of {LEVELS}, got {level!r}")
    if not names:
        raise InputError(f"the circuit has no {level} to knock out: it is empty")
    return names, owned


def random_knockouts(n_parts: int, n: int, *, seed: int) -> Bool[np.ndarray, "knockout part"]:
    """Sets of parts: each of a size drawn uniformly from 1 to all but one, its members uniformly among that size."""
    rng = np.random.default_rng(seed)
    count = rng.integers(1, max(2, n_parts), n)
    return rng.random((n, n_parts)).argsort(1).argsort(1) < count[:, None]


@dataclasses.dataclass(frozen=True)
class Completeness:
    """How differently circuit and model break.

    Attributes:
      circuit, model: F(C∖K) and F(M∖K) of every knockout K.
      incompleteness: the mean of |F(C∖K) − F(M∖K)|, interval over prompts; `worst` is the largest.
      incompleteness_null: the same of random circuits that have as many edges in every pair of layers.
      kl: KL(M∖K ‖ C∖K) in nats, mean over knockouts, interval over prompts.
    """

    circuit: Float[np.ndarray, " knockout"]
    model: Float[np.ndarray, " knockout"]
    incompleteness: Estimate
    worst: float
    incompleteness_null: Null
    kl: Estimate


def completeness(
    model: Decoder,
    task: Task,
    circuit: Mask,
    *,
    key: Array,
    level: str = "edge",
    knockouts: int = 32,
    null_circuits: int = 4,
    seed: int = 0,
    ablation: str | Array = "resample",
    reference: Task | None = None,
    batch_size: int | None = None,
) -> Completeness:
    """Knocks random parts of the circuit out of circuit and model, and the same for random circuits.

    Args:
      key: draws the bootstrap.
      seed: draws knockouts and random circuits.

    Raises:
      InputError: an empty circuit, one prompt, or a metric that does not move.
    """
    graph = Graph.of(model.config)
    families = [circuit & graph.edges]
    families += [one for (one,) in random_circuits(graph, [families[0]], null_circuits, seed=seed)]
    less_circuit, less_model = [], []
    for mask in families:
        names, owned = parts(graph, mask, level)
        out = np.einsum("kp,psr->ksr", random_knockouts(len(names), knockouts, seed=seed), owned)
        less_circuit.append(mask[None] & ~out)
        less_model.append(graph.edges[None] & ~out)
    circuits, models = np.concatenate(less_circuit), np.concatenate(less_model)
    runs = circuit_runs(
        model,
        task,
        np.concatenate([circuits, np.zeros_like(graph.edges)[None]]),
        np.concatenate([models, graph.edges[None]]),
        ablation=ablation,
        reference_task=reference,
        batch_size=batch_size,
    )
    ends = np.stack([runs.metric[-1], runs.reference_metric[-1]])

    def gap(f):
        return np.abs(f[..., :knockouts] - f[..., knockouts:]).mean(-1)

    def metric_of(family):
        rows = slice(family * knockouts, (family + 1) * knockouts)
        return np.concatenate([runs.metric[rows], runs.reference_metric[rows], ends])

    f = normalized(metric_of(0), task.name)
    null = np.array([gap(normalized(metric_of(i), task.name)) for i in range(1, len(families))])
    return Completeness(
        f[:knockouts],
        f[knockouts:],
        over_prompts(gap, metric_of(0), key=key),
        float(np.abs(f[:knockouts] - f[knockouts:]).max()),
        Null.of(null),
        bootstrap_mean(runs.kl[:knockouts].mean(0), key=key),
    )


@dataclasses.dataclass(frozen=True)
class Minimality:
    """What every part of a circuit does; arrays over parts.

    Attributes:
      effect: the largest |F(C∖(K ∪ v)) − F(C∖K)| over the knockouts K, the empty one among them.
      alone: the signed F(C) − F(C∖v), K being empty.
      p_value: of "v changes the metric of no K": paired t-tests over prompts, corrected for the knockouts (Bonferroni)
        and then for the parts (Holm).
    """

    names: tuple[str, ...]
    effect: Float[np.ndarray, " part"]
    alone: Float[np.ndarray, " part"]
    p_value: Float[np.ndarray, " part"]

    def redundant(self, alpha: float = 0.05) -> list[str]:
        """Parts without an effect that the prompts tell from chance."""
        return [name for name, p in zip(self.names, self.p_value, strict=True) if p > alpha]


def minimality(
    model: Decoder,
    task: Task,
    circuit: Mask,
    *,
    level: str = "edge",
    knockouts: int = 4,
    max_parts: int | None = None,
    seed: int = 0,
    ablation: str | Array = "resample",
    reference: Task | None = None,
    batch_size: int | None = None,
) -> Minimality:
    """Knocks every part out of the circuit, as it is and after random knockouts; `(knockouts + 1) · (parts + 1)` runs.

    Args:
      max_parts: test so many parts, drawn at random; None tests all.
      seed: draws knockouts and parts.

    Raises:
      InputError: an empty circuit, one prompt, or a metric that does not move.
    """
    graph = Graph.of(model.config)
    if len(task) < 2:
        raise InputError("minimality tests effects over prompts and needs two or more of them; this task has one")
    circuit = circuit & graph.edges
    names, owned = parts(graph, circuit, level)
    tested = np.sort(np.random.default_rng(seed).permutation(len(names))[:max_parts])
    out = np.einsum("kp,psr->ksr", random_knockouts(len(names), knockouts, seed=seed), owned)
    left = circuit[None] & ~np.concatenate([np.zeros_like(circuit)[None], out])
    without = left[:, None] & ~owned[tested][None]
    masks = np.concatenate([left[:, None], without], 1)
    runs = with_ends(model, task, list(masks.reshape(-1, *circuit.shape)), ablation, reference, batch_size)
    f = normalized(runs.metric, task.name).reshape(masks.shape[:2])
    metric = runs.metric[:-2].astype(np.float64).reshape(*masks.shape[:2], -1)
    change = metric[:, 1:] - metric[:, :1]
    # a part that does nothing leaves a residue of rounding, which a paired test would find significant
    change[np.abs(change) <= 1e-6 * np.maximum(1.0, np.abs(metric[:, :1]))] = 0.0
    p = paired_p_values(change).min(0) * len(left)
    return Minimality(
        tuple(names[i] for i in tested), np.abs(f[:, 1:] - f[:, :1]).max(0), f[0, 0] - f[0, 1:], holm(np.minimum(p, 1))
    )


def paired_p_values(change: Float[np.ndarray, "*group batch"]) -> Float[np.ndarray, "*group"]:
    """Two-sided t-tests that the mean over the last axis is zero; 1 where nothing changes."""
    n = change.shape[-1]
    mean, error = change.mean(-1), change.std(-1, ddof=1) / np.sqrt(n)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(mean == 0, 0.0, mean / error)
    return 2 * scipy.stats.t.sf(np.abs(t), n - 1)
