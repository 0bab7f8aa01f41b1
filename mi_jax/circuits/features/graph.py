"""Attribution graphs: the direct effects of tokens, features and reconstruction errors on each other and on logits.

Sources: Ameisen et al. 2025, "Circuit Tracing" (Transformer Circuits Thread), for the graph, influence and pruning;
the scores are those that the circuit-tracer library reports.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from mi_jax.circuits.features.json import graph_json
from mi_jax.core.errors import InputError


@dataclasses.dataclass(frozen=True)
class PrunedGraph:
    """What is left of a graph.

    Attributes:
      nodes: which nodes are kept.
      edges: which edges are kept, `[target source]`.
      cumulative: for every node, the share of all influence that it and the nodes above it have.
    """

    nodes: Bool[np.ndarray, " node"]
    edges: Bool[np.ndarray, "node node"]
    cumulative: Float[np.ndarray, " node"]


@dataclasses.dataclass(frozen=True)
class AttributionGraph:
    """Direct effects between the nodes of one prompt.

    The nodes are, in this order: features, errors (all positions of layer 0, then of layer 1, …), tokens, logits.

    Attributes:
      tokens: of the prompt.
      features: layer, position and latent of every feature.
      activations: codes of the features.
      logit_tokens: whose logits are nodes.
      logit_probabilities: what the model gives them.
      adjacency: what a source adds to a target, `[target source]`: to the pre-activation of a feature, or to a logit
        minus the mean of all logits.
      values: pre-activations of the features, logits minus their mean, and 0 for errors and tokens.
      bias: what is added to the targets whatever the sources are: biases of encoders, decoders, attention and norms.
      n_layers: layers of the model.
      n_active: features that were active on the prompt; more than there are in the graph where it was capped.
      name: of the model.

    Raises:
      InputError: arrays whose sizes do not fit each other.
    """

    tokens: Int[np.ndarray, " pos"]
    features: Int[np.ndarray, "feature 3"]
    activations: Float[np.ndarray, " feature"]
    logit_tokens: Int[np.ndarray, " logit"]
    logit_probabilities: Float[np.ndarray, " logit"]
    adjacency: Float[np.ndarray, "node node"]
    values: Float[np.ndarray, " node"]
    bias: Float[np.ndarray, " node"]
    n_layers: int
    n_active: int
    name: str = "decoder"

    def __post_init__(self):
        n = self.n_features + (self.n_layers + 1) * len(self.tokens) + len(self.logit_tokens)
        sizes = {"adjacency": self.adjacency.shape[0], "values": len(self.values), "bias": len(self.bias)}
        if self.adjacency.shape[0] != self.adjacency.shape[1] or set(sizes.values()) != {n}:
            raise InputError(
                f"{self.n_features} features, {self.n_layers} × {len(self.tokens)} errors, {len(self.tokens)} tokens "
                f"and {len(self.logit_tokens)} logits are {n} nodes; got {sizes}, adjacency {self.adjacency.shape}"
            )

    @property
    def n_features(self) -> int:
        return len(self.features)

    @property
    def error_nodes(self) -> slice:
        return slice(self.n_features, self.n_features + self.n_layers * len(self.tokens))

    @property
    def token_nodes(self) -> slice:
        return slice(self.error_nodes.stop, self.error_nodes.stop + len(self.tokens))

    @property
    def logit_nodes(self) -> slice:
        return slice(self.token_nodes.stop, len(self.adjacency))

    @property
    def remainder(self) -> Float[np.ndarray, " node"]:
        """What neither the nodes nor the biases add to a target: rounding, and features that were left out."""
        targets = np.zeros(len(self.adjacency), bool)
        targets[: self.n_features] = targets[self.logit_nodes] = True
        return np.where(targets, self.values - self.adjacency.sum(1) - self.bias, 0.0)

    def influence(self) -> Float[np.ndarray, " node"]:
        """Share of the logits that comes through each node: p(A + A² + …), |rows| of A normalised, p of the logits."""
        return self._influence

    @functools.cached_property
    def _influence(self) -> np.ndarray:
        return influence_of(normalised(self.adjacency), self._weights)

    @property
    def _weights(self) -> np.ndarray:
        weights = np.zeros(len(self.adjacency))
        weights[self.logit_nodes] = self.logit_probabilities
        return weights

    @property
    def replacement_score(self) -> float:
        """Influence of the tokens as a share of that of tokens and errors: 1 where the features explain everything.

        NaN where neither has any.
        """
        tokens, errors = (self.influence()[nodes].sum() for nodes in (self.token_nodes, self.error_nodes))
        return float(tokens / (tokens + errors)) if tokens + errors else float("nan")

    @property
    def completeness_score(self) -> float:
        """Mean share of a node's inputs that are not errors, weighted by the influence of the node."""
        from_errors = normalised(self.adjacency)[:, self.error_nodes].sum(1)
        weights = self.influence() + self._weights
        return float(((1 - from_errors) * weights).sum() / weights.sum())

    def prune(self, node_threshold: float = 0.8, edge_threshold: float = 0.98) -> PrunedGraph:
        """Keeps the most influential nodes, then the most influential edges between them.

        Tokens and logits are always kept. Features and errors that are left without an outgoing edge are dropped, and
        features without an incoming one, until there are none.

        Args:
          node_threshold: share of the influence that the kept nodes have together.
          edge_threshold: the same of edges.

        Raises:
          InputError: a threshold outside [0, 1].
        """
        for name, threshold in (("node_threshold", node_threshold), ("edge_threshold", edge_threshold)):
            if not 0 <= threshold <= 1:
                raise InputError(f"{name} is a share of all influence, between 0 and 1; got {threshold}")
        influence, fixed = self.influence(), self.token_nodes.start
        nodes = influence >= _bound(influence, node_threshold)
        nodes[fixed:] = True
        kept = normalised(np.where(nodes[:, None] & nodes[None, :], self.adjacency, 0.0))
        scores = kept * (influence_of(kept, self._weights) + self._weights)[:, None]
        edges = scores >= _bound(scores.reshape(-1), edge_threshold)
        before = None
        while before is None or (before != nodes).any():
            before = nodes.copy()
            nodes[:fixed] &= edges[:, :fixed].any(0)
            nodes[: self.n_features] &= edges[: self.n_features].any(1)
            edges &= nodes[:, None] & nodes[None, :]
        order = np.argsort(-influence, kind="stable")
        cumulative = np.zeros_like(influence)
        cumulative[order] = np.cumsum(influence[order]) / max(influence.sum(), 1e-30)
        return PrunedGraph(nodes, edges, cumulative)

    def to_json(
        self,
        *,
        words: Callable[[int], str] | None = None,
        slug: str = "graph",
        scan: str | Sequence[str] | None = None,
        node_threshold: float = 0.8,
        edge_threshold: float = 0.98,
    ) -> dict[str, Any]:
        """The pruned graph in circuit-tracer's format, to be written with `json.dump`.

        Args:
          words: from a token to its text; its number if not given.
          slug: name of the graph.
          scan: what the dictionaries are called, or one name per layer; the model's name if not given.
          node_threshold, edge_threshold: see `prune`.
        """
        return graph_json(self, self.prune(node_threshold, edge_threshold), node_threshold, words or str, slug, scan)


def normalised(matrix: Float[np.ndarray, "node node"]) -> Float[np.ndarray, "node node"]:
    """Absolute values with rows that sum to 1; rows of zeros stay zeros."""
    sizes = np.abs(matrix.astype(np.float64))
    return sizes / np.maximum(sizes.sum(1, keepdims=True), 1e-10)


def influence_of(matrix: Float[np.ndarray, "node node"], weights: Float[np.ndarray, " node"]) -> np.ndarray:
    """weights (M + M² + …), which ends because the graph has no cycles.

    Raises:
      InputError: it has one.
    """
    total = step = weights @ matrix
    for _ in range(len(matrix)):
        if not step.any():
            return total
        step = step @ matrix
        total = total + step
    raise InputError("the direct effects have a cycle: a node adds to itself through others")


def _bound(scores: Float[np.ndarray, " score"], threshold: float) -> float:
    """The least score among those that together have this share of the sum, or more; infinity where all are 0."""
    ordered = np.sort(scores)[::-1]
    total = ordered.sum()
    if total <= 0:
        return np.inf
    place = np.searchsorted(np.cumsum(ordered) / total, threshold)
    # scores of 0 are no part of any share
    return max(float(ordered[min(place, len(ordered) - 1)]), np.finfo(np.float64).tiny)
