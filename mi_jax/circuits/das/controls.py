"""What a fit is compared with: arbitrary labels, a random model, and placebo edits.

A rotation is trained, so a high interchange accuracy alone may say more about the search than about the model (Sutter
et al. 2025, arXiv 2507.08802). The first two controls are trained by the same program with the same budget; the
placebos take the fitted edit's dimension, and its norm, but not its direction. None of them excludes a subspace that
drives the answer along a direction which the model itself leaves unused (Makelov et al. 2023, arXiv 2311.17030).
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from mi_jax.core.edits import Edit, transform
from mi_jax.core.errors import InputError
from mi_jax.decomposition.evaluation.estimates import generator
from mi_jax.models.decoder import Decoder
from mi_jax.models.parameters import init_decoder


def arbitrary_labels(
    labels: Int[np.ndarray, " batch"], n_seeds: int, *, key: PRNGKeyArray
) -> Int[np.ndarray, "seed d_vocab"]:
    """For every seed, a table from each answer to another one, so that no answer stays: a wrong causal model.

    The mapping is fixed, so what a search learns of it on the training triples holds on the held-out ones.

    Raises:
      InputError: all labels are the same.
    """
    classes = np.unique(labels)
    if len(classes) < 2:
        raise InputError(f"all labels are {classes.tolist()}: there is no variable to align")
    tables = np.tile(np.arange(classes.max() + 1, dtype=np.int32), (n_seeds, 1))
    rng = generator(key)
    for table in tables:
        # one random cycle through the classes: a plain permutation would leave some as they are
        cycle = rng.permutation(classes)
        table[cycle] = np.roll(cycle, 1)
    return tables


def random_model(model: Any, *, key: PRNGKeyArray) -> Any:
    """A model of the same shape that has learned nothing.

    A decoder is initialised anew. Any other pytree keeps its numbers, each array's entries in random order.
    """
    if isinstance(model, Decoder):
        return init_decoder(model.config, key=key, dtype=model.blocks.attn.q.dtype)
    arrays, rest = eqx.partition(model, eqx.is_inexact_array)
    leaves, treedef = jax.tree.flatten(arrays)
    rng = generator(key)
    shuffled = [jnp.asarray(rng.permutation(np.asarray(x).reshape(-1)).reshape(x.shape)) for x in leaves]
    return eqx.combine(jax.tree.unflatten(treedef, shuffled), rest)


def random_bases(shape: tuple[int, ...], *, key: PRNGKeyArray) -> Float[np.ndarray, "*cell d_model k"]:
    """Orthonormal columns in uniformly random directions."""
    return np.linalg.qr(generator(key).standard_normal(shape))[0].astype(np.float32)


class EqualNorm(eqx.Module):
    """Moves along a placebo subspace towards the source's value, as far as the fitted edit moves.

    `h + ‖d B Bᵀ‖ · d R Rᵀ / ‖d R Rᵀ‖` with `d = value − h`, B the fitted basis and R the placebo's.
    """

    basis: Float[Array, "d_model k"]
    placebo: Float[Array, "d_model k"]
    value: Float[Array, "batch *pos d_model"]

    def __call__(self, x: Float[Array, "batch *pos d_model"]) -> Float[Array, "batch *pos d_model"]:
        difference = (self.value - x).astype(self.basis.dtype)
        norm = jnp.linalg.norm(difference @ self.basis, axis=-1, keepdims=True)
        along = difference @ self.placebo
        length = jnp.maximum(jnp.linalg.norm(along, axis=-1, keepdims=True), jnp.finfo(along.dtype).tiny)
        return x + ((along * (norm / length)) @ self.placebo.T).astype(x.dtype)


def equal_norm(site: str, bases: tuple[Array, Array], value: Array, layer: Array | None, pos: Any) -> Edit:
    """The edit of `EqualNorm`; `bases` are the fitted one and the placebo's."""
    return transform(site, EqualNorm(*bases, value), layer=layer, pos=pos)
