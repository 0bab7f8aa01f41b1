"""What the stream starts with: embedded tokens, or the patches of an image."""

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mi_jax.core.errors import InputError
from mi_jax.models.config import DecoderConfig, PatchConfig


class Patches(eqx.Module):
    """The map of a patch, and the vector that stands before all patches (the class token of a ViT)."""

    weight: Float[Array, "channel height width d_model"]
    bias: Float[Array, " d_model"]
    first: Float[Array, " d_model"]


def embed_tokens(
    config: DecoderConfig,
    table: Float[Array, "d_vocab d_model"],
    tokens: Int[Array, "batch pos"],
    type_table: Float[Array, "type d_model"] | None = None,
    token_types: Int[Array, "batch pos"] | None = None,
) -> Float[Array, "batch pos d_model"]:
    """Token embeddings, with those of the token types where the model has them."""
    check_tokens(config, tokens)
    x = _rows(table, tokens)
    if config.embed_scale != 1.0:
        # the factor in the dtype of the stream: the models were trained with it rounded so
        x = x * jnp.asarray(config.embed_scale, x.dtype)
    if type_table is not None:
        types = jnp.zeros_like(tokens) if token_types is None else token_types
        _check_ids(types, config.n_token_types, config.name, "token types")
        x = x + _rows(type_table, types)
    return x


def places(mask: Bool[Array, "batch pos"]) -> Int[Array, "batch pos"]:
    """Positions of the tokens as the model counts them: from the first real token on, wherever a prompt is padded."""
    first = jnp.argmax(mask, axis=1).astype(jnp.int32)[:, None]
    return jnp.maximum(jnp.arange(mask.shape[1], dtype=jnp.int32)[None, :] - first, 0)


def check_tokens(config: DecoderConfig, tokens: Int[Array, "batch pos"]) -> None:
    """Raises InputError for tokens outside of the vocabulary, where their values are known."""
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise InputError(f"{config.name} takes tokens, which are integers; got {tokens.dtype}")
    hint = ": use the model's own tokenizer, and fill padding with any token that it has, such as 0"
    _check_ids(tokens, config.d_vocab, config.name, "tokens", hint)


def known_values(x: Array) -> np.ndarray | None:
    """An array's values on the host; None while it is traced, or where a part of it is on another host."""
    if isinstance(x, jax.core.Tracer):
        return None
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        return None
    return np.asarray(jax.device_get(x))


def _rows(table: Float[Array, "row d_model"], ids: Int[Array, "batch pos"]) -> Float[Array, "batch pos d_model"]:
    """NaN for an id that the table lacks, rather than another one's row; negative ones would count from the end."""
    return table.at[jnp.where(ids < 0, table.shape[0], ids)].get(mode="fill", fill_value=jnp.nan)


def _check_ids(ids: Int[Array, "batch pos"], n: int, model: str, what: str, hint: str = "") -> None:
    known = known_values(ids)
    if known is not None and known.size and not 0 <= known.min() <= known.max() < n:
        (row, pos), *_ = np.argwhere((known < 0) | (known >= n)).tolist()
        raise InputError(
            f"{model} has {n} {what} (0–{n - 1}); got {known[row, pos]} in row {row}, position {pos}{hint}"
        )


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
