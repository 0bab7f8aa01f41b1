"""GPT-J: attention and MLP read through one norm, and rotary positions turn adjacent components."""

from typing import Any

from mi_jax.models.checkpoints.families.family import Family
from mi_jax.models.checkpoints.families.fields import Fields
from mi_jax.models.checkpoints.families.gpt2 import sizes, write_sizes
from mi_jax.models.checkpoints.families.layer_norm import DOWN, OUT, UP, K, Q, V, linear, norm
from mi_jax.models.checkpoints.names import Stored
from mi_jax.models.config import DecoderConfig


def _read(f: Fields) -> DecoderConfig:
    shape = sizes(f, d_model=4096, n_layers=28, n_heads=16, n_ctx=2048, d_vocab=50400)
    f.only("rotary", True)
    f.only("scale_attn_weights", True)
    turned = f.integer("rotary_dim", default=64, null=0)
    return DecoderConfig(
        **shape,
        rope_adjacent=True,
        rope_dim=None if turned == shape["d_head"] else turned,
        parallel=True,
        shared_norm=True,
        unembed_bias=True,
        tied=f.flag("tie_word_embeddings", default=False),
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    return {**write_sizes(config), "rotary_dim": config.n_rotary}


def _table(config: DecoderConfig) -> tuple[Stored, ...]:
    layer, table = "transformer.h.{layer}.", "d_vocab d_model -> d_vocab d_model"
    entries = [
        Stored("embed", "transformer.wte.weight", table),
        *norm("blocks.attn_norm", layer + "ln_1"),
        *linear("blocks.attn.q", layer + "attn.q_proj", Q, bias=False),
        *linear("blocks.attn.k", layer + "attn.k_proj", K, bias=False),
        *linear("blocks.attn.v", layer + "attn.v_proj", V, bias=False),
        *linear("blocks.attn.o", layer + "attn.out_proj", OUT, bias=False),
        *linear("blocks.mlp.up", layer + "mlp.fc_in", UP),
        *linear("blocks.mlp.down", layer + "mlp.fc_out", DOWN),
        *norm("final_norm", "transformer.ln_f"),
        Stored("unembed_bias", "lm_head.bias", "d_vocab -> d_vocab"),
    ]
    if not config.tied:
        entries.append(Stored("unembed", "lm_head.weight", table))
    return tuple(entries)


# older files hold the causal mask
GPTJ = Family(
    "gptj",
    "GPTJForCausalLM",
    _read,
    _write,
    _table,
    (r"lm_head\.weight", r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias|embed_positions)"),
    ((r"^transformer\.", ""),),
    ("Model", "ForCausalLM"),
)
