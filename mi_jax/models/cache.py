"""Keys and values of the tokens so far, and the layouts that keep them: of the prompts, and of one token more."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from mi_jax.models.config import DecoderConfig
from mi_jax.models.layout import Prompts

Kept = dict[str, Array]


def empty(config: DecoderConfig, batch: int, n_max: int, dtype) -> Kept:
    """Room for the keys and values of `n_max` tokens: `[layer batch n_max kv_head d_head]` by site.

    A token's place is its column in the prompts. So the padding after a shorter prompt is written over by what follows
    the prompt, and what is not written over lies behind every query; padding before a prompt is masked.
    """
    shape = (config.n_layers, batch, n_max, config.n_kv_heads, config.d_head)
    return {name: jnp.zeros(shape, dtype) for name in ("attn.k", "attn.v")}


class FillLayout(Prompts):
    """Whole prompts, whose keys and values are kept. Lives in the trace of one layer."""

    kept: Kept
    number: Int[Array, ""]

    def rows(self, name: str, x: Array) -> Array:
        if name in self.kept:
            start = (self.number, *(jnp.zeros((), jnp.int32),) * 4)
            self.kept[name] = jax.lax.dynamic_update_slice(self.kept[name], x[None], start)
        return x


class StepLayout(eqx.Module):
    """One new token per prompt, which sees the tokens before it. Lives in the trace of one layer.

    Attributes:
      place: of the new token.
      first: place of the first token of every text.
    """

    kept: Kept
    number: Int[Array, ""]
    place: Int[Array, " batch"]
    first: Int[Array, " batch"]

    @property
    def positions(self) -> Int[Array, "batch 1"]:
        return self.place[:, None]

    @property
    def asking_positions(self) -> Int[Array, "batch 1"]:
        return self.positions

    @property
    def queries(self) -> Int[Array, "batch 1"]:
        return self.positions

    @property
    def keys(self) -> Int[Array, "1 key"]:
        return jnp.arange(self.kept["attn.k"].shape[2], dtype=jnp.int32)[None]

    @property
    def mask(self) -> Bool[Array, "batch key"]:
        # places behind the new token hold no token yet; attention leaves them out as it does all later positions
        return self.keys >= self.first[:, None]

    def asking(self, x: Array) -> Array:
        return x

    def rows(self, name: str, x: Array) -> Array:
        if name not in self.kept:
            return x
        batch = jnp.arange(x.shape[0], dtype=jnp.int32)
        self.kept[name] = self.kept[name].at[self.number, batch, self.place].set(x[:, 0])
        return jax.lax.dynamic_index_in_dim(self.kept[name], self.number, keepdims=False)

    def flat(self, x: Array) -> Array:
        return x
