"""BERT encoders (MiniLM and others): norms on the stream after each addition, and no mask but that of padding.

What is read is the encoder, whose output is the last stream. The tensors of the pooler and of the heads that
classes such as `BertForMaskedLM` put on it are ignored.
"""

from typing import Any

from mi_jax.models.checkpoints.families.family import Family
from mi_jax.models.checkpoints.families.fields import ACTIVATION_NAMES, Fields
from mi_jax.models.checkpoints.families.layer_norm import DOWN, OUT, UP, K, Q, V, linear, norm
from mi_jax.models.checkpoints.names import Stored
from mi_jax.models.config import DecoderConfig


def _read(f: Fields) -> DecoderConfig:
    d_model, n_heads = f.width("hidden_size", heads=("num_attention_heads",), d_model=768, n_heads=12)
    types = f.integer("type_vocab_size", default=2)
    if types < 1:
        raise f.wrong("type_vocab_size", types, "a positive number")
    f.only("is_decoder", False, None)
    f.only("add_cross_attention", False, None)
    f.only("position_embedding_type", "absolute", None)
    f.only("directionality", "bidi")
    # of the pooler and the heads
    f.without_effect("pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers", "pooler_size_per_head")
    f.without_effect("pooler_type", "tie_word_embeddings")
    return DecoderConfig(
        n_layers=f.layers("num_hidden_layers", default=12),
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=n_heads,
        d_head=d_model // n_heads,
        d_mlp=f.integer("intermediate_size", default=3072),
        d_vocab=f.integer("vocab_size", default=30522),
        n_ctx=f.integer("max_position_embeddings", default=512),
        causal=False,
        positions="learned",
        n_token_types=types,
        norm="layer",
        norm_eps=f.number("layer_norm_eps", default=1e-12),
        norms="post",
        embed_norm=True,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        activation=f.activation("hidden_act", default="gelu"),
        gated=False,
        head="none",
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    return {
        "hidden_size": config.d_model,
        "intermediate_size": config.d_mlp,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "vocab_size": config.d_vocab,
        "max_position_embeddings": config.n_ctx,
        "type_vocab_size": config.n_token_types,
        "layer_norm_eps": config.norm_eps,
        "hidden_act": ACTIVATION_NAMES[config.activation],
    }


def _table(config: DecoderConfig) -> tuple[Stored, ...]:
    layer = "encoder.layer.{layer}."
    return (
        Stored("embed", "embeddings.word_embeddings.weight", "d_vocab d_model -> d_vocab d_model"),
        Stored("pos_embed", "embeddings.position_embeddings.weight", "n_ctx d_model -> n_ctx d_model"),
        Stored("type_embed", "embeddings.token_type_embeddings.weight", "type d_model -> type d_model"),
        *norm("embed_norm", "embeddings.LayerNorm"),
        *linear("blocks.attn.q", layer + "attention.self.query", Q),
        *linear("blocks.attn.k", layer + "attention.self.key", K),
        *linear("blocks.attn.v", layer + "attention.self.value", V),
        *linear("blocks.attn.o", layer + "attention.output.dense", OUT),
        *norm("blocks.attn_post_norm", layer + "attention.output.LayerNorm"),
        *linear("blocks.mlp.up", layer + "intermediate.dense", UP),
        *linear("blocks.mlp.down", layer + "output.dense", DOWN),
        *norm("blocks.mlp_post_norm", layer + "output.LayerNorm"),
    )


# files of models with a head have a prefix, and the oldest other names for weight and bias
BERT = Family(
    "bert",
    "BertModel",
    _read,
    _write,
    _table,
    (r"(bert\.)?pooler\..*", r"(bert\.)?embeddings\.position_ids", r"(cls|classifier|qa_outputs)\..*"),
    ((r"^", "bert."), (r"LayerNorm\.weight$", "LayerNorm.gamma"), (r"LayerNorm\.bias$", "LayerNorm.beta")),
    (),
)
