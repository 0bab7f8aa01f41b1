"""Interchange data: a base, a source, and the answer if one variable of the base had the source's value."""

from collections.abc import Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
import scipy.sparse.csgraph
from jaxtyping import Array, Bool, Int, PRNGKeyArray, Shaped

from mi_jax.core.errors import InputError
from mi_jax.decomposition.evaluation.estimates import generator


class Triples(eqx.Module):
    """(base, source, counterfactual label) triples; base and source align position by position.

    Attributes:
      base, source: inputs of the model, such as tokens `[batch pos]`.
      label: what the high-level model answers for the base with the source's value of the variable; a token or class.
      mask: True at real tokens of both; None where nothing is padded.
      position: where the answer is read, for models with an output at every position; None: at the last real token,
        which needs a causal model.
      places: named positions that differ between the triples, such as `{"subject": …}`.
    """

    base: Shaped[Array, "batch *input"]
    source: Shaped[Array, "batch *input"]
    label: Int[Array, " batch"]
    mask: Bool[Array, "batch pos"] | None = None
    position: Int[Array, " batch"] | None = None
    places: Mapping[str, Int[Array, " batch"]] = eqx.field(default_factory=dict)

    def __check_init__(self):
        leaves = jax.tree_util.tree_leaves_with_path(self)
        sizes = {jax.tree_util.keystr(path)[1:]: leaf.shape[:1] for path, leaf in leaves if eqx.is_array(leaf)}
        if len(set(sizes.values())) > 1:
            raise InputError(f"the parts of the triples have different numbers of rows: {sizes}")
        if self.base.shape != self.source.shape:
            raise InputError(
                f"base {self.base.shape} and source {self.source.shape} must align position by position; "
                "pad both to one length"
            )

    def __len__(self) -> int:
        return self.base.shape[0]

    def __getitem__(self, rows) -> "Triples":
        return jax.tree.map(lambda x: x[rows], self)

    def take(self, rows: np.ndarray | slice) -> "Triples":
        """These rows, gathered on the host: every number of rows would be another compiled gather on the device."""
        return jax.tree.map(lambda x: jnp.asarray(np.asarray(x)[rows]), self)

    def pairs(self) -> np.ndarray:
        """Base and source of every triple, one after the other in one row."""
        return np.concatenate([np.asarray(x).reshape(len(self), -1) for x in (self.base, self.source)], 1)

    def check_apart(self, held_out: "Triples") -> None:
        """Raises InputError where a held-out triple has the base and the source of one of these."""
        n = len(self)
        _, group = np.unique(np.concatenate([self.pairs(), held_out.pairs()]), axis=0, return_inverse=True)
        group = group.reshape(-1)
        shared = int(np.isin(group[n:], group[:n]).sum())
        if shared:
            raise InputError(
                f"{shared} of the {len(held_out)} held-out triples have the base and source of a training triple, so "
                "they would score what was trained on; give other triples, or a share such as held_out=0.25, which "
                "keeps equal pairs on one side"
            )

    def split(self, held_out: float = 0.25, *, key: PRNGKeyArray) -> tuple["Triples", "Triples"]:
        """Training and held-out triples that have no prompt in common, be it as base or as source.

        Triples whose two prompts come to different sides are left out. Prompts that go together are kept together:
        where every triple has prompts of its own none is left out, where few are combined freely about half are.

        Args:
          held_out: the least share of held-out triples among those on either side.

        Raises:
          InputError: one side would be empty.
        """
        n = len(self)
        prompts, number = np.unique(self.pairs().reshape(2 * n, -1), axis=0, return_inverse=True)
        number, n_prompts = number.reshape(n, 2), len(prompts)
        joined = scipy.sparse.coo_array((np.ones(n), (number[:, 0], number[:, 1])), (n_prompts, n_prompts))
        _, group = scipy.sparse.csgraph.connected_components(joined, directed=False)
        rng = generator(key)
        order = np.lexsort((rng.random(n_prompts), rng.permutation(n_prompts)[group]))
        rank = np.empty(n_prompts, int)
        rank[order] = np.arange(n_prompts)
        first, last = rank[number].min(1), rank[number].max(1)
        cuts = np.arange(n_prompts + 1)
        scored = np.searchsorted(np.sort(last), cuts)
        fitted = n - np.searchsorted(np.sort(first), cuts)
        good = (scored >= held_out * (scored + fitted)) & (scored > 0) & (fitted > 0)
        if not good.any():
            raise InputError(
                f"held_out={held_out} of {n} triples with {n_prompts} different prompts leaves one side empty; give "
                "more prompts, another share, or the held-out Triples themselves"
            )
        cut = int(cuts[good][0])
        return self.take(np.flatnonzero(first >= cut)), self.take(np.flatnonzero(last < cut))
