"""Vision transformers: `ViTForImageClassification`, and `ViTModel`, whose output is the last stream.

The pooler of `ViTModel` is ignored. A classification takes the logits at the first position.
"""

from typing import Any

from mi_jax.models.checkpoints.errors import CheckpointError
from mi_jax.models.checkpoints.families.family import Family
from mi_jax.models.checkpoints.families.fields import ACTIVATION_NAMES, Fields
from mi_jax.models.checkpoints.families.layer_norm import DOWN, OUT, UP, K, Q, V, linear, norm
from mi_jax.models.checkpoints.names import Stored
from mi_jax.models.config import DecoderConfig, PatchConfig


def _side(f: Fields, name: str, default: int) -> int:
    """A side of a square, which may be given as height and width."""
    if f.is_list(name):
        sides = list(f.several(name) or [None])
        if sides.count(sides[0]) < len(sides):
            raise f.refused(name, sides, "squares")
        f = Fields({name: sides[0]}, f.where)
    side = f.integer(name, default=default)
    if side < 1:
        raise f.wrong(name, side, "a positive number")
    return side


def _read(f: Fields) -> DecoderConfig:
    d_model, n_heads = f.width("hidden_size", heads=("num_attention_heads",), d_model=768, n_heads=12)
    patches = PatchConfig(_side(f, "image_size", 224), _side(f, "patch_size", 16), f.integer("num_channels", default=3))
    labels = len(f.inner("id2label")) or f.integer("num_labels", default=2)
    classifies = any(str(each).endswith("Classification") for each in f.several("architectures") or ())
    f.without_effect("encoder_stride", "pooler_act", "pooler_output_size", "tie_word_embeddings")
    return DecoderConfig(
        n_layers=f.layers("num_hidden_layers", default=12),
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=n_heads,
        d_head=d_model // n_heads,
        d_mlp=f.integer("intermediate_size", default=3072),
        d_vocab=labels,
        n_ctx=patches.n_positions,
        causal=False,
        patches=patches,
        positions="learned",
        norm="layer",
        norm_eps=f.number("layer_norm_eps", default=1e-12),
        qkv_bias=f.flag("qkv_bias", default=True),
        o_bias=True,
        mlp_bias=True,
        unembed_bias=classifies,
        activation=f.activation("hidden_act", default="gelu"),
        gated=False,
        tied=False,
        head="logits" if classifies else "none",
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    if config.patches is None:
        raise CheckpointError("a vit model has images as inputs, this one has tokens")
    return {
        "architectures": ["ViTForImageClassification" if config.head == "logits" else "ViTModel"],
        "hidden_size": config.d_model,
        "intermediate_size": config.d_mlp,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "image_size": config.patches.image_size,
        "patch_size": config.patches.patch_size,
        "num_channels": config.patches.n_channels,
        "id2label": {str(i): f"LABEL_{i}" for i in range(config.d_vocab)},
        "label2id": {f"LABEL_{i}": i for i in range(config.d_vocab)},
        "layer_norm_eps": config.norm_eps,
        "hidden_act": ACTIVATION_NAMES[config.activation],
        "qkv_bias": config.qkv_bias,
    }


def _table(config: DecoderConfig) -> tuple[Stored, ...]:
    # the bare model has no prefix
    base = "vit." if config.head == "logits" else ""
    layer, projection = base + "encoder.layer.{layer}.", base + "embeddings.patch_embeddings.projection"
    patch = "d_model channel height width -> channel height width d_model"
    entries = [
        Stored("patches.weight", projection + ".weight", patch),
        Stored("patches.bias", projection + ".bias", "d_model -> d_model"),
        Stored("patches.first", base + "embeddings.cls_token", "1 1 d_model -> d_model"),
        Stored("pos_embed", base + "embeddings.position_embeddings", "1 n_ctx d_model -> n_ctx d_model"),
        *norm("blocks.attn_norm", layer + "layernorm_before"),
        *linear("blocks.attn.q", layer + "attention.attention.query", Q, bias=config.qkv_bias),
        *linear("blocks.attn.k", layer + "attention.attention.key", K, bias=config.qkv_bias),
        *linear("blocks.attn.v", layer + "attention.attention.value", V, bias=config.qkv_bias),
        *linear("blocks.attn.o", layer + "attention.output.dense", OUT),
        *norm("blocks.mlp_norm", layer + "layernorm_after"),
        *linear("blocks.mlp.up", layer + "intermediate.dense", UP),
        *linear("blocks.mlp.down", layer + "output.dense", DOWN),
        *norm("final_norm", base + "layernorm"),
    ]
    if config.head == "logits":
        entries += linear("unembed", "classifier", "d_vocab d_model -> d_vocab d_model")
    return tuple(entries)


# newer versions of the reference name the modules otherwise
VIT = Family(
    "vit",
    "ViTForImageClassification",
    _read,
    _write,
    _table,
    (r"(vit\.)?pooler\..*", r"(vit\.)?embeddings\.mask_token"),
    (
        (r"encoder\.layer\.", "layers."),
        (r"\.attention\.attention\.([qkv])(uery|ey|alue)\.", r".attention.\1_proj."),
        (r"\.attention\.output\.dense\.", ".attention.o_proj."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"\}\.output\.dense\.", "}.mlp.fc2."),
    ),
    ("Model", "ForImageClassification"),
)
