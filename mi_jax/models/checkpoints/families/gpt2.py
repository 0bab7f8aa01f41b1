"""GPT-2: its linear maps are stored `[in out]`, queries, keys and values in one."""

from typing import Any

from mi_jax.models.checkpoints.families.family import Family
from mi_jax.models.checkpoints.families.fields import ACTIVATION_NAMES, Fields
from mi_jax.models.checkpoints.families.layer_norm import norm
from mi_jax.models.checkpoints.names import Stored
from mi_jax.models.config import DecoderConfig


def sizes(f: Fields, *, d_model: int, n_layers: int, n_heads: int, n_ctx: int, d_vocab: int) -> dict[str, Any]:
    """The sizes of GPT-2 and GPT-J; the arguments are those of a file without the key."""
    d_model, n_heads = f.width(
        "n_embd", "hidden_size", heads=("n_head", "num_attention_heads"), d_model=d_model, n_heads=n_heads
    )
    return {
        "n_layers": f.layers("n_layer", "num_hidden_layers", default=n_layers),
        "d_model": d_model,
        "n_heads": n_heads,
        "n_kv_heads": n_heads,
        "d_head": d_model // n_heads,
        "d_mlp": f.integer("n_inner", default=4 * d_model),
        "d_vocab": f.integer("vocab_size", default=d_vocab),
        "n_ctx": f.integer("n_positions", "max_position_embeddings", default=n_ctx),
        "norm": "layer",
        "norm_eps": f.number("layer_norm_epsilon", default=1e-5),
        "activation": f.activation("activation_function", default="gelu_new"),
        "gated": False,
        "mlp_bias": True,
    }


def write_sizes(config: DecoderConfig) -> dict[str, Any]:
    """The keys that `sizes` reads."""
    return {
        "n_embd": config.d_model,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_inner": config.d_mlp,
        "n_positions": config.n_ctx,
        "vocab_size": config.d_vocab,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": (ACTIVATION_NAMES | {"gelu": "gelu_new"})[config.activation],
        "tie_word_embeddings": config.tied,
    }


def _read(f: Fields) -> DecoderConfig:
    shape = sizes(f, d_model=768, n_layers=12, n_heads=12, n_ctx=1024, d_vocab=50257)
    f.only("scale_attn_by_inverse_layer_idx", False, None)
    f.only("add_cross_attention", False, None)
    return DecoderConfig(
        **shape,
        positions="learned",
        qkv_bias=True,
        o_bias=True,
        attn_scale=None if f.flag("scale_attn_weights", default=True) else 1.0,
        tied=f.flag("tie_word_embeddings", default=True),
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    return {**write_sizes(config), "scale_attn_weights": config.attn_scale is None}


def _table(config: DecoderConfig) -> tuple[Stored, ...]:
    layer, d = "transformer.h.{layer}.", config.d_model
    entries = [
        Stored("embed", "transformer.wte.weight", "d_vocab d_model -> d_vocab d_model"),
        Stored("pos_embed", "transformer.wpe.weight", "n_ctx d_model -> n_ctx d_model"),
        *norm("blocks.attn_norm", layer + "ln_1"),
        *norm("blocks.mlp_norm", layer + "ln_2"),
        *norm("final_norm", "transformer.ln_f"),
        Stored("blocks.attn.o", layer + "attn.c_proj.weight", "(head d_head) d_model -> head d_head d_model"),
        Stored("blocks.attn.o_bias", layer + "attn.c_proj.bias", "d_model -> d_model"),
        Stored("blocks.mlp.up", layer + "mlp.c_fc.weight", "d_model d_mlp -> d_model d_mlp"),
        Stored("blocks.mlp.up_bias", layer + "mlp.c_fc.bias", "d_mlp -> d_mlp"),
        Stored("blocks.mlp.down", layer + "mlp.c_proj.weight", "d_mlp d_model -> d_mlp d_model"),
        Stored("blocks.mlp.down_bias", layer + "mlp.c_proj.bias", "d_model -> d_model"),
    ]
    for i, (name, head) in enumerate((("q", "head"), ("k", "kv_head"), ("v", "kv_head"))):
        weight, bias = f"d_model ({head} d_head) -> d_model {head} d_head", f"({head} d_head) -> {head} d_head"
        at = f"{layer}attn.c_attn"
        entries.append(Stored(f"blocks.attn.{name}", f"{at}.weight", weight, (1, i * d, (i + 1) * d)))
        entries.append(Stored(f"blocks.attn.{name}_bias", f"{at}.bias", bias, (0, i * d, (i + 1) * d)))
    if not config.tied:
        entries.append(Stored("unembed", "lm_head.weight", "d_vocab d_model -> d_vocab d_model"))
    return tuple(entries)


# older files hold the causal mask, and those of the bare model have no prefix
GPT2 = Family(
    "gpt2",
    "GPT2LMHeadModel",
    _read,
    _write,
    _table,
    (r"lm_head\.weight", r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)"),
    ((r"^transformer\.", ""),),
)
