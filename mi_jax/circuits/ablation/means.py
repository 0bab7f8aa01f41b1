"""What the sources write on average, padding left out."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mi_jax.circuits.runs.sources import source_outputs
from mi_jax.core.precision import widened, widened_dtype
from mi_jax.data.task import Task
from mi_jax.models.decoder import Decoder

# prompts that run at once
_AT_ONCE = 16


class SourceMeans(NamedTuple):
    """Means over the real tokens of corrupt prompts, in float32 or better.

    Attributes:
      mean: of what every source writes, at every position or over all.
      size: root mean square of its components.
    """

    mean: Float[Array, "source #pos d_model"]
    size: Float[Array, " source"]


def source_means(model: Decoder, task: Task, *, positional: bool = False) -> SourceMeans:
    """Means over the corrupt prompts of a task; at positions that no prompt has, the mean over all tokens."""
    n, n_pos = task.corrupt.shape
    at_once = min(n, _AT_ONCE)
    room = ((0, -n % at_once), (0, 0))
    tokens, mask = (jnp.pad(a, room).reshape(-1, at_once, n_pos) for a in (task.corrupt, task.mask))

    def add(total, row):
        tokens, real = row
        # a prompt that only fills up has a token, lest nothing can be attended to
        written = widened(source_outputs(model, tokens, real.at[:, 0].set(True)))
        weights = real.astype(written.dtype)
        sums = jnp.einsum("sbpd,bp->spd", written, weights)
        squares = jnp.einsum("sbpd,bp->s", jnp.square(written), weights)
        return (total[0] + sums, total[1] + squares), None

    shape = jax.eval_shape(lambda: source_outputs(model, tokens[0], mask[0]))
    n_sources, d_model, dtype = shape.shape[0], shape.shape[-1], widened_dtype(shape.dtype)
    start = jnp.zeros((n_sources, n_pos, d_model), dtype), jnp.zeros(n_sources, dtype)
    (total, squares), _ = jax.lax.scan(add, start, (tokens, mask))
    count = task.mask.sum(0).astype(dtype)
    size = jnp.sqrt(squares / (count.sum() * d_model))
    overall = total.sum(1, keepdims=True) / count.sum()
    if not positional:
        return SourceMeans(overall, size)
    by_position = total / jnp.maximum(count, 1)[None, :, None]
    return SourceMeans(jnp.where((count > 0)[None, :, None], by_position, overall), size)
