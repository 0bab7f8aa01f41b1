"""Gemma 1, 2 and 3. The norms multiply by 1 + weight, and the embedding is scaled by the root of d_model.

The reference casts that factor to the dtype of the embedding before it multiplies: √3072 is 55.5 in bfloat16.
"""

import dataclasses
from typing import Any

from mi_jax.models.checkpoints.families.family import Family
from mi_jax.models.checkpoints.families.fields import Fields
from mi_jax.models.checkpoints.families.layer_types import FULL, SLIDING, read_windows, write_layer_types
from mi_jax.models.checkpoints.families.llama import IGNORED, VARIANTS, biases, sizes, table, write_sizes
from mi_jax.models.checkpoints.families.rope import parameters, read_parameters, read_rope, write_rope
from mi_jax.models.checkpoints.names import Stored
from mi_jax.models.config import DecoderConfig

_VISION = r"(model\.)?(vision_tower|multi_modal_projector)\..*"


def _shared(f: Fields, shape: dict[str, Any], activation: str) -> dict[str, Any]:
    f.only("use_bidirectional_attention", False, None)
    return {
        **shape,
        **biases(f),
        "embed_scale": shape["d_model"] ** 0.5,
        "norm_eps": f.number("rms_norm_eps", default=1e-6),
        "norm_offset": 1.0,
        "activation": activation,
        "tied": f.flag("tie_word_embeddings", default=True),
    }


def _write_shared(config: DecoderConfig) -> dict[str, Any]:
    return {**write_sizes(config), "attention_bias": config.qkv_bias}


def _read_gemma(f: Fields) -> DecoderConfig:
    shape = sizes(
        f,
        d_model=3072,
        n_layers=28,
        n_heads=16,
        n_kv_heads=16,
        d_mlp=24576,
        d_vocab=256000,
        n_ctx=8192,
        d_head=256,
    )
    # the first files say "gelu" and mean the approximation
    f.only("hidden_act", "gelu", "gelu_pytorch_tanh", "gelu_new", None)
    f.only("hidden_activation", "gelu", "gelu_pytorch_tanh", "gelu_new", None)
    theta, scaling, _ = read_rope(f, shape["n_ctx"])
    return DecoderConfig(**_shared(f, shape, "gelu"), rope_theta=theta, rope_scaling=scaling)


def _write_gemma(config: DecoderConfig) -> dict[str, Any]:
    return {**_write_shared(config), **write_rope(config)}


def _later(f: Fields, *, d_vocab: int, n_ctx: int, every: int) -> dict[str, Any]:
    """What Gemma 2 and 3 have in common; layer `every` and its multiples, counted from 1, see everything."""
    shape = sizes(
        f,
        d_model=2304,
        n_layers=26,
        n_heads=8,
        n_kv_heads=4,
        d_mlp=9216,
        d_vocab=d_vocab,
        n_ctx=n_ctx,
        d_head=256,
        divided=True,
    )
    activation = f.activation("hidden_activation", default="gelu_pytorch_tanh")
    f.without_effect("hidden_act", "sliding_window_size", "_sliding_window_pattern")
    window = f.integer("sliding_window", default=4096, null=0)
    default = [bool((layer + 1) % every) for layer in range(shape["n_layers"])]
    scalar = f.number("query_pre_attn_scalar", default=256)
    if scalar <= 0:
        raise f.wrong("query_pre_attn_scalar", scalar, "a positive number")
    return {
        **_shared(f, shape, activation),
        "norms": "sandwich",
        "windows": read_windows(f, shape["n_layers"], window, default),
        "attn_scale": None if scalar == shape["d_head"] else scalar**-0.5,
    }


def _write_later(config: DecoderConfig) -> dict[str, Any]:
    written = {**_write_shared(config), **write_layer_types(config)}
    written["hidden_activation"] = written.pop("hidden_act")
    scalar = config.d_head if config.attn_scale is None else config.attn_scale**-2
    written["query_pre_attn_scalar"] = round(scalar)
    # layers that see everything have no use for it, but the reference wants a number
    written["sliding_window"] = max(config.windows, default=0) or 4096
    written["final_logit_softcapping"] = config.logit_softcap or None
    return written


def _read_gemma2(f: Fields) -> DecoderConfig:
    later = _later(f, d_vocab=256000, n_ctx=8192, every=2)
    theta, scaling, _ = read_rope(f, later["n_ctx"])
    return DecoderConfig(
        **later,
        rope_theta=theta,
        rope_scaling=scaling,
        score_softcap=_cap(f, "attn_logit_softcapping", 50.0),
        logit_softcap=_cap(f, "final_logit_softcapping", 30.0),
    )


def _cap(f: Fields, name: str, default: float) -> float:
    """A soft cap, which null switches off."""
    return f.number(name, default=0.0 if f.has(name) else default)


def _write_gemma2(config: DecoderConfig) -> dict[str, Any]:
    return {**_write_later(config), **write_rope(config), "attn_logit_softcapping": config.score_softcap or None}


def _read_gemma3(f: Fields) -> DecoderConfig:
    every = f.integer("sliding_window_pattern", default=6)
    if every < 1:
        raise f.wrong("sliding_window_pattern", every, "a positive number")
    later = _later(f, d_vocab=262_208, n_ctx=131_072, every=every)
    # the reference has the key and does not apply it
    f.only("attn_logit_softcapping", None)
    nested = f.inner("rope_parameters")
    far, near = nested.inner(FULL), nested.inner(SLIDING)
    nested.close()
    theta, local = f.number("rope_theta", default=1e6), f.number("rope_local_base_freq", default=1e4)
    full = read_parameters(f, far.merged(f.inner("rope_scaling")), later["n_ctx"], theta=theta)
    sliding = read_parameters(f, near, later["n_ctx"], theta=local, kinds=("default",))
    if full.share != 1.0 or sliding.share != 1.0:
        raise f.refused("partial_rotary_factor", (full.share, sliding.share), "1.0 in this family")
    return DecoderConfig(
        **later,
        rope_theta=full.theta,
        rope_scaling=full.scaling,
        rope_local_theta=sliding.theta if later["windows"] else None,
        qk_norm="head",
        logit_softcap=_cap(f, "final_logit_softcapping", 0.0),
    )


def _write_gemma3(config: DecoderConfig) -> dict[str, Any]:
    local = 10_000.0 if config.rope_local_theta is None else config.rope_local_theta
    older = write_rope(config)
    older["rope_local_base_freq"] = local
    older["rope_parameters"] = {FULL: older["rope_parameters"], SLIDING: parameters(local, None)}
    return {**_write_later(config), **older}


def _read_multimodal(f: Fields) -> DecoderConfig:
    text = f.inner("text_config")
    # keys of the vision tower, which takes no part where the input is text, and of its place in the text
    f.without_effect("vision_config", "mm_tokens_per_image", "boi_token_index", "eoi_token_index")
    f.without_effect("image_token_index", "boi_token_id", "eoi_token_id", "image_token_id")
    text.only("model_type", "gemma3_text")
    text.only("final_logit_softcapping", None)
    config = _read_gemma3(text)
    text.close()
    return dataclasses.replace(config, tied=f.flag("tie_word_embeddings", default=config.tied))


def _write_multimodal(config: DecoderConfig) -> dict[str, Any]:
    return {"text_config": {"model_type": "gemma3_text", **_write_gemma3(config)}, "tie_word_embeddings": config.tied}


def _multimodal_table(config: DecoderConfig) -> tuple[Stored, ...]:
    return tuple(dataclasses.replace(stored, name="language_model." + stored.name) for stored in table(config))


GEMMA = Family("gemma", "GemmaForCausalLM", _read_gemma, _write_gemma, table, IGNORED, VARIANTS)
GEMMA2 = Family("gemma2", "Gemma2ForCausalLM", _read_gemma2, _write_gemma2, table, IGNORED, VARIANTS)
GEMMA3 = Family("gemma3_text", "Gemma3ForCausalLM", _read_gemma3, _write_gemma3, table, IGNORED, VARIANTS)
# the text half of Gemma 3 with a vision tower, whose tensors are ignored by name
GEMMA3_MULTIMODAL = Family(
    "gemma3",
    "Gemma3ForConditionalGeneration",
    _read_multimodal,
    _write_multimodal,
    _multimodal_table,
    (r"(language_model\.)?lm_head\.weight", _VISION),
    ((r"^language_model\.model\.", "model.language_model."), (r"^language_model\.lm_head\.", "lm_head.")),
    ("Gemma3Model", "ForConditionalGeneration"),
)
