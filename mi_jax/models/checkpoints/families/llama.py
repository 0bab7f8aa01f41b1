"""Llama (2, 3, SmolLM2) and Mistral, and what the many families that are built like them share."""

from typing import Any

from mi_jax.models.checkpoints.families.family import Family
from mi_jax.models.checkpoints.families.fields import ACTIVATION_NAMES, Fields
from mi_jax.models.checkpoints.families.rope import read_rope, write_rope
from mi_jax.models.checkpoints.names import Stored
from mi_jax.models.config import DecoderConfig

_LAYER = "model.layers.{layer}."
# under the names of the norms in the parameter tree, for every place where norms stand
_NORMS = {
    "pre": {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    "output": {"attn_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"},
    "sandwich": {
        "attn_norm": "input_layernorm",
        "attn_post_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    },
}
# a tied checkpoint may hold the shared table twice; older ones hold the rotary frequencies
IGNORED = (r"lm_head\.weight", r".*\.rotary_emb\.inv_freq")
# a file of the bare model has no prefix
VARIANTS = ((r"^model\.", ""),)


def sizes(
    f: Fields,
    *,
    d_model: int,
    n_layers: int,
    n_heads: int,
    n_kv_heads: int | None,
    d_mlp: int,
    d_vocab: int,
    n_ctx: int,
    d_head: int | None = None,
    divided: bool = False,
) -> dict[str, Any]:
    """The sizes of a configuration; the arguments are those of a file without the key.

    `divided` is of families whose reference wants d_model to be a multiple of the heads, whatever the size of a head.
    """
    d_model = f.integer("hidden_size", default=d_model)
    n_heads = f.integer("num_attention_heads", default=n_heads)
    by_heads = d_model // max(n_heads, 1)
    if divided and by_heads * n_heads != d_model:
        raise f.wrong("hidden_size, num_attention_heads", (d_model, n_heads), "a number and a divisor of it")
    return {
        "n_layers": f.layers("num_hidden_layers", default=n_layers),
        "d_model": d_model,
        "n_heads": n_heads,
        "n_kv_heads": f.integer("num_key_value_heads", default=n_kv_heads or n_heads, null=n_heads),
        "d_head": f.integer("head_dim", default=d_head or by_heads, null=by_heads),
        "d_mlp": f.integer("intermediate_size", default=d_mlp),
        "d_vocab": f.integer("vocab_size", default=d_vocab),
        "n_ctx": f.integer("max_position_embeddings", default=n_ctx),
    }


def write_sizes(config: DecoderConfig) -> dict[str, Any]:
    """The keys that `sizes` reads, and those of the norms, the activation and the unembedding."""
    return {
        "hidden_size": config.d_model,
        "intermediate_size": config.d_mlp,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.d_head,
        "vocab_size": config.d_vocab,
        "max_position_embeddings": config.n_ctx,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": ACTIVATION_NAMES[config.activation],
        "tie_word_embeddings": config.tied,
    }


def biases(f: Fields) -> dict[str, Any]:
    """`attention_bias`, which is of all four projections."""
    attention = f.flag("attention_bias")
    return {"qkv_bias": attention, "o_bias": attention}


def attention_table(config: DecoderConfig, layer: str = _LAYER) -> tuple[Stored, ...]:
    """The projections of attention, each in its own tensor."""
    at = layer + "self_attn."
    entries = [
        Stored("blocks.attn.q", at + "q_proj.weight", "(head d_head) d_model -> d_model head d_head"),
        Stored("blocks.attn.k", at + "k_proj.weight", "(kv_head d_head) d_model -> d_model kv_head d_head"),
        Stored("blocks.attn.v", at + "v_proj.weight", "(kv_head d_head) d_model -> d_model kv_head d_head"),
        Stored("blocks.attn.o", at + "o_proj.weight", "d_model (head d_head) -> head d_head d_model"),
    ]
    for name, head in (("q", "head"), ("k", "kv_head"), ("v", "kv_head")):
        flat = f"({head} d_head) -> {head} d_head"
        if config.qkv_bias:
            entries.append(Stored(f"blocks.attn.{name}_bias", f"{at}{name}_proj.bias", flat))
        if config.qk_norm != "none" and name != "v":
            pattern = "d_head -> d_head" if config.qk_norm == "head" else flat
            entries.append(Stored(f"blocks.attn.{name}_norm.weight", f"{at}{name}_norm.weight", pattern))
    if config.o_bias:
        entries.append(Stored("blocks.attn.o_bias", at + "o_proj.bias", "d_model -> d_model"))
    return tuple(entries)


def mlp_table(config: DecoderConfig, layer: str = _LAYER) -> tuple[Stored, ...]:
    """The gated MLP, or the router and the MLPs of all experts."""
    into, out, at = "d_mlp d_model -> d_model d_mlp", "d_model d_mlp -> d_mlp d_model", layer + "mlp."
    entries = []
    if config.n_experts:
        entries.append(Stored("blocks.mlp.router", at + "gate.weight", "expert d_model -> d_model expert"))
        at += "experts.{expert}."
    for name, pattern in (("gate", into), ("up", into), ("down", out)):
        entries.append(Stored(f"blocks.mlp.{name}", f"{at}{name}_proj.weight", pattern))
        if config.mlp_bias:
            axis = pattern.split()[0]
            entries.append(Stored(f"blocks.mlp.{name}_bias", f"{at}{name}_proj.bias", f"{axis} -> {axis}"))
    return tuple(entries)


def rest_table(config: DecoderConfig, layer: str = _LAYER) -> tuple[Stored, ...]:
    """The embedding, the norms and the unembedding."""
    table, norm = "d_vocab d_model -> d_vocab d_model", "d_model -> d_model"
    entries = [
        Stored("embed", "model.embed_tokens.weight", table),
        Stored("final_norm.weight", "model.norm.weight", norm),
    ]
    for ours, theirs in _NORMS[config.norms].items():
        entries.append(Stored(f"blocks.{ours}.weight", f"{layer}{theirs}.weight", norm))
    if not config.tied:
        entries.append(Stored("unembed", "lm_head.weight", table))
    return tuple(entries)


def table(config: DecoderConfig) -> tuple[Stored, ...]:
    """Where a family built like Llama has its parameters."""
    return rest_table(config) + attention_table(config) + mlp_table(config)


def _read_llama(f: Fields) -> DecoderConfig:
    shape = sizes(
        f, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=None, d_mlp=11008, d_vocab=32000, n_ctx=2048, divided=True
    )
    theta, scaling, _ = read_rope(f, shape["n_ctx"])
    f.only("rope_interleaved", False)
    return DecoderConfig(
        **shape,
        **biases(f),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=f.number("rms_norm_eps", default=1e-6),
        activation=f.activation("hidden_act", default="silu"),
        mlp_bias=f.flag("mlp_bias"),
        tied=f.flag("tie_word_embeddings", default=False),
    )


def _write_llama(config: DecoderConfig) -> dict[str, Any]:
    own = {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
    return {**write_sizes(config), **write_rope(config), **own}


def _read_mistral(f: Fields) -> DecoderConfig:
    shape = sizes(f, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=8, d_mlp=14336, d_vocab=32000, n_ctx=131072)
    theta, scaling, _ = read_rope(f, shape["n_ctx"])
    window = f.integer("sliding_window", default=4096, null=0)
    return DecoderConfig(
        **shape,
        rope_theta=theta,
        rope_scaling=scaling,
        windows=(window,) * shape["n_layers"] if window else (),
        norm_eps=f.number("rms_norm_eps", default=1e-6),
        activation=f.activation("hidden_act", default="silu"),
        tied=f.flag("tie_word_embeddings", default=False),
    )


def _write_mistral(config: DecoderConfig) -> dict[str, Any]:
    return {**write_sizes(config), **write_rope(config), "sliding_window": max(config.windows, default=0) or None}


LLAMA = Family("llama", "LlamaForCausalLM", _read_llama, _write_llama, table, IGNORED, VARIANTS)
MISTRAL = Family("mistral", "MistralForCausalLM", _read_mistral, _write_mistral, table, IGNORED, VARIANTS)
