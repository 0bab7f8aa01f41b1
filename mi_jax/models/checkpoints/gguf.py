"""GGUF files: checked, dequantised and laid out as a native decoder.

llama-architecture files store Q and K with the two halves of each head interleaved, for rotary positions on adjacent
pairs. They are un-permuted here, so that the decoder rotates halves whatever the file's convention.
"""

import os
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize

from mi_jax.core.errors import InputError
from mi_jax.models.block import MLP, Attention, Block, Norm
from mi_jax.models.config import DecoderConfig
from mi_jax.models.decoder import Decoder

_MAGIC = b"GGUF"


class CheckpointError(InputError):
    """A file that is not the checkpoint it should be; the message names the file and the fault."""


class GGUF(eqx.Module):
    """An opened file: `fields` are its metadata, `tensor(name)` reads and dequantises one tensor."""

    path: str = eqx.field(static=True)
    reader: GGUFReader = eqx.field(static=True)

    def field(self, name: str) -> Any:
        """One metadata value. Raises CheckpointError if the file lacks it."""
        if name not in self.reader.fields:
            raise CheckpointError(f"{self.path}: no metadata {name!r}")
        try:
            return self.reader.fields[name].contents()
        except (ValueError, TypeError, IndexError) as error:
            raise CheckpointError(f"{self.path}: damaged metadata {name!r} ({error})") from error

    def get(self, name: str, default: Any) -> Any:
        return self.field(name) if name in self.reader.fields else default

    def names(self) -> list[str]:
        return [t.name for t in self.reader.tensors]

    def tensor(self, name: str) -> np.ndarray:
        """One tensor as float32, in row-major order: a linear map has shape [out in]."""
        for t in self.reader.tensors:
            if t.name == name:
                try:
                    values = dequantize(t.data, t.tensor_type)
                except NotImplementedError:
                    raise CheckpointError(
                        f"{self.path}: tensor {name!r} has type {t.tensor_type.name}, which is not read"
                    ) from None
                return values.astype(np.float32, copy=False).reshape([int(n) for n in reversed(t.shape)])
        raise CheckpointError(f"{self.path}: no tensor {name!r}; it has {', '.join(self.names()[:8])}, …")


def open_gguf(path: str | os.PathLike) -> GGUF:
    """Opens a GGUF file and checks that it is whole.

    Raises:
      CheckpointError: missing, a directory, wrong magic, unreadable header, or tensors that reach past its end.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise CheckpointError(f"{path}: no such file; give the path of a .gguf file")
    size = os.path.getsize(path)
    with open(path, "rb") as f:
        magic = f.read(4)
    if magic != _MAGIC:
        raise CheckpointError(f"{path}: not a GGUF file (starts with {magic!r}, not {_MAGIC!r})")
    try:
        reader = GGUFReader(path)
    except Exception as error:  # the reader raises whatever numpy or struct raised on the damaged bytes
        raise CheckpointError(
            f"{path}: damaged or truncated GGUF file of {size} bytes ({type(error).__name__}: {error}); fetch it again"
        ) from error
    for t in reader.tensors:
        if t.data_offset + t.n_bytes > size:
            raise CheckpointError(
                f"{path}: truncated: tensor {t.name!r} ends at byte {t.data_offset + t.n_bytes}, the file has {size}"
            )
    return GGUF(path, reader)


def load_gguf(source: str | os.PathLike | GGUF, *, dtype=jnp.float32) -> Decoder:
    """Reads a llama-architecture GGUF file into a native decoder, weights dequantised.

    Raises:
      CheckpointError: see `open_gguf`; also an architecture that is not read, or tensors of the wrong shape.
    """
    file = source if isinstance(source, GGUF) else open_gguf(source)
    arch = file.field("general.architecture")
    if arch != "llama":
        raise CheckpointError(f"{file.path}: architecture {arch!r} is not read; only 'llama' is")
    config = read_config(file)
    d, h = config.d_model, config.d_head
    _check_names(file, config)

    def stack(name: str, shape: Sequence[int]) -> np.ndarray:
        return np.stack([_shaped(file, f"blk.{layer}.{name}.weight", shape) for layer in range(config.n_layers)])

    def linear(name: str, n_out: int, n_in: int) -> np.ndarray:
        return stack(name, (n_out, n_in)).swapaxes(1, 2)

    def heads(name: str, n: int, permuted: bool) -> np.ndarray:
        w = stack(name, (n * h, d)).reshape(config.n_layers, n, h, d)
        if permuted:
            w = np.concatenate([w[:, :, 0::2], w[:, :, 1::2]], 2)
        return w.transpose(0, 3, 1, 2)

    def norm(weight: np.ndarray) -> Norm:
        return Norm(jnp.asarray(weight, dtype), None, config.norm_eps)

    attn = Attention(
        q=jnp.asarray(heads("attn_q", config.n_heads, True), dtype),
        k=jnp.asarray(heads("attn_k", config.n_kv_heads, True), dtype),
        v=jnp.asarray(heads("attn_v", config.n_kv_heads, False), dtype),
        o=jnp.asarray(
            stack("attn_output", (d, config.n_heads * h)).swapaxes(1, 2).reshape(config.n_layers, -1, h, d), dtype
        ),
    )
    mlp = MLP(
        gate=jnp.asarray(linear("ffn_gate", config.d_mlp, d), dtype),
        up=jnp.asarray(linear("ffn_up", config.d_mlp, d), dtype),
        down=jnp.asarray(linear("ffn_down", d, config.d_mlp), dtype),
    )
    vocab = (config.d_vocab, d)
    return Decoder(
        config=config,
        embed=jnp.asarray(_shaped(file, "token_embd.weight", vocab), dtype),
        pos_embed=None,
        blocks=Block(norm(stack("attn_norm", (d,))), attn, norm(stack("ffn_norm", (d,))), mlp),
        final_norm=norm(_shaped(file, "output_norm.weight", (d,))),
        unembed=None if config.tied else jnp.asarray(_shaped(file, "output.weight", vocab), dtype),
    )


_LAYER_TENSORS = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output")
_LAYER_TENSORS += ("ffn_norm", "ffn_gate", "ffn_up", "ffn_down")


def _check_names(file: GGUF, config: DecoderConfig) -> None:
    n_layers = len({name.split(".")[1] for name in file.names() if name.startswith("blk.")})
    if n_layers != config.n_layers:
        raise CheckpointError(f"{file.path}: {config.n_layers} layers announced, tensors of {n_layers} there")
    # a bias or a table of rotary factors that went unread would make a model that runs and is wrong
    read = {"token_embd.weight", "output_norm.weight", "output.weight"}
    read |= {f"blk.{layer}.{name}.weight" for layer in range(config.n_layers) for name in _LAYER_TENSORS}
    if unread := [name for name in file.names() if name not in read]:
        raise CheckpointError(f"{file.path}: no place for tensor {unread[0]!r} ({len(unread)} such) in a llama decoder")


def read_config(file: GGUF) -> DecoderConfig:
    """The shape of the decoder in a file.

    Raises:
      CheckpointError: metadata are missing, or ask for what the decoder cannot do.
    """
    scaling = file.get("llama.rope.scaling.type", "none")
    if scaling != "none":
        raise CheckpointError(f"{file.path}: rotary scaling {scaling!r} is not read")
    try:
        config = _llama_config(file)
    except CheckpointError:
        raise
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{file.path}: the metadata do not describe a decoder: {error}") from error
    turned = file.get("llama.rope.dimension_count", config.d_head)
    if turned != config.d_head:
        raise CheckpointError(f"{file.path}: rotary positions on {turned} of {config.d_head} dimensions are not read")
    return config


def _llama_config(file: GGUF) -> DecoderConfig:
    n_heads, d_model = file.field("llama.attention.head_count"), file.field("llama.embedding_length")
    return DecoderConfig(
        name=file.get("general.name", os.path.basename(file.path)),
        n_layers=file.field("llama.block_count"),
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=file.get("llama.attention.head_count_kv", n_heads),
        d_head=file.get("llama.attention.key_length", d_model // n_heads),
        d_mlp=file.field("llama.feed_forward_length"),
        d_vocab=len(file.field("tokenizer.ggml.tokens")),
        n_ctx=file.field("llama.context_length"),
        rope_theta=float(file.get("llama.rope.freq_base", 10_000.0)),
        norm_eps=float(file.field("llama.attention.layer_norm_rms_epsilon")),
        tied="output.weight" not in file.names(),
    )


def _shaped(file: GGUF, name: str, shape: Sequence[int]) -> np.ndarray:
    values = file.tensor(name)
    if values.shape != tuple(shape):
        raise CheckpointError(f"{file.path}: tensor {name!r} has shape {values.shape}, expected {tuple(shape)}")
    return values
