"""What the sweeps are timed on: a random model of GPT-2-small's shape and pairs of prompts, equal for every program."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jaxtyping import Array, Float, Int, PRNGKeyArray

import mi_jax as mi
from mi_jax.models import Decoder, DecoderConfig, init_decoder

GPT2_SMALL = DecoderConfig(
    name="gpt2-small",
    n_layers=12,
    d_model=768,
    n_heads=12,
    n_kv_heads=12,
    d_head=64,
    d_mlp=3072,
    d_vocab=50257,
    n_ctx=1024,
    positions="learned",
    norm="layer",
    activation="gelu",
    gated=False,
    tied=False,
)
SMOKE = dataclasses.replace(
    GPT2_SMALL, name="smoke", n_layers=2, d_model=16, n_heads=2, n_kv_heads=2, d_head=8, d_mlp=32, d_vocab=29, n_ctx=12
)
BATCH, N_POS = 8, 16
TOKENS = (5, 7)


@dataclasses.dataclass(frozen=True)
class Setting:
    """A model, clean and corrupt prompts, and the clean run's activations at the patched sites."""

    model: Decoder
    clean: Int[Array, "batch pos"]
    corrupt: Int[Array, "batch pos"]
    activations: Mapping[str, Array]

    @property
    def last(self) -> Int[Array, " batch"]:
        """The position that the metric reads, of every example."""
        batch, n_pos = self.clean.shape
        return jnp.full((batch,), n_pos - 1, jnp.int32)

    def save(self, path: Path) -> None:
        """Writes weights and prompts for the other programs."""
        arrays = {
            jax.tree_util.keystr(name, simple=True, separator="."): np.asarray(leaf)
            for name, leaf in jax.tree_util.tree_leaves_with_path(self.model)
        }
        prompts = {"clean": np.asarray(self.clean), "corrupt": np.asarray(self.corrupt)}
        safetensors.numpy.save_file(arrays | prompts, path)


def metric(logits: Float[Array, "batch pos d_vocab"]) -> Float[Array, ""]:
    """Mean difference of two tokens' logits at the last position."""
    return (logits[:, -1, TOKENS[0]] - logits[:, -1, TOKENS[1]]).mean()


def setting(config: DecoderConfig, batch: int, n_pos: int, *, key: PRNGKeyArray) -> Setting:
    """Random weights; prompts of random tokens, the corrupt ones with another token everywhere, so each cell counts."""
    weights, prompts = jax.random.split(key)
    model = init_decoder(config, key=weights)
    clean = jax.random.randint(prompts, (batch, n_pos), 0, config.d_vocab, jnp.int32)
    corrupt = (clean + 9) % config.d_vocab
    activations = mi.jit(mi.capture(model, "resid_pre", "attn.z"))(clean, output=False)[1]
    return Setting(model, clean, corrupt, activations)
