"""GPT-NeoX (Pythia): parallel blocks with a norm for each half; every head has its query, key and value together."""

from typing import Any

from mi_jax.models.checkpoints.families.family import Family
from mi_jax.models.checkpoints.families.fields import ACTIVATION_NAMES, Fields
from mi_jax.models.checkpoints.families.layer_norm import DOWN, OUT, UP, linear, norm
from mi_jax.models.checkpoints.families.rope import read_parameters, rope_fields, write_rope
from mi_jax.models.checkpoints.names import Stored
from mi_jax.models.config import DecoderConfig


def _read(f: Fields) -> DecoderConfig:
    d_model, n_heads = f.width("hidden_size", heads=("num_attention_heads",), d_model=6144, n_heads=64)
    n_ctx = f.integer("max_position_embeddings", default=2048)
    theta = f.number("rotary_emb_base", "rope_theta", default=10_000.0)
    share = f.number("rotary_pct", "partial_rotary_factor", default=0.25)
    rope = read_parameters(f, rope_fields(f), n_ctx, theta=theta, share=share)
    bias = f.flag("attention_bias", default=True)
    f.without_effect("is_decoder")
    return DecoderConfig(
        n_layers=f.layers("num_hidden_layers", default=44),
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=n_heads,
        d_head=d_model // n_heads,
        d_mlp=f.integer("intermediate_size", default=24576),
        d_vocab=f.integer("vocab_size", default=50432),
        n_ctx=n_ctx,
        rope_theta=rope.theta,
        rope_scaling=rope.scaling,
        rope_dim=rope.dim(d_model // n_heads),
        norm="layer",
        norm_eps=f.number("layer_norm_eps", default=1e-5),
        parallel=f.flag("use_parallel_residual", default=True),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=True,
        activation=f.activation("hidden_act", default="gelu"),
        gated=False,
        tied=f.flag("tie_word_embeddings", default=False),
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    share, rope = config.n_rotary / config.d_head, write_rope(config)
    rope["rope_parameters"]["partial_rotary_factor"] = share
    return {
        "hidden_size": config.d_model,
        "intermediate_size": config.d_mlp,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "vocab_size": config.d_vocab,
        "max_position_embeddings": config.n_ctx,
        "layer_norm_eps": config.norm_eps,
        "hidden_act": ACTIVATION_NAMES[config.activation],
        "use_parallel_residual": config.parallel,
        "attention_bias": config.qkv_bias,
        "tie_word_embeddings": config.tied,
        "rotary_emb_base": rope.pop("rope_theta"),
        "rotary_pct": share,
        **rope,
    }


def _table(config: DecoderConfig) -> tuple[Stored, ...]:
    layer, table = "gpt_neox.layers.{layer}.", "d_vocab d_model -> d_vocab d_model"
    fused = layer + "attention.query_key_value"
    entries = [
        Stored("embed", "gpt_neox.embed_in.weight", table),
        *norm("blocks.attn_norm", layer + "input_layernorm"),
        *norm("blocks.mlp_norm", layer + "post_attention_layernorm"),
        *linear("blocks.attn.o", layer + "attention.dense", OUT, bias=config.o_bias),
        *linear("blocks.mlp.up", layer + "mlp.dense_h_to_4h", UP),
        *linear("blocks.mlp.down", layer + "mlp.dense_4h_to_h", DOWN),
        *norm("final_norm", "gpt_neox.final_layer_norm"),
    ]
    for i, name in enumerate("qkv"):
        weight = "(head three d_head) d_model -> three d_model head d_head"
        entries.append(Stored(f"blocks.attn.{name}", f"{fused}.weight", weight, pick=i))
        if config.qkv_bias:
            bias = "(head three d_head) -> three head d_head"
            entries.append(Stored(f"blocks.attn.{name}_bias", f"{fused}.bias", bias, pick=i))
    if not config.tied:
        entries.append(Stored("unembed", "embed_out.weight", table))
    return tuple(entries)


# older files hold the causal mask and the frequencies, and those of the bare model have no prefix
GPT_NEOX = Family(
    "gpt_neox",
    "GPTNeoXForCausalLM",
    _read,
    _write,
    _table,
    (r"(lm_head|embed_out)\.weight", r".*\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)"),
    ((r"^gpt_neox\.", ""), (r"^embed_out\.", "lm_head.")),
    ("Model", "ForCausalLM"),
)
