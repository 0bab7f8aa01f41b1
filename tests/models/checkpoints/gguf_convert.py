"""Writes a decoder as a GGUF file, the way the converter of llama.cpp does it.

The names and the metadata come from the `gguf` library, through the names that the tensors have at Hugging Face; what
the converter does to the values is written out here. Nothing is shared with the loader under test.
"""

from typing import Any

import numpy as np
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter, get_tensor_name_map

from mi_jax.models import Decoder, DecoderConfig

_ARCHES = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}
F32, F16 = GGMLQuantizationType.F32, GGMLQuantizationType.F16


def write_decoder(path, model: Decoder, architecture: str, *, kind=F16, extra: dict[str, np.ndarray] | None = None):
    """Writes all tensors, one-dimensional ones as float32 and the others as `kind`; `extra` under their own names."""
    writer = GGUFWriter(str(path), architecture)
    _metadata(writer, model.config, architecture)
    names = get_tensor_name_map(_ARCHES[architecture], model.config.n_layers)
    for name, values in _tensors(model, architecture).items():
        mapped = names.get_name(name, (".weight", ".bias"))
        assert mapped is not None, name
        _add(writer, mapped, values, kind)
    for name, values in (extra or {}).items():
        _add(writer, name, values, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def _add(writer: GGUFWriter, name: str, values: np.ndarray, kind: GGMLQuantizationType) -> None:
    writer.add_tensor(name, np.ascontiguousarray(values, np.float32 if values.ndim == 1 or kind == F32 else np.float16))


def _metadata(writer: GGUFWriter, c: DecoderConfig, architecture: str) -> None:
    writer.add_name(c.name)
    writer.add_block_count(c.n_layers)
    writer.add_context_length(c.n_ctx)
    writer.add_embedding_length(c.d_model)
    writer.add_feed_forward_length(c.d_mlp)
    writer.add_head_count(c.n_heads)
    writer.add_head_count_kv(c.n_kv_heads)
    writer.add_vocab_size(c.d_vocab)
    if architecture == "gpt2":
        writer.add_layer_norm_eps(c.norm_eps)
        return
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_key_length(c.d_head)
    writer.add_value_length(c.d_head)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_rope_dimension_count(c.n_rotary)
    if any(c.windows):
        writer.add_sliding_window(max(c.windows))
    if c.score_softcap:
        writer.add_attn_logit_softcapping(c.score_softcap)
        writer.add_final_logit_softcapping(c.logit_softcap)
    if c.n_experts:
        writer.add_expert_count(c.n_experts)
        writer.add_expert_used_count(c.n_active_experts)
        writer.add_expert_feed_forward_length(c.d_mlp)


def _tensors(model: Decoder, architecture: str) -> dict[str, np.ndarray]:
    """All tensors under their Hugging Face names, as the converter changes them."""
    c, gpt2 = model.config, architecture == "gpt2"
    tensors = {"transformer.wte.weight" if gpt2 else "model.embed_tokens.weight": model.embed}
    if gpt2:
        tensors["transformer.wpe.weight"] = model.pos_embed
    tensors |= _norm("transformer.ln_f" if gpt2 else "model.norm", model.final_norm, c)
    if model.unembed is not None:
        tensors["lm_head.weight"] = model.unembed
    for layer in range(c.n_layers):
        of_layer = (_gpt2_layer if gpt2 else _layer)(model.blocks, layer, c, architecture)
        prefix = f"transformer.h.{layer}." if gpt2 else f"model.layers.{layer}."
        tensors |= {prefix + name: values for name, values in of_layer.items()}
    return {name: np.asarray(values, np.float32) for name, values in tensors.items()}


def _norm(name: str, norm: Any, c: DecoderConfig, layer: Any = ...) -> dict[str, np.ndarray]:
    if norm is None:
        return {}
    # Gemma's converter adds the 1 of its 1 + w
    weight = np.asarray(norm.weight[layer], np.float32) + np.float32(c.norm_offset)
    return {f"{name}.weight": weight} | ({} if norm.bias is None else {f"{name}.bias": norm.bias[layer]})


def _linear(w: Any, layer: int, *, n_in: int) -> np.ndarray:
    """[…in …out] as [out in]."""
    return np.asarray(w[layer]).reshape(n_in, -1).T


def _interleaved(w: np.ndarray, heads: int) -> np.ndarray:
    """Rows of every head in the order 0, half, 1, half + 1, …: for a rotation of adjacent pairs."""
    halves = w.reshape(heads, 2, len(w) // heads // 2, *w.shape[1:])
    return halves.swapaxes(1, 2).reshape(w.shape)


def _qkv(blocks: Any, layer: int, c: DecoderConfig, architecture: str) -> dict[str, np.ndarray]:
    tensors = {}
    for letter, heads in (("q", c.n_heads), ("k", c.n_kv_heads), ("v", c.n_kv_heads)):
        both = {"weight": _linear(getattr(blocks.attn, letter), layer, n_in=c.d_model)}
        if c.qkv_bias:
            both["bias"] = np.asarray(getattr(blocks.attn, f"{letter}_bias")[layer]).reshape(-1)
        for suffix, values in both.items():
            permuted = architecture in ("llama", "smollm3") and letter != "v"
            tensors[f"{letter}_proj.{suffix}"] = _interleaved(values, heads) if permuted else values
    return tensors


def _layer(blocks: Any, layer: int, c: DecoderConfig, architecture: str) -> dict[str, np.ndarray]:
    attn, mlp = blocks.attn, blocks.mlp
    before = {"pre": "post_attention_layernorm", "sandwich": "pre_feedforward_layernorm", "output": ""}[c.norms]
    tensors = _norm("input_layernorm", blocks.attn_norm, c, layer) | _norm(before, blocks.mlp_norm, c, layer)
    tensors |= _norm("post_attention_layernorm", blocks.attn_post_norm, c, layer)
    tensors |= _norm("post_feedforward_layernorm", blocks.mlp_post_norm, c, layer)
    qkv = _qkv(blocks, layer, c, architecture)
    if architecture == "phi3":
        qkv = {"qkv_proj.weight": np.concatenate([qkv[f"{letter}_proj.weight"] for letter in "qkv"])}
    tensors |= {f"self_attn.{name}": values for name, values in qkv.items()}
    tensors["self_attn.o_proj.weight"] = _linear(attn.o, layer, n_in=c.n_heads * c.d_head)
    for letter, norm in (("q", attn.q_norm), ("k", attn.k_norm)):
        of_head = _norm(f"self_attn.{letter}_norm", norm, c, layer)
        tensors |= {name: values.reshape(-1) for name, values in of_head.items()}
    if c.n_experts:
        tensors["mlp.gate.weight"] = _linear(mlp.router, layer, n_in=c.d_model)
        for which in ("gate", "up", "down"):
            tensors[f"mlp.experts.{which}_proj.weight"] = np.asarray(getattr(mlp, which)[layer]).swapaxes(1, 2)
        return tensors
    gate, up = (_linear(w, layer, n_in=c.d_model) for w in (mlp.gate, mlp.up))
    if architecture == "phi3":
        tensors["mlp.gate_up_proj.weight"] = np.concatenate([gate, up])
    else:
        tensors |= {"mlp.gate_proj.weight": gate, "mlp.up_proj.weight": up}
    tensors["mlp.down_proj.weight"] = _linear(mlp.down, layer, n_in=c.d_mlp)
    return tensors


def _gpt2_layer(blocks: Any, layer: int, c: DecoderConfig, architecture: str) -> dict[str, np.ndarray]:
    qkv, mlp = _qkv(blocks, layer, c, architecture), blocks.mlp
    tensors = _norm("ln_1", blocks.attn_norm, c, layer) | _norm("ln_2", blocks.mlp_norm, c, layer)
    for suffix in ("weight", "bias"):
        tensors[f"attn.c_attn.{suffix}"] = np.concatenate([qkv[f"{letter}_proj.{suffix}"] for letter in "qkv"])
    return tensors | {
        "attn.c_proj.weight": _linear(blocks.attn.o, layer, n_in=c.n_heads * c.d_head),
        "attn.c_proj.bias": blocks.attn.o_bias[layer],
        "mlp.c_fc.weight": _linear(mlp.up, layer, n_in=c.d_model),
        "mlp.c_fc.bias": mlp.up_bias[layer],
        "mlp.c_proj.weight": _linear(mlp.down, layer, n_in=c.d_mlp),
        "mlp.c_proj.bias": mlp.down_bias[layer],
    }
