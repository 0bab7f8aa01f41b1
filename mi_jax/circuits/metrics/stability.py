"""Stability: is the same circuit found on other prompts?

Circuits are compared by Jaccard, `|A ∩ B| / |A ∪ B|` of their edges. Scores are means over prompts, so with the scores
of every prompt a bootstrap needs no further runs: prompts are drawn with replacement, their scores averaged, and the
best edges taken anew. Resamples share prompts, and circuits of shared prompts are alike whether or not the method is
stable; what to expect of fresh prompts is `split_stability`.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mi_jax.circuits.graph import Graph
from mi_jax.circuits.graph.selection import Rule
from mi_jax.circuits.metrics.faithfulness import Select, top_edges
from mi_jax.core.errors import InputError
from mi_jax.data.task import Task
from mi_jax.decomposition.evaluation.estimates import Estimate, Null, generator
from mi_jax.models.decoder import Decoder

Mask = Bool[np.ndarray, "source reader"]


@dataclasses.dataclass(frozen=True)
class Stability:
    """How alike circuits are that were found on different prompts.

    Attributes:
      jaccard: mean over pairs of circuits; the interval holds 95 % of the pairs, so it says what Jaccard to expect when
        the circuit is found once more.
      null: of random circuits of the same sizes; its range is that of single pairs.
      frequency: how often each edge was found, `[source reader]`.
    """

    jaccard: Estimate
    null: Null
    frequency: Float[np.ndarray, "source reader"]

    def stable_edges(self, at_least: float = 0.9) -> Mask:
        """Edges that nearly every circuit has."""
        return self.frequency >= at_least


def jaccard(a: Mask, b: Mask) -> float:
    """Edges in common over edges in either; 1 for two empty circuits."""
    either = (a | b).sum()
    return float((a & b).sum() / either) if either else 1.0


def stability_of(
    masks: Sequence[Mask] | Bool[np.ndarray, "circuit source reader"],
    graph: Graph,
    *,
    key: Array,
    pairs: Int[np.ndarray, "pair 2"] | None = None,
    null_draws: int = 1000,
) -> Stability:
    """Compares circuits that were found on different prompts, whatever the method.

    Args:
      key: draws the null.
      pairs: which circuits to compare; None compares all.

    Raises:
      InputError: fewer than two circuits.
    """
    if len(masks) < 2:
        raise InputError(f"stability compares two or more circuits, got {len(masks)}")
    flat = np.stack([m[graph.edges] for m in masks]).astype(np.float32)
    size = flat.sum(1)
    first, second = np.triu_indices(len(flat), 1) if pairs is None else pairs.T
    common = (flat @ flat.T)[first, second]
    either = size[first] + size[second] - common
    values = np.where(either > 0, common / np.maximum(either, 1), 1.0).astype(np.float64)
    rng = generator(key)
    drawn = rng.integers(0, len(first), null_draws)
    a, b = size[first[drawn]].astype(int), size[second[drawn]].astype(int)
    # of b edges drawn at random, so many are among the a of the first circuit
    shared = rng.hypergeometric(a, graph.n_edges - a, b)
    null = np.where(a + b > 0, shared / np.maximum(a + b - shared, 1), 1.0)
    low, high = np.percentile(values, [2.5, 97.5])
    return Stability(
        Estimate(float(values.mean()), float(low), float(high)),
        Null.of(null),
        np.stack(list(masks)).mean(0) * graph.edges,
    )


def bootstrap_stability(
    per_prompt: Float[np.ndarray, "batch source reader"],
    graph: Graph,
    n_edges: int,
    *,
    key: Array,
    samples: int = 50,
    select: Select = "absolute",
    rule: Rule = "top",
) -> Stability:
    """Circuits of the n best edges on resampled prompts, compared pair by pair.

    Resamples share prompts, so this looks more stable than fresh prompts are; `split_stability` has none in common, but
    half as many.

    Args:
      per_prompt: scores of every prompt (`per_prompt_scores`).
      select, rule: how edges are taken by score; see `top_edges`.
    """
    _check_prompts(per_prompt, 2)
    rng = generator(key)
    n = len(per_prompt)
    rows = rng.integers(0, n, (samples, n))
    weights = np.stack([np.bincount(r, minlength=n) for r in rows]) / n
    return _of_weights(per_prompt, weights, graph, n_edges, select, rule, key, None)


def split_stability(
    per_prompt: Float[np.ndarray, "batch source reader"],
    graph: Graph,
    n_edges: int,
    *,
    key: Array,
    samples: int = 50,
    select: Select = "absolute",
    rule: Rule = "top",
) -> Stability:
    """Circuits of the n best edges on the two halves of the prompts, compared over random halvings."""
    _check_prompts(per_prompt, 2)
    rng = generator(key)
    n = len(per_prompt)
    order = np.stack([rng.permutation(n) for _ in range(samples)])
    halves = np.zeros((samples, 2, n))
    np.put_along_axis(halves[:, 0], order[:, : n // 2], 1.0, 1)
    np.put_along_axis(halves[:, 1], order[:, n // 2 : 2 * (n // 2)], 1.0, 1)
    pairs = np.arange(2 * samples).reshape(samples, 2)
    return _of_weights(per_prompt, halves.reshape(-1, n), graph, n_edges, select, rule, key, pairs)


def group_stability(
    per_prompt: Float[np.ndarray, "batch source reader"],
    groups: Sequence[str | int] | Int[np.ndarray, " batch"],
    graph: Graph,
    n_edges: int,
    *,
    key: Array,
    select: Select = "absolute",
    rule: Rule = "top",
) -> Stability:
    """Circuits of the n best edges on each group of prompts, such as one paraphrased template, compared in pairs."""
    _check_prompts(per_prompt, len(groups))
    if len(groups) != len(per_prompt):
        raise InputError(f"{len(per_prompt)} prompts need as many group labels, got {len(groups)}")
    labels = np.asarray(groups)
    weights = np.stack([labels == label for label in np.unique(labels)]).astype(np.float64)
    return _of_weights(per_prompt, weights, graph, n_edges, select, rule, key, None)


def task_stability(find: Callable[[Task], Mask], tasks: Sequence[Task], graph: Graph, *, key: Array) -> Stability:
    """Circuits that a method finds on several tasks: halves of one, paraphrases, other seeds.

    Args:
      find: a task in, a circuit out; for methods whose scores are no means over prompts.
    """
    return stability_of([find(task) for task in tasks], graph, key=key)


def per_prompt_scores(
    score: Callable[[Decoder, Task], np.ndarray], model: Decoder, task: Task
) -> Float[np.ndarray, "batch source reader"]:
    """Edge scores of every prompt on its own. Their mean is the score of the task where scores are means over prompts.

    Args:
      score: such as `edge_scores`; it is compiled once, for one prompt.

    Example:
      scores = per_prompt_scores(functools.partial(edge_scores, method="eap-ig"), model, task)
    """
    return np.stack([score(model, task[i : i + 1]) for i in range(len(task))])


def _check_prompts(per_prompt: np.ndarray, at_least: int) -> None:
    if len(per_prompt) < at_least:
        raise InputError(f"stability over prompts needs {at_least} or more of them; there are {len(per_prompt)}")


def _of_weights(per_prompt, weights, graph: Graph, n_edges: int, select: Select, rule: Rule, key, pairs) -> Stability:
    """Stability of circuits from weighted sums of the prompts' scores."""
    scores = np.einsum("cb,bsr->csr", weights, per_prompt)
    masks = np.stack([top_edges(s, graph, n_edges, select=select, rule=rule) for s in scores])
    return stability_of(masks, graph, key=key, pairs=pairs)
