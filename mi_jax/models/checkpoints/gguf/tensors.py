"""Under which names the tensors of a GGUF file lie, and how they become the decoder's parameters."""

from mi_jax.models.checkpoints.gguf.architectures import Architecture
from mi_jax.models.checkpoints.names import Stored
from mi_jax.models.config import DecoderConfig

_BLOCK = "blk.{layer}."


def stored_tensors(config: DecoderConfig, architecture: Architecture) -> tuple[Stored, ...]:
    """Where every parameter of the decoder lies."""
    table = [Stored("embed", "token_embd.weight", "d_vocab d_model -> d_vocab d_model")]
    if config.positions == "learned":
        table.append(Stored("pos_embed", "position_embd.weight", "n_ctx d_model -> n_ctx d_model"))
    if not config.tied:
        table.append(Stored("unembed", "output.weight", "d_vocab d_model -> d_vocab d_model"))
    if config.unembed_bias:
        table.append(Stored("unembed_bias", "output.bias", "d_vocab -> d_vocab"))
    table += _norm(config, "final_norm", "output_norm")
    if config.norms in ("pre", "sandwich"):
        table += _norm(config, "blocks.attn_norm", f"{_BLOCK}attn_norm")
        table += _norm(config, "blocks.mlp_norm", f"{_BLOCK}ffn_norm")
    if config.norms in ("output", "sandwich"):
        table += _norm(config, "blocks.attn_post_norm", f"{_BLOCK}post_attention_norm")
        table += _norm(config, "blocks.mlp_post_norm", f"{_BLOCK}post_ffw_norm")
    return tuple(table + _attention(config, architecture) + _mlp(config, architecture))


def _norm(config: DecoderConfig, path: str, name: str) -> list[Stored]:
    suffixes = ("weight", "bias") if config.norm == "layer" else ("weight",)
    return [Stored(f"{path}.{suffix}", f"{name}.{suffix}", "d_model -> d_model") for suffix in suffixes]


def _attention(config: DecoderConfig, architecture: Architecture) -> list[Stored]:
    table, start = [], 0
    for letter, axis in (("q", "head"), ("k", "kv_head"), ("v", "kv_head")):
        rows = (config.n_heads if letter == "q" else config.n_kv_heads) * config.d_head
        name = f"{_BLOCK}attn_qkv" if architecture.fused else f"{_BLOCK}attn_{letter}"
        part = (0, start, start + rows) if architecture.fused else None
        start += rows
        left, right = f"({axis} d_head)", f"{axis} d_head"
        if architecture.adjacent and letter != "v":
            # the file has the two halves of a head interleaved
            left, right = f"({axis} half two)", f"{axis} (two half)"
        path = f"blocks.attn.{letter}"
        table.append(Stored(path, f"{name}.weight", f"{left} d_model -> d_model {right}", part))
        if config.qkv_bias:
            table.append(Stored(f"{path}_bias", f"{name}.bias", f"{left} -> {right}", part))
        if config.qk_norm != "none" and letter != "v":
            pattern = "d_head -> d_head" if config.qk_norm == "head" else f"({axis} d_head) -> {axis} d_head"
            table.append(Stored(f"{path}_norm.weight", f"{_BLOCK}attn_{letter}_norm.weight", pattern))
    table.append(Stored("blocks.attn.o", f"{_BLOCK}attn_output.weight", "d_model (head d_head) -> head d_head d_model"))
    if config.o_bias:
        table.append(Stored("blocks.attn.o_bias", f"{_BLOCK}attn_output.bias", "d_model -> d_model"))
    return table


def _mlp(config: DecoderConfig, architecture: Architecture) -> list[Stored]:
    if config.n_experts:
        return [
            Stored("blocks.mlp.router", f"{_BLOCK}ffn_gate_inp.weight", "expert d_model -> d_model expert"),
            Stored("blocks.mlp.gate", f"{_BLOCK}ffn_gate_exps.weight", "expert d_mlp d_model -> expert d_model d_mlp"),
            Stored("blocks.mlp.up", f"{_BLOCK}ffn_up_exps.weight", "expert d_mlp d_model -> expert d_model d_mlp"),
            Stored("blocks.mlp.down", f"{_BLOCK}ffn_down_exps.weight", "expert d_model d_mlp -> expert d_mlp d_model"),
        ]
    f, table = config.d_mlp, []
    for which in ("gate", "up") if config.gated else ("up",):
        name, part = f"{_BLOCK}ffn_{which}", None
        if architecture.fused_gate:
            name, part = f"{_BLOCK}ffn_up", (0, 0, f) if which == "gate" else (0, f, 2 * f)
        table.append(Stored(f"blocks.mlp.{which}", f"{name}.weight", "d_mlp d_model -> d_model d_mlp", part))
        if config.mlp_bias:
            table.append(Stored(f"blocks.mlp.{which}_bias", f"{name}.bias", "d_mlp -> d_mlp", part))
    table.append(Stored("blocks.mlp.down", f"{_BLOCK}ffn_down.weight", "d_model d_mlp -> d_mlp d_model"))
    if config.mlp_bias:
        table.append(Stored("blocks.mlp.down_bias", f"{_BLOCK}ffn_down.bias", "d_model -> d_model"))
    return table
