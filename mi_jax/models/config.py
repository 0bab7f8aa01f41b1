"""The shape of a decoder."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Static description of a decoder; a model family is a choice of these fields.

    Attributes:
      d_mlp: 0 for an attention-only model.
      positions: rotary (half-split), a learned table added to the embedding, or none.
      norm: "none" leaves the stream as it is, which makes every read linear.
      activation: "gelu" is the tanh approximation.
      gated: the MLP is `down(act(gate(x)) * up(x))` instead of `down(act(up(x)))`.
      tied: the unembedding is the transposed embedding.
    """

    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int
    name: str = "decoder"
    positions: Literal["rotary", "learned", "none"] = "rotary"
    rope_theta: float = 10_000.0
    norm: Literal["rms", "layer", "none"] = "rms"
    norm_eps: float = 1e-5
    activation: Literal["silu", "gelu", "relu"] = "silu"
    gated: bool = True
    tied: bool = True

    def __post_init__(self):
        for field in ("n_layers", "d_model", "n_heads", "n_kv_heads", "d_head", "d_vocab", "n_ctx"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")
        if self.d_mlp < 0:
            raise ValueError(f"d_mlp must be at least 0, got {self.d_mlp}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}")
        if self.positions == "rotary" and self.d_head % 2:
            raise ValueError(f"rotary positions need an even d_head, got {self.d_head}")
