"""Codes of labelled examples: pooled over tokens, averaged per class, gathered at chosen latents.

An example is one activation `[d_in]`, or the activations of a text `[pos d_in]`, whose codes are averaged over its
real tokens. No [n, d_sae] array is held: what is needed of all latents is summed batch by batch.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mi_jax.core.errors import InputError
from mi_jax.decomposition.evaluation.batches import row_slices, widened
from mi_jax.decomposition.evaluation.reconstructor import Reconstructor


class Examples(eqx.Module):
    """Inputs with labels.

    Attributes:
      x: one activation an example, or one a token.
      labels: `[n concept]`, True where the example has the concept.
      mask: real tokens, where `x` has a `pos` axis; None means all are.
    """

    x: Float[Array | np.ndarray, "n *pos d_in"]
    labels: Bool[Array | np.ndarray, "row concept"]
    mask: Bool[Array | np.ndarray, "*tokens"] | None = None

    def __check_init__(self):
        if self.x.ndim not in (2, 3) or self.labels.shape[0] != self.x.shape[0]:
            raise InputError(
                f"examples have x of shape [n, d_in] or [n, pos, d_in] and one row of labels each; got {self.x.shape} "
                f"and {self.labels.shape}"
            )
        if self.mask is not None and self.mask.shape != self.x.shape[:-1]:
            raise InputError(f"the mask has shape {self.mask.shape}, the tokens have {self.x.shape[:-1]}")
        count = np.asarray(self.labels).sum(0)
        if not (count.all() and (count < len(self.x)).all()):
            raise InputError(f"every concept needs examples with and without it; with it are {count.tolist()}")

    def __len__(self) -> int:
        return self.x.shape[0]


def one_vs_rest(classes: Int[Array | np.ndarray, " n"], n_classes: int | None = None) -> Bool[np.ndarray, "n concept"]:
    """Class numbers as one concept per class."""
    classes = np.asarray(classes)
    return classes[:, None] == np.arange(int(classes.max()) + 1 if n_classes is None else n_classes)[None, :]


def pooled(values: Float[Array, "n *pos d"], mask: Bool[Array, "n pos"] | None) -> Float[Array, "n d"]:
    """The mean over the real tokens of each example."""
    if values.ndim == 2:
        return values
    weight = jnp.ones(values.shape[:2], values.dtype) if mask is None else mask.astype(values.dtype)
    return jnp.einsum("npd,np->nd", values, weight) / jnp.maximum(weight.sum(1), 1)[:, None]


@eqx.filter_jit
def _sums(dictionary, x, mask, positive, negative):
    codes = pooled(widened(dictionary).encode(x), mask)
    return positive.T @ codes, negative.T @ codes


@eqx.filter_jit
def _gathered(dictionary, x, mask, latents):
    return pooled(widened(dictionary).encode(x), mask)[:, latents]


@eqx.filter_jit
def _mean(x, mask):
    return pooled(x, mask)


def _rows(examples: Examples, rows: np.ndarray) -> tuple[Array, Any]:
    return widened(jnp.asarray(examples.x[rows])), None if examples.mask is None else jnp.asarray(examples.mask[rows])


def class_means(
    dictionary: Reconstructor, examples: Examples, batch_size: int
) -> tuple[Float[np.ndarray, "concept d_sae"], Float[np.ndarray, "concept d_sae"]]:
    """Mean pooled codes of the examples with each concept, and of those without it."""
    labels = np.asarray(examples.labels)
    totals = [0.0, 0.0]
    for rows, n in row_slices(len(examples), batch_size):
        real = (np.arange(len(rows)) < n)[:, None]
        weights = [jnp.asarray(side[rows] & real, jnp.float32) for side in (labels, ~labels)]
        sums = _sums(dictionary, *_rows(examples, rows), *weights)
        totals = [total + np.asarray(s, np.float64) for total, s in zip(totals, sums, strict=True)]
    positive, negative = totals
    return positive / labels.sum(0)[:, None], negative / (~labels).sum(0)[:, None]


def codes_at(
    dictionary: Reconstructor, examples: Examples, latents: Int[np.ndarray, "*places"], batch_size: int
) -> Float[np.ndarray, "n *places"]:
    """Pooled codes of every example at some latents."""
    parts = [
        np.asarray(_gathered(dictionary, *_rows(examples, rows), jnp.asarray(latents)))[:n]
        for rows, n in row_slices(len(examples), batch_size)
    ]
    return np.concatenate(parts)


def mean_activations(examples: Examples, batch_size: int) -> Float[Array, "n d_in"]:
    """Pooled activations of every example."""
    return jnp.concatenate([_mean(*_rows(examples, rows))[:n] for rows, n in row_slices(len(examples), batch_size)])


def balanced_weights(labels: Bool[np.ndarray, "n concept"]) -> Float[np.ndarray, "n concept"]:
    """Weights of sum 1 per concept that give both classes one half: a weighted accuracy is the balanced one."""
    labels = np.asarray(labels)
    return np.where(labels, 0.5 / labels.sum(0)[None, :], 0.5 / (~labels).sum(0)[None, :])


def linear_decoder(dictionary: Any) -> Float[Array, "d_sae d_out"]:
    """The directions that codes are multiplied with.

    Raises:
      InputError: the dictionary has no such directions, or they depend on the token.
    """
    w_dec = getattr(dictionary, "w_dec", None)
    if not isinstance(w_dec, jax.Array) or w_dec.ndim != 2 or getattr(dictionary, "token_norm", None) is not None:
        raise InputError(
            f"this score follows codes along fixed decoder directions w_dec [d_sae, d_out]; "
            f"{type(dictionary).__name__} has none (or normalises every token by its own scale)"
        )
    return widened(w_dec)
