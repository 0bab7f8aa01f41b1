"""config.json in the words that `transformers` used before version 5, as most published checkpoints have it."""

from collections.abc import Mapping
from typing import Any

_PATTERNED = ("gemma2", "gemma3_text", "qwen2", "qwen3")


def _rotary(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that one `rope_parameters` replaced."""
    rope = config["rope_parameters"]
    kind = config["model_type"]
    if kind == "gemma3_text":
        local, rope = rope["sliding_attention"], rope["full_attention"]
        written = {"rope_theta": rope["rope_theta"], "rope_local_base_freq": local["rope_theta"]}
    elif kind == "gpt_neox":
        return {
            "rotary_emb_base": rope["rope_theta"],
            "rotary_pct": rope["partial_rotary_factor"],
            "rope_scaling": None,
        }
    else:
        written = {"rope_theta": rope["rope_theta"]}
    if "partial_rotary_factor" in rope:
        written["partial_rotary_factor"] = rope["partial_rotary_factor"]
    scaling = {key: value for key, value in rope.items() if key not in (*written, "rope_type")}
    # "type" is the older word of the two; Llama 3 and Gemma 3 never had it.
    word = "type" if rope["rope_type"] in ("linear", "yarn") and kind == "llama" else "rope_type"
    return written | {"rope_scaling": {word: rope["rope_type"], **scaling} if scaling else None}


def legacy_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same configuration in the older words; patterns of layers by their rule instead of a list."""
    kind, old = config["model_type"], dict(config)
    old["torch_dtype"] = old.pop("dtype")
    del old["transformers_version"]
    if "rope_parameters" in old:
        old |= _rotary(config)
        del old["rope_parameters"]
    if kind in _PATTERNED:
        kinds = old.pop("layer_types")
        if kind == "gemma3_text":
            del old["_sliding_window_pattern"]
            old["sliding_window_pattern"] = kinds.index("full_attention") + 1
    if kind in ("qwen2", "qwen3") and not old["use_sliding_window"]:
        old["sliding_window"] = 4  # given, and not in use
    if kind == "qwen3_moe":
        old["num_experts"] = old.pop("num_local_experts")
    if kind == "gemma":
        old["hidden_act"] = "gelu"  # which meant the tanh approximation
    if old.get("head_dim") == old.get("hidden_size", 0) // old.get("num_attention_heads", 1):
        del old["head_dim"]
    return old
