"""Interchange data: a base, a source, and the answer if one variable of the base had the source's value."""

from collections.abc import Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, PRNGKeyArray, Shaped

from mi_jax.core.errors import InputError


def generator(key: PRNGKeyArray) -> np.random.Generator:
    """A generator of the host for small draws, seeded by a key."""
    return np.random.default_rng(np.asarray(jax.random.key_data(key)).reshape(-1).tolist())


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
        """Base and source of every triple as one row each."""
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
        """Training and held-out triples. Triples of the same base and source are never on both sides.

        Raises:
          InputError: one side would be empty.
        """
        n = len(self)
        _, group = np.unique(self.pairs(), axis=0, return_inverse=True)
        group = group.reshape(-1)
        rank = generator(key).permutation(int(group.max(initial=0)) + 1)[group]
        order = np.argsort(rank, kind="stable")
        cut = round(held_out * n)
        # a pair that straddles the cut goes to the held-out side with all its triples
        while 0 < cut < n and rank[order[cut]] == rank[order[cut - 1]]:
            cut += 1
        if not 0 < cut < n:
            raise InputError(
                f"held_out={held_out} of {n} triples with {int(group.max(initial=-1)) + 1} different pairs leaves one "
                "side empty; give more pairs, another share, or the held-out Triples themselves"
            )
        return self.take(order[cut:]), self.take(order[:cut])
