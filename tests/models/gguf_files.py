"""Writes tiny random llama-architecture GGUF files."""

import dataclasses
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

F32, F16 = GGMLQuantizationType.F32, GGMLQuantizationType.F16

# byte-level symbols of letters and the space, then some merges: enough for a tokenizer that encodes words
TOKENS = ("<|endoftext|>", *"abcdehlnorstw", "Ġ", *"0123456789", "th", "he", "the", "Ġthe", "Ġt")
MERGES = ("t h", "th e", "Ġ the", "h e", "Ġ t")


@dataclasses.dataclass(frozen=True)
class Shape:
    """A tiny llama. Q8_0 and Q4_1 need rows of a multiple of 32."""

    n_layers: int = 2
    d_model: int = 8
    n_heads: int = 4
    n_kv_heads: int = 2
    d_head: int = 2
    d_mlp: int = 12
    tied: bool = True


def tensors(shape: Shape, seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors under their names in a file, a linear map as [out in]."""
    rng = np.random.default_rng(seed)
    d, q, kv = shape.d_model, shape.n_heads * shape.d_head, shape.n_kv_heads * shape.d_head
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (len(TOKENS), d), "output_norm": (d,)}
    if not shape.tied:
        shapes["output"] = (len(TOKENS), d)
    for layer in range(shape.n_layers):
        of_layer = {"attn_norm": (d,), "attn_q": (q, d), "attn_k": (kv, d), "attn_v": (kv, d), "attn_output": (d, q)}
        of_layer |= {"ffn_norm": (d,), "ffn_gate": (shape.d_mlp, d), "ffn_up": (shape.d_mlp, d)}
        of_layer |= {"ffn_down": (d, shape.d_mlp)}
        shapes |= {f"blk.{layer}.{name}": size for name, size in of_layer.items()}
    return {f"{name}.weight": rng.normal(0, 0.5, size).astype(np.float32) for name, size in shapes.items()}


def metadata(shape: Shape) -> dict[str, Any]:
    return {
        "llama.block_count": shape.n_layers,
        "llama.embedding_length": shape.d_model,
        "llama.attention.head_count": shape.n_heads,
        "llama.attention.head_count_kv": shape.n_kv_heads,
        "llama.attention.key_length": shape.d_head,
        "llama.feed_forward_length": shape.d_mlp,
        "llama.context_length": 16,
        "llama.rope.freq_base": 500.0,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": list(TOKENS),
        "tokenizer.ggml.merges": list(MERGES),
        "tokenizer.ggml.padding_token_id": 0,
    }


def write(path, fields: dict[str, Any], weights: dict[str, np.ndarray], kind=F32, architecture: str = "llama") -> str:
    """Writes a file. Norms are kept as float32 whatever the kind, as converters do."""
    writer = GGUFWriter(str(path), architecture)
    for name, value in fields.items():
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        else:
            writer.add_uint32(name, value)
    for name, value in weights.items():
        stored = F32 if value.ndim == 1 else kind
        writer.add_tensor(name, quantize(value, stored), raw_dtype=None if stored in (F32, F16) else stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def write_tiny(path, shape: Shape | None = None, kind=F32, seed: int = 0) -> str:
    shape = shape or Shape()
    return write(path, metadata(shape), tensors(shape, seed), kind)
