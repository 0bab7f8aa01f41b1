"""What the stream starts with: embedded tokens, or the patches of an image."""

from typing import TYPE_CHECKING

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mi_jax.core.errors import InputError
from mi_jax.models.config import PatchConfig

if TYPE_CHECKING:
    from mi_jax.models.decoder import Decoder


class Patches(eqx.Module):
    """The map of a patch, and the vector that stands before all patches (the class token of a ViT)."""

    weight: Float[Array, "channel height width d_model"]
    bias: Float[Array, " d_model"]
    first: Float[Array, " d_model"]


def embed_tokens(
    model: "Decoder", tokens: Int[Array, "batch pos"], token_types: Int[Array, "batch pos"] | None
) -> Float[Array, "batch pos d_model"]:
    """Token embeddings, with those of the positions and the token types where the model has them."""
    assert model.embed is not None
    # a token that is not in the vocabulary has no embedding, rather than that of the last one
    x = model.embed.at[tokens].get(mode="fill", fill_value=jnp.nan)
    if model.config.embed_scale != 1.0:
        # the factor in the dtype of the stream: the models were trained with it rounded so
        x = x * jnp.asarray(model.config.embed_scale, x.dtype)
    if model.type_embed is not None:
        types = jnp.zeros_like(tokens) if token_types is None else token_types
        x = x + model.type_embed.at[types].get(mode="fill", fill_value=jnp.nan)
    return x


def embed_patches(
    patches: Patches, shape: PatchConfig, images: Float[Array, "batch channel height width"]
) -> Float[Array, "batch pos d_model"]:
    """Row by row the patches of every image, after the vector that stands before them."""
    side, n = shape.patch_size, shape.image_size // shape.patch_size
    expected = (shape.n_channels, shape.image_size, shape.image_size)
    if images.ndim != 4 or images.shape[1:] != expected:
        raise InputError(f"images have shape [batch {' '.join(map(str, expected))}] here; got {images.shape}")
    cut = images.reshape(images.shape[0], shape.n_channels, n, side, n, side)
    x = jnp.einsum("bcyhxw,chwd->byxd", cut, patches.weight) + patches.bias[None, None, None, :]
    first = jnp.broadcast_to(patches.first[None, None, :], (images.shape[0], 1, x.shape[-1]))
    return jnp.concatenate([first, x.reshape(images.shape[0], n * n, -1)], 1)
