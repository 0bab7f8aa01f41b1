"""Sparse feature circuits: the features and errors that matter for a task, and the edges between them.

Source: Marks et al. 2024, "Sparse Feature Circuits" (arXiv 2403.19647), section 3.
"""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from mi_jax.circuits.features.edges import feature_edges
from mi_jax.circuits.features.effects import FeatureEffects, Method, feature_effects
from mi_jax.circuits.features.spliced import Place, SplicedModel, check_ablation
from mi_jax.core.errors import InputError
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
