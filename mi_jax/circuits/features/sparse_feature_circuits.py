"""Sparse feature circuits: the features and errors that matter for a task, the edges between them, and their tests.

Source: Marks et al. 2024, "Sparse Feature Circuits" (arXiv 2403.19647), section 3.
"""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mi_jax.circuits.features.edges import feature_edges
from mi_jax.circuits.features.effects import FeatureEffects, Method, feature_effects
from mi_jax.circuits.features.spliced import NodeSplice, Place, SplicedModel, ablated_states, check_ablation
from mi_jax.core.edits import transform
from mi_jax.core.effects import mean_metric
from mi_jax.core.errors import InputError
from mi_jax.core.transforms import intervene
from mi_jax.data.task import Task


@dataclasses.dataclass(frozen=True)
class FeatureCircuit:
    """Nodes and edges whose effect is over a threshold.

    Attributes:
      places: the sites and layers with dictionaries.
      nodes: rows of place (an index into `places`), position (−1: all) and latent (−1: the error).
      effects: how much the metric falls when the node is ablated.
      weights: what of a source's effect comes directly through a target, `[target source]`.
      edges: which weights are over the threshold.
    """

    places: tuple[Place, ...]
    nodes: Int[np.ndarray, "node 3"]
    effects: Float[np.ndarray, " node"]
    weights: Float[np.ndarray, "node node"]
    edges: Bool[np.ndarray, "node node"]

    def to_json(self) -> dict[str, Any]:
        """Nodes and edges by name, `site.layer/position/latent` with `all` and `error` for −1."""
        names = []
        for place, pos, latent in self.nodes.tolist():
            site, layer = self.places[place]
            names.append(f"{site}.{layer}/{'all' if pos < 0 else pos}/{'error' if latent < 0 else latent}")
        targets, sources = np.nonzero(self.edges)
        return {
            "nodes": dict(zip(names, self.effects.tolist(), strict=True)),
            "edges": {
                f"{names[s]}->{names[t]}": float(self.weights[t, s])
                for t, s in zip(targets.tolist(), sources.tolist(), strict=True)
            },
        }


@dataclasses.dataclass(frozen=True)
class FeatureFaithfulness:
    """The mean metric of four runs, and what it says of a circuit.

    Attributes:
      full: of the model.
      empty: with all nodes ablated.
      circuit: with all nodes ablated but those of the circuit.
      complement: with the nodes of the circuit ablated.
    """

    full: float
    empty: float
    circuit: float
    complement: float

    @property
    def faithfulness(self) -> float:
        """(circuit − empty) / (full − empty): 1 where the circuit alone does what the model does."""
        return (self.circuit - self.empty) / (self.full - self.empty)

    @property
    def completeness(self) -> float:
        """The faithfulness of everything but the circuit: 0 where nothing outside it does the task."""
        return (self.complement - self.empty) / (self.full - self.empty)


def sparse_feature_circuit(
    spliced: SplicedModel,
    task: Task,
    *,
    node_threshold: float,
    edge_threshold: float,
    method: Method = "ig",
    ablation: str = "resample",
    positions: bool = True,
    effects: FeatureEffects | None = None,
) -> FeatureCircuit:
    """The nodes with an absolute effect over a threshold, and the edges between them.

    Args:
      node_threshold, edge_threshold: in units of the metric.
      method, ablation: see `feature_effects`.
      positions: nodes are of one position; otherwise of all, with effects summed over positions, for prompts whose
        positions do not correspond.
      effects: those computed before, with the same ablation.

    Raises:
      InputError: no node has an effect over the threshold, or an unknown method or ablation.

    Example:
      `circuit = sparse_feature_circuit(spliced, task, node_threshold=0.1, edge_threshold=0.01)`
    """
    check_ablation(ablation)
    effects = feature_effects(spliced, task, method=method, ablation=ablation) if effects is None else effects
    effects = effects if positions else effects.over_positions()
    nodes, scores, largest = [], [], 0.0
    for index, place in enumerate(spliced.places):
        # the error is the column after the last latent
        all_scores = np.c_[effects.features[place], effects.errors[place]]
        largest = max(largest, float(np.abs(all_scores).max()))
        pos, latent = np.nonzero(np.abs(all_scores) > node_threshold)
        latent_or_error = np.where(latent == all_scores.shape[1] - 1, -1, latent)
        nodes.append(np.stack([np.full_like(pos, index), pos if positions else np.full_like(pos, -1), latent_or_error]))
        scores.append(all_scores[pos, latent])
    found = np.concatenate(nodes, 1).T.astype(np.int32)
    if not len(found):
        raise InputError(f"no node has an effect over node_threshold={node_threshold}; the largest is {largest:.3g}")
    weights = feature_edges(spliced, task, found, ablation=ablation)
    return FeatureCircuit(spliced.places, found, np.concatenate(scores), weights, np.abs(weights) > edge_threshold)


def feature_faithfulness(
    spliced: SplicedModel,
    task: Task,
    circuit: FeatureCircuit | Int[np.ndarray, "node 3"],
    *,
    ablation: str = "mean-positional",
    keep_errors: bool = False,
) -> FeatureFaithfulness:
    """Runs a task with only the nodes of a circuit, without them, and without all.

    Args:
      circuit: a circuit, or its nodes.
      ablation: what the nodes outside hold; see `feature_effects`.
      keep_errors: errors stay in all runs, so that only features are tested.

    Raises:
      InputError: a node that does not exist, an unknown ablation, or a metric that ablating all nodes does not change.
    """
    check_ablation(ablation)
    nodes = circuit.nodes if isinstance(circuit, FeatureCircuit) else circuit
    n_pos = task.clean.shape[1]
    codes, errors = _masks(spliced, nodes, n_pos)
    keep = {place: np.stack([np.ones_like(m), np.zeros_like(m), m, ~m]) for place, m in codes.items()}
    kept_errors = {}
    for place, m in errors.items():
        rows = np.stack([np.ones_like(m), np.zeros_like(m), m, ~m])
        kept_errors[place] = np.ones_like(rows) if keep_errors else rows
    full, empty, alone, without = np.asarray(
        _metrics(spliced, task, ablation, jax.tree.map(jnp.asarray, (keep, kept_errors)))
    ).tolist()
    if abs(full - empty) <= 1e-6 * max(1.0, abs(full)):
        raise InputError(
            f"the metric is {full:.4g} with all nodes and {empty:.4g} with none, so no circuit can be told from "
            "another; ablate with other values, or at more places"
        )
    return FeatureFaithfulness(full, empty, alone, without)


def _masks(
    spliced: SplicedModel, nodes: np.ndarray, n_pos: int
) -> tuple[dict[Place, Bool[np.ndarray, "pos _"]], dict[Place, Bool[np.ndarray, " pos"]]]:
    codes = {place: np.zeros((n_pos, one.d_sae), bool) for place, one in spliced.dictionaries.items()}
    errors = {place: np.zeros(n_pos, bool) for place in spliced.dictionaries}
    for index, pos, latent in np.asarray(nodes).tolist():
        if not 0 <= index < len(spliced.places):
            raise InputError(f"there are places 0–{len(spliced.places) - 1}; got a node of place {index}")
        place = spliced.places[index]
        d_sae = spliced.dictionaries[place].d_sae
        if not -1 <= pos < n_pos or not -1 <= latent < d_sae:
            raise InputError(
                f"{place[0]!r} layer {place[1]} has latents 0–{d_sae - 1} (−1: the error) and the prompts positions "
                f"0–{n_pos - 1} (−1: all); got latent {latent} at position {pos}"
            )
        at = slice(None) if pos < 0 else pos
        if latent < 0:
            errors[place][at] = True
        else:
            codes[place][at, latent] = True
    return codes, errors


@eqx.filter_jit
def _metrics(spliced: SplicedModel, task: Task, ablation: str, masks: tuple[dict, dict]) -> Float[Array, " run"]:
    ablated = ablated_states(spliced, task, ablation)

    def run(kept):
        codes, errors = kept
        edits = []
        for place, one in spliced.dictionaries.items():
            values = ablated.codes[place], ablated.errors[place]
            edits.append(transform(place[0], NodeSplice(one, codes[place], errors[place], *values), layer=place[1]))
        logits = intervene(spliced.model, *edits)(task.clean, task.mask, output_pos=task.position)
        return mean_metric(task.metric(logits))

    return jax.lax.map(run, masks)
