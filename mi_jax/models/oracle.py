"""An independent reference for llama-architecture GGUF files: the equations in numpy, float64.

It shares no code with the decoder and none with the loader: it reads the tensors under their names in the file and
rotates adjacent pairs, as the file stores Q and K, where the decoder un-permutes them and rotates halves. Agreement of
the two is therefore evidence for both. It knows no padding, no edits and no compilation.

Source: Touvron et al. 2023, "LLaMA"; Su et al. 2021, "RoFormer" (rotary positions on adjacent pairs, equation 34).
"""

import os
from collections.abc import Sequence

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize


class Oracle:
    """The reference forward of one file; the weights are read once and kept as float32.

    Example:
      `parity = np.abs(model(tokens[None])[0] - Oracle(path)(tokens)).max()`
    """

    def __init__(self, path: str | os.PathLike):
        reader = GGUFReader(os.fspath(path))
        self._weights = {
            t.name: dequantize(t.data, t.tensor_type).astype(np.float32).reshape([int(n) for n in t.shape[::-1]])
            for t in reader.tensors
        }
        field = {name: value.contents() for name, value in reader.fields.items() if name.startswith("llama.")}
        self.n_layers = field["llama.block_count"]
        self.n_heads = field["llama.attention.head_count"]
        self.n_kv_heads = field.get("llama.attention.head_count_kv", self.n_heads)
        self.theta = field.get("llama.rope.freq_base", 10_000.0)
        self.eps = field["llama.attention.layer_norm_rms_epsilon"]

    def __call__(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """Logits `[pos d_vocab]`, float64, of one prompt `[pos]` without padding."""
        return self.many([tokens])[0]

    def many(self, prompts: Sequence[Sequence[int] | np.ndarray]) -> list[np.ndarray]:
        """The same for several prompts of any lengths; the weights are cast once for all of them."""
        ids = [np.asarray(prompt) for prompt in prompts]
        if not ids or any(prompt.ndim != 1 or not len(prompt) for prompt in ids):
            raise ValueError(f"a prompt is a row of tokens of shape [pos]; got shapes {[p.shape for p in ids]}")
        ends = np.cumsum([len(prompt) for prompt in ids])
        stream = self._weights["token_embd.weight"][np.concatenate(ids)].astype(np.float64)
        for layer in range(self.n_layers):
            stream = stream + self._attention(layer, self._rms_norm(stream, f"blk.{layer}.attn_norm"), ends)
            stream = stream + self._mlp(layer, self._rms_norm(stream, f"blk.{layer}.ffn_norm"))
        unembedding = "output" if "output.weight" in self._weights else "token_embd"
        return np.split(self._linear(self._rms_norm(stream, "output_norm"), unembedding), ends[:-1])

    def _linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self._weights[f"{name}.weight"].astype(np.float64).T

    def _rms_norm(self, x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + self.eps) * self._weights[f"{name}.weight"]

    def _attention(self, layer: int, x: np.ndarray, ends: np.ndarray) -> np.ndarray:
        block = f"blk.{layer}"
        q = self._linear(x, f"{block}.attn_q").reshape(len(x), self.n_heads, -1)
        k = self._linear(x, f"{block}.attn_k").reshape(len(x), self.n_kv_heads, -1)
        v = self._linear(x, f"{block}.attn_v").reshape(len(x), self.n_kv_heads, -1)
        mixed = [self._mix(*qkv) for qkv in zip(*(np.split(each, ends[:-1]) for each in (q, k, v)), strict=True)]
        return self._linear(np.concatenate(mixed), f"{block}.attn_output")

    def _mix(self, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Causal attention within one prompt: `[pos n_heads·d_head]`."""
        q, k = self._rotate(q), self._rotate(k)
        future = np.triu(np.ones((len(q), len(q)), bool), 1)
        heads = []
        for head in range(self.n_heads):
            shared = head // (self.n_heads // self.n_kv_heads)
            scores = q[:, head] @ k[:, shared].T / np.sqrt(q.shape[-1])
            scores[future] = -np.inf
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(weights / weights.sum(-1, keepdims=True) @ v[:, shared])
        return np.concatenate(heads, -1)

    def _mlp(self, layer: int, x: np.ndarray) -> np.ndarray:
        gate = self._linear(x, f"blk.{layer}.ffn_gate")
        return self._linear(
            gate / (1 + np.exp(-gate)) * self._linear(x, f"blk.{layer}.ffn_up"), f"blk.{layer}.ffn_down"
        )

    def _rotate(self, x: np.ndarray) -> np.ndarray:
        """Turns the pair (2i, 2i + 1) of every head by pos · theta^(−2i/d_head), as complex numbers."""
        n_pos, _, d_head = x.shape
        angle = np.outer(np.arange(n_pos), self.theta ** (-np.arange(0, d_head, 2) / d_head))
        turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)[:, None, :]
        return np.stack([turned.real, turned.imag], -1).reshape(x.shape)
