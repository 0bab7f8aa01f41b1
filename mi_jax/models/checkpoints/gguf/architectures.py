"""From the metadata of a GGUF file to the configuration of a decoder, one entry for every architecture that is read.

The conventions are those of the converter that writes such files (llama.cpp, convert_hf_to_gguf.py) and, for what a
file leaves unsaid, the defaults of its reader (llama.cpp, llama-model.cpp).
"""

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

from mi_jax.models.checkpoints.errors import CheckpointError
from mi_jax.models.checkpoints.gguf.file import GGUF
from mi_jax.models.checkpoints.gguf.metadata import Metadata
from mi_jax.models.checkpoints.gguf.rope import scaling_from_factors, scaling_from_metadata
from mi_jax.models.config import DecoderConfig


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What one kind of file has of its own.

    Attributes:
      fields: what its configuration has besides that of `_common`, from the metadata and those fields.
      adjacent: Q and K are stored for rotations of adjacent pairs, the two halves of every head interleaved.
      fused: Q, K and V are one tensor; `fused_gate`: so are gate and up.
      norm_shift: what the converter added to the norms' weights.
    """

    fields: Callable[[Metadata, dict[str, Any]], dict[str, Any]]
    adjacent: bool = False
    fused: bool = False
    fused_gate: bool = False
    norm_shift: float = 0.0


def _llama(meta: Metadata, common: dict[str, Any]) -> dict[str, Any]:
    return {}


def _smollm3(meta: Metadata, common: dict[str, Any]) -> dict[str, Any]:
    turns = tuple((layer + 1) % 4 != 0 for layer in range(common["n_layers"]))
    return {"rope_layers": () if all(turns) else turns}


def _qwen3(meta: Metadata, common: dict[str, Any]) -> dict[str, Any]:
    return {"qk_norm": "head"}


def _qwen3moe(meta: Metadata, common: dict[str, Any]) -> dict[str, Any]:
    return {
        "qk_norm": "head",
        "d_mlp": meta.whole("expert_feed_forward_length"),
        "n_experts": meta.whole("expert_count"),
        "n_active_experts": meta.whole("expert_used_count"),
    }


def _olmo2(meta: Metadata, common: dict[str, Any]) -> dict[str, Any]:
    return {"qk_norm": "whole", "norms": "output"}


def _phi3(meta: Metadata, common: dict[str, Any]) -> dict[str, Any]:
    window = meta.whole("attention.sliding_window", 0)
    return {"windows": (window,) * common["n_layers"] if 0 < window < common["n_ctx"] else ()}


def _gpt2(meta: Metadata, common: dict[str, Any]) -> dict[str, Any]:
    return {
        "positions": "learned",
        "norm": "layer",
        "norm_eps": meta.real("attention.layer_norm_epsilon"),
        "activation": "gelu",
        "gated": False,
    }


def _gemma(meta: Metadata, common: dict[str, Any]) -> dict[str, Any]:
    return {"embed_scale": common["d_model"] ** 0.5, "norm_offset": 1.0, "activation": "gelu"}


def _gemma2(meta: Metadata, common: dict[str, Any]) -> dict[str, Any]:
    return _gemma(meta, common) | {
        "norms": "sandwich",
        "windows": _windows(meta, common["n_layers"], meta.whole("attention.sliding_window", 4096), 2),
        "attn_scale": _gemma_scale(meta, common, largest=46),
        "score_softcap": meta.real("attn_logit_softcapping", 50.0),
        "logit_softcap": meta.real("final_logit_softcapping", 30.0),
    }


def _gemma3(meta: Metadata, common: dict[str, Any]) -> dict[str, Any]:
    return _gemma(meta, common) | {
        "norms": "sandwich",
        "qk_norm": "head",
        "windows": _windows(meta, common["n_layers"], meta.whole("attention.sliding_window"), 6),
        "rope_local_theta": meta.real("rope.freq_base_swa", 10_000.0),
        "attn_scale": _gemma_scale(meta, common, largest=62),
        "score_softcap": meta.real("attn_logit_softcapping", 0.0),
        "logit_softcap": meta.real("final_logit_softcapping", 0.0),
    }


ARCHITECTURES = {
    "llama": Architecture(_llama, adjacent=True),
    "smollm3": Architecture(_smollm3, adjacent=True),
    "qwen2": Architecture(_llama),
    "qwen3": Architecture(_qwen3),
    "qwen3moe": Architecture(_qwen3moe),
    "olmo2": Architecture(_olmo2),
    "phi3": Architecture(_phi3, fused=True, fused_gate=True),
    "gpt2": Architecture(_gpt2, fused=True),
    "gemma": Architecture(_gemma, norm_shift=1.0),
    "gemma2": Architecture(_gemma2, norm_shift=1.0),
    "gemma3": Architecture(_gemma3, norm_shift=1.0),
}


def architecture_of(file: GGUF) -> tuple[str, Architecture]:
    """Raises CheckpointError for an architecture that is not read."""
    name = file.field("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise CheckpointError(f"{file.path}: architecture {name!r} is not read; {', '.join(ARCHITECTURES)} are")
    return name, ARCHITECTURES[name]


def read_config(file: GGUF) -> DecoderConfig:
    """The shape of the decoder in a file.

    Raises:
      CheckpointError: an architecture that is not read, or metadata that are missing, of a wrong type, or ask for what
        the decoder cannot do.
    """
    name, architecture = architecture_of(file)
    if (n := file.get("split.count", 1)) != 1:
        raise CheckpointError(
            f"{file.path}: one of the {n} parts of a model; join them with `llama-gguf-split --merge`"
        )
    meta = Metadata(file, name)
    common = _common(meta)
    try:
        config = DecoderConfig(**(common | architecture.fields(meta, common)))
        config = dataclasses.replace(config, rope_scaling=scaling_from_metadata(meta, config.n_ctx))
        config = dataclasses.replace(config, rope_scaling=scaling_from_factors(file, config))
    except (ValueError, ZeroDivisionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file.path}: the metadata do not describe a decoder: {error}") from error
    if architecture.adjacent and config.n_rotary != config.d_head:
        raise CheckpointError(
            f"{file.path}: rotary positions on {config.n_rotary} of {config.d_head} dimensions are not read"
        )
    if not config.n_experts and (n := meta.whole("expert_count", 0) + meta.whole("expert_used_count", 0)):
        raise CheckpointError(f"{file.path}: {n} experts in architecture {name!r} are not read; 'qwen3moe' has them")
    if unread := meta.unread():
        raise CheckpointError(f"{file.path}: metadata {unread[0]!r} ({len(unread)} such) are not known for {name}")
    return config


def _common(meta: Metadata) -> dict[str, Any]:
    """What every architecture has; the counts are checked against the tensors before anything is made of them."""
    file, n_layers, d_model = meta.file, meta.whole("block_count"), meta.whole("embedding_length")
    present = {name.split(".")[1] for name in file.names() if name.startswith("blk.")}
    if len(present) != n_layers:
        raise CheckpointError(f"{file.path}: {n_layers} layers announced, tensors of {len(present)} there")
    n_heads = meta.whole("attention.head_count")
    if not n_heads:
        raise meta.wrong("attention.head_count", n_heads, "at least 1")
    d_head = meta.whole("attention.key_length", d_model // n_heads)
    if (d_value := meta.whole("attention.value_length", d_head)) != d_head:
        raise meta.wrong("attention.value_length", d_value, f"the key length, {d_head}")
    for harmless in ("tensor_data_layout", "pooling_type"):
        meta.value(harmless, None)
    common: dict[str, Any] = {
        "name": str(file.get("general.name", os.path.basename(file.path))),
        "n_layers": n_layers,
        "d_model": d_model,
        "n_heads": n_heads,
        "n_kv_heads": meta.whole("attention.head_count_kv", n_heads),
        "d_head": d_head,
        "d_mlp": meta.whole("feed_forward_length"),
        "d_vocab": _d_vocab(meta),
        "n_ctx": meta.whole("context_length"),
        "causal": meta.flag("attention.causal", True),
        "rope_theta": meta.real("rope.freq_base", 10_000.0),
        "rope_dim": meta.whole("rope.dimension_count", d_head),
        "qkv_bias": _has(file, "attn_q.bias") or _has(file, "attn_qkv.bias"),
        "o_bias": _has(file, "attn_output.bias"),
        "mlp_bias": _has(file, "ffn_up.bias"),
        "unembed_bias": "output.bias" in file.names(),
        "tied": "output.weight" not in file.names(),
    }
    if common["rope_dim"] == d_head:
        common["rope_dim"] = None
    if meta.architecture != "gpt2":
        common["norm_eps"] = meta.real("attention.layer_norm_rms_epsilon")
    _check_sizes(file, common)
    if not common["n_kv_heads"]:
        raise meta.wrong("attention.head_count_kv", 0, "at least 1")
    if common["rope_theta"] <= 0:
        raise meta.wrong("rope.freq_base", common["rope_theta"], "positive")
    return common


def _check_sizes(file: GGUF, common: dict[str, Any]) -> None:
    """Sizes that no tensor has would otherwise become shapes that nothing can hold."""
    vocab = (common["d_vocab"], common["d_model"])
    if "token_embd.weight" in file.tensors and file.shape("token_embd.weight") != vocab:
        raise CheckpointError(
            f"{file.path}: tensor 'token_embd.weight' has shape {list(file.shape('token_embd.weight'))}, the metadata "
            f"say {list(vocab)}"
        )
    largest = max((math.prod(file.shape(name)) for name in file.names()), default=0)
    for size in (common["n_heads"] * common["d_head"], common["n_kv_heads"] * common["d_head"], common["d_mlp"]):
        if size > largest:
            raise CheckpointError(f"{file.path}: the metadata announce {size} values, the largest tensor has {largest}")


def _has(file: GGUF, name: str) -> bool:
    return f"blk.0.{name}" in file.tensors


def _d_vocab(meta: Metadata) -> int:
    tokens = meta.file.fields.get("tokenizer.ggml.tokens")
    if "vocab_size" not in meta and isinstance(tokens, list):
        return len(tokens)
    return meta.whole("vocab_size")


def _windows(meta: Metadata, n_layers: int, window: int, period: int) -> tuple[int, ...]:
    """The last of every `period` layers sees all positions, unless the file says which do."""
    pattern: int | Sequence = meta.value("attention.sliding_window_pattern", period)
    if isinstance(pattern, list) and len(pattern) == n_layers:
        return tuple(window if local else 0 for local in pattern)
    if type(pattern) is not int or pattern < 1:
        raise meta.wrong("attention.sliding_window_pattern", pattern, f"a period or {n_layers} truth values")
    return tuple(window if layer % pattern < pattern - 1 else 0 for layer in range(n_layers))


def _gemma_scale(meta: Metadata, common: dict[str, Any], *, largest: int) -> float | None:
    """The files do not say that the largest model of a generation scales by its model width over heads."""
    if "attention.scale" in meta:
        return meta.real("attention.scale")
    return (common["d_model"] // common["n_heads"]) ** -0.5 if common["n_layers"] == largest else None
