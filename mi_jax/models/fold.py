"""Weights rewritten so that they are easier to read, with the same outputs.

A norm is a division by a scale, a product with weights and a sum with a bias, of which only the division is not linear.
`fold_norms` moves the rest into the maps that read through the norm. LayerNorm also takes the mean off whatever it
reads, so what the stream's mean is does not matter: `center_writing` has nothing written into it. A constant added to
all logits changes no probability: `center_unembed` leaves it out.

These are functions of a model; models are loaded with the weights of their checkpoint.

Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits" (handling layer normalization).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mi_jax.core.errors import InputError
from mi_jax.core.precision import widened
from mi_jax.models.attention import Attention
from mi_jax.models.decoder import Decoder
from mi_jax.models.mlp import MLP, Experts
from mi_jax.models.norm import Norm

_QKV, _IN, _UNEMBED = "ldnh", "ldf", "vd"


def fold_norms(model: Decoder) -> Decoder:
    """The norms that are only read through get weight 1 and bias 0; the maps that read through them take these over.

    Every site keeps its value but `final_norm`. Maps get a bias where a norm had one, and the unembedding becomes one
    of its own where it was tied to the embedding. Norms on what attention and MLP add to the stream stay, as do those
    of queries and keys, of the embedding, and the final one of an encoder without a head.

    Raises:
      InputError: norms on the stream itself (`norms="post"`), which the next addition needs as they are, or a mixture
        of experts read through a LayerNorm, as experts have no biases to take over its bias.
    """
    config, blocks = model.config, model.blocks
    if config.norms == "post":
        raise InputError(
            f"the norms of {config.name} stand on the stream itself (norms='post'): what they multiply with is part "
            "of the stream and cannot be folded into what reads it"
        )
    if config.norm == "none":
        return model
    if config.norm == "layer" and config.n_experts and config.norms in ("pre", "sandwich"):
        raise InputError(
            f"the experts of {config.name} have no biases that the bias of a LayerNorm could be folded into"
        )
    attn, mlp, mlp_norm = blocks.attn, blocks.mlp, blocks.attn_norm if config.shared_norm else blocks.mlp_norm
    changes = {}
    if blocks.attn_norm is not None:
        attn = _folded_attention(blocks.attn_norm, attn)
        changes["qkv_bias"] = attn.q_bias is not None
    if mlp is not None and mlp_norm is not None:
        mlp = _folded_mlp(mlp_norm, mlp)
        changes["mlp_bias"] = isinstance(mlp, MLP) and mlp.up_bias is not None
    folded = dataclasses.replace(
        blocks, attn=attn, mlp=mlp, attn_norm=_neutral(blocks.attn_norm), mlp_norm=_neutral(blocks.mlp_norm)
    )
    model = dataclasses.replace(model, config=dataclasses.replace(config, **changes), blocks=folded)
    return _folded_head(model)


def center_writing(model: Decoder) -> Decoder:
    """Everything that is written to the stream loses its mean over `d_model`, and so does the stream.

    The logits stay, as every reader of the stream takes the mean off. An unembedding that was tied to the embedding
    becomes one of its own.

    Raises:
      InputError: a model with another norm than LayerNorm, or with one on what is written.
    """
    config = model.config
    if config.norm != "layer":
        raise InputError(
            f"{config.name} has norm={config.norm!r}, which reads the mean of the stream: only that of a LayerNorm "
            "model can be left out"
        )
    if config.norms != "pre" or config.embed_norm:
        what = "embed_norm=True" if config.norms == "pre" else f"norms={config.norms!r}"
        raise InputError(
            f"{config.name} has norms on what is written to the stream ({what}): its mean depends on the input and "
            "cannot be taken out of the weights"
        )
    model, blocks = _untied(model), model.blocks
    attn = dataclasses.replace(blocks.attn, o=_centered(blocks.attn.o), o_bias=_maybe_centered(blocks.attn.o_bias))
    mlp = blocks.mlp
    if isinstance(mlp, MLP):
        mlp = dataclasses.replace(mlp, down=_centered(mlp.down), down_bias=_maybe_centered(mlp.down_bias))
    elif isinstance(mlp, Experts):
        mlp = dataclasses.replace(mlp, down=_centered(mlp.down))
    return dataclasses.replace(
        model,
        blocks=dataclasses.replace(blocks, attn=attn, mlp=mlp),
        embed=_maybe_centered(model.embed),
        pos_embed=_maybe_centered(model.pos_embed),
        type_embed=_maybe_centered(model.type_embed),
        patches=jax.tree.map(_centered, model.patches),
    )


def center_unembed(model: Decoder) -> Decoder:
    """The unembedding loses its mean over the vocabulary: all logits of a position shift by the same number.

    Probabilities stay. An unembedding that was tied to the embedding becomes one of its own.

    Raises:
      InputError: an encoder without a head, or logits with a soft cap, which a shift would change.
    """
    config = model.config
    if config.head == "none":
        raise InputError(f"{config.name} is an encoder without a head: it has no unembedding to center")
    if config.logit_softcap:
        raise InputError(
            f"the logits of {config.name} have a soft cap, so a constant added to all of them changes probabilities: "
            "its unembedding cannot be centered"
        )
    model = _untied(model)
    bias = None if model.unembed_bias is None else _centered(model.unembed_bias)
    return dataclasses.replace(model, unembed=_centered(model.unembedding, axis=0), unembed_bias=bias)


def _folded_attention(norm: Norm, attn: Attention) -> Attention:
    return dataclasses.replace(
        attn,
        **{name: _scaled(norm, getattr(attn, name), _QKV) for name in "qkv"},
        **{f"{name}_bias": _shifted(norm, getattr(attn, name), getattr(attn, f"{name}_bias"), _QKV) for name in "qkv"},
    )


def _folded_mlp(norm: Norm, mlp: MLP | Experts) -> MLP | Experts:
    if isinstance(mlp, Experts):
        router = _scaled(norm, mlp.router, "lde")
        return dataclasses.replace(
            mlp, router=router, gate=_scaled(norm, mlp.gate, "ledf"), up=_scaled(norm, mlp.up, "ledf")
        )
    gate, gate_bias, down_bias = mlp.gate, mlp.gate_bias, mlp.down_bias
    if gate is not None:
        gate, gate_bias = _scaled(norm, gate, _IN), _shifted(norm, gate, gate_bias, _IN)
    if norm.bias is not None and down_bias is None:
        down_bias = jnp.zeros_like(mlp.down[:, 0])
    up, up_bias = _scaled(norm, mlp.up, _IN), _shifted(norm, mlp.up, mlp.up_bias, _IN)
    return MLP(gate, up, mlp.down, gate_bias, up_bias, down_bias)


def _folded_head(model: Decoder) -> Decoder:
    norm = model.final_norm
    if norm is None or model.config.head == "none":
        return model
    rows = model.unembedding
    bias = _shifted(norm, rows, model.unembed_bias, _UNEMBED)
    return dataclasses.replace(
        model,
        config=dataclasses.replace(model.config, tied=False, unembed_bias=bias is not None),
        final_norm=_neutral(norm),
        unembed=_scaled(norm, rows, _UNEMBED),
        unembed_bias=bias,
    )


def _untied(model: Decoder) -> Decoder:
    """The same model with an unembedding of its own, where it has one at all."""
    if not model.config.tied or model.config.head == "none":
        return model
    config = dataclasses.replace(model.config, tied=False)
    return dataclasses.replace(model, config=config, unembed=model.unembedding)


def _neutral(norm: Norm | None) -> Norm | None:
    """The norm with weight 1, its offset included, and bias 0."""
    if norm is None or norm.weight is None:
        return norm
    bias = None if norm.bias is None else jnp.zeros_like(norm.bias)
    return Norm(jnp.full_like(norm.weight, 1.0 - norm.offset), bias, norm.eps, norm.offset)


def _scaled(norm: Norm, w: Float[Array, "..."], axes: str) -> Float[Array, "..."]:
    """The map times the norm's weight; `axes` are one letter each, l of layers and d of the stream."""
    assert norm.weight is not None
    weight = widened(norm.weight) + norm.offset
    return _einsum(f"{_lead(norm)}d,{axes}->{axes}", weight, widened(w)).astype(w.dtype)


def _shifted(
    norm: Norm, w: Float[Array, "..."], bias: Float[Array, "..."] | None, axes: str
) -> Float[Array, "..."] | None:
    """The map's bias, with what the map makes of the norm's."""
    if norm.bias is None:
        return bias
    shift = _einsum(f"{_lead(norm)}d,{axes}->{axes.replace('d', '')}", widened(norm.bias), widened(w))
    return (shift if bias is None else shift + widened(bias)).astype(w.dtype)


def _lead(norm: Norm) -> str:
    return "l" if norm.weight is not None and norm.weight.ndim == 2 else ""


def _einsum(subscripts: str, a: Array, b: Array) -> Array:
    # accelerators otherwise round to bfloat16, which would stay in the weights
    return jnp.einsum(subscripts, a, b, precision="highest")


def _centered(w: Float[Array, "..."], axis: int = -1) -> Float[Array, "..."]:
    exact = widened(w)
    return (exact - exact.mean(axis, keepdims=True)).astype(w.dtype)


def _maybe_centered(w: Float[Array, "..."] | None) -> Float[Array, "..."] | None:
    return None if w is None else _centered(w)
