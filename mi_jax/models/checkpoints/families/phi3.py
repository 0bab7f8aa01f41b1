"""Phi-3 and Phi-4: like Llama, with queries, keys and values in one tensor, and gate and up in another."""

from typing import Any

from mi_jax.models.checkpoints.families.family import Family
from mi_jax.models.checkpoints.families.fields import Fields
from mi_jax.models.checkpoints.families.llama import IGNORED, VARIANTS, rest_table, sizes, write_sizes
from mi_jax.models.checkpoints.families.rope import read_parameters, rope_fields, write_rope
from mi_jax.models.checkpoints.names import Stored
from mi_jax.models.config import DecoderConfig


def _read(f: Fields) -> DecoderConfig:
    shape = sizes(f, d_model=3072, n_layers=32, n_heads=32, n_kv_heads=None, d_mlp=8192, d_vocab=32064, n_ctx=4096)
    theta, share = f.number("rope_theta", default=10_000.0), f.number("partial_rotary_factor", default=1.0)
    # the other kind the family has is longrope, two frequency tables that the length of the text chooses between
    rope = read_parameters(f, rope_fields(f), shape["n_ctx"], theta=theta, share=share, kinds=("default",))
    window = f.integer("sliding_window", default=0, null=0)
    return DecoderConfig(
        **shape,
        rope_theta=rope.theta,
        rope_dim=rope.dim(shape["d_head"]),
        windows=(window,) * shape["n_layers"] if window else (),
        norm_eps=f.number("rms_norm_eps", default=1e-5),
        activation=f.activation("hidden_act", default="silu"),
        tied=f.flag("tie_word_embeddings", default=False),
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    written = {**write_sizes(config), **write_rope(config), "sliding_window": max(config.windows, default=0) or None}
    if config.rope_dim is not None:
        share = config.rope_dim / config.d_head
        written["partial_rotary_factor"] = written["rope_parameters"]["partial_rotary_factor"] = share
    return written


def _table(config: DecoderConfig) -> tuple[Stored, ...]:
    attn, mlp = "model.layers.{layer}.self_attn.", "model.layers.{layer}.mlp."
    ends = [0, config.n_heads, config.n_heads + config.n_kv_heads, config.n_heads + 2 * config.n_kv_heads]
    entries = [Stored("blocks.attn.o", attn + "o_proj.weight", "d_model (head d_head) -> head d_head d_model")]
    for i, (name, head) in enumerate((("q", "head"), ("k", "kv_head"), ("v", "kv_head"))):
        pattern = f"({head} d_head) d_model -> d_model {head} d_head"
        part = (0, ends[i] * config.d_head, ends[i + 1] * config.d_head)
        entries.append(Stored(f"blocks.attn.{name}", attn + "qkv_proj.weight", pattern, part))
    for i, name in enumerate(("gate", "up")):
        part = (0, i * config.d_mlp, (i + 1) * config.d_mlp)
        pattern = "d_mlp d_model -> d_model d_mlp"
        entries.append(Stored(f"blocks.mlp.{name}", mlp + "gate_up_proj.weight", pattern, part))
    entries.append(Stored("blocks.mlp.down", mlp + "down_proj.weight", "d_model d_mlp -> d_mlp d_model"))
    return rest_table(config) + tuple(entries)


PHI3 = Family("phi3", "Phi3ForCausalLM", _read, _write, _table, IGNORED, VARIANTS)
