"""What of a last layer the answer needs: its own position asks, all positions are asked."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class AnswerLayout(eqx.Module):
    """The layout of a layer in which only the position of the answer asks."""

    mask: Bool[Array, "batch pos"]
    answer: Int[Array, " batch"]

    @property
    def positions(self) -> Int[Array, "1 pos"]:
        return jnp.arange(self.mask.shape[1], dtype=jnp.int32)[None]

    @property
    def asking_positions(self) -> Int[Array, "batch 1"]:
        return self.answer[:, None]

    @property
    def queries(self) -> Int[Array, "batch 1"]:
        return self.asking_positions

    @property
    def keys(self) -> Int[Array, "1 pos"]:
        return self.positions

    def asking(self, x: Array) -> Array:
        return at_answer(x, self.answer, 1)

    def rows(self, name: str, x: Array) -> Array:
        return x

    def flat(self, x: Array) -> Array:
        return x


def at_answer(x: Array, position: Int[Array, " batch"], axis: int) -> Array:
    """The value at the position of each prompt, the batch being the axis before that of the positions."""
    shape = [1] * x.ndim
    shape[axis - 1] = len(position)
    return jnp.take_along_axis(x, position.reshape(shape), axis=axis)
