"""Layouts: which tokens the stream of a layer holds, and how attention sees them."""

from typing import Protocol, runtime_checkable

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@runtime_checkable
class Layout(Protocol):
    """What a layer asks about the pos axis of its stream.

    Attention works on rows, one prompt each: `rows` makes them of the stream's tokens, `flat` is the way back. A layer
    computes its output for the tokens that `asking` chooses of the stream; all tokens give keys and values.

    Attributes:
      positions: of the stream's tokens.
      asking_positions: of the tokens that ask.
      queries, keys: positions of the rows' queries and keys.
      mask: the keys that may be seen at all.
    """

    @property
    def positions(self) -> Int[Array, "#batch pos"]: ...
    @property
    def asking_positions(self) -> Int[Array, "#batch #query"]: ...
    @property
    def queries(self) -> Int[Array, "#row query"]: ...
    @property
    def keys(self) -> Int[Array, "#row key"]: ...
    @property
    def mask(self) -> Bool[Array, "row key"]: ...
    def asking(self, x: Array) -> Array: ...
    def rows(self, name: str, x: Array) -> Array: ...
    def flat(self, x: Array) -> Array: ...


class Prompts(eqx.Module):
    """The layout of whole prompts: the rows are the batch, and all tokens ask."""

    mask: Bool[Array, "batch pos"]

    @property
    def positions(self) -> Int[Array, "1 pos"]:
        return jnp.arange(self.mask.shape[1], dtype=jnp.int32)[None]

    @property
    def asking_positions(self) -> Int[Array, "1 pos"]:
        return self.positions

    @property
    def queries(self) -> Int[Array, "1 pos"]:
        return self.positions

    @property
    def keys(self) -> Int[Array, "1 pos"]:
        return self.positions

    def asking(self, x: Array) -> Array:
        return x

    def rows(self, name: str, x: Array) -> Array:
        return x

    def flat(self, x: Array) -> Array:
        return x
