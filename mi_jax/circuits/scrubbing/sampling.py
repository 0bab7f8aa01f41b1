"""Which prompt every node of the tree is run on."""

import numpy as np
from jaxtyping import Int

from mi_jax.circuits.scrubbing.hypothesis import TreeNode


def agreeing_rows(
    groups: Int[np.ndarray, " batch"], rows: Int[np.ndarray, " batch"], rng: np.random.Generator
) -> Int[np.ndarray, " batch"]:
    """For each of `rows` a prompt drawn uniformly from those of its group, itself included."""
    order = np.argsort(groups, kind="stable")
    size = np.bincount(groups)
    first = np.cumsum(size) - size
    of = groups[rows]
    return order[first[of] + rng.integers(0, size[of])]


def draw_rows(
    nodes: tuple[TreeNode, ...],
    groups: list[np.ndarray],
    n_prompts: int,
    n_sources: int,
    *,
    samples: int,
    together: bool,
    permuted: bool,
    seed: int,
) -> tuple[Int[np.ndarray, "sample node batch"], Int[np.ndarray, "sample node source batch"]]:
    """Prompts of every tree node, and of every source that it reads without the hypothesis caring.

    Args:
      groups: of every interpretation (`agreeing_groups`).
      together: what a node reads unimportantly comes from one prompt; otherwise each source has its own.
      permuted: shuffle the groups over prompts, one shuffle for each interpretation and sample: the same sizes, but
        agreement means nothing.
    """
    rng = np.random.default_rng(seed)
    rows = np.empty((samples, len(nodes), n_prompts), np.int32)
    others = np.empty((samples, len(nodes), n_sources, n_prompts), np.int32)
    for sample in range(samples):
        used = [rng.permutation(g) for g in groups] if permuted else groups
        for t, node in enumerate(nodes):
            parent = rows[sample, node.parent]
            rows[sample, t] = agreeing_rows(used[node.interpretation], parent, rng) if t else np.arange(n_prompts)
        shape = (len(nodes), 1 if together else n_sources, n_prompts)
        others[sample] = rng.integers(0, n_prompts, shape)
    return rows, others
