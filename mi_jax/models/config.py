"""The shape of a decoder: a model family is a choice of these fields."""

import dataclasses
import math
from typing import Literal, get_args, get_origin, get_type_hints


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are changed for a context longer than the trained one.

    Attributes:
      kind: "linear" divides positions by `factor`; "llama3" divides only slow frequencies, with a ramp between
        `low_freq_factor` and `high_freq_factor` turns in the original context; "yarn" does so with a ramp between
        `beta_slow` and `beta_fast` turns, and scales queries and keys by `attention_factor`.
      n_ctx_original: positions of the original training.
      attention_factor: None means 0.1 ln(factor) + 1. Only for yarn.
      truncate: whether yarn rounds the ends of its ramp to whole components.
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    n_ctx_original: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self):
        check_choices(self)
        if self.factor <= 0:
            raise ValueError(f"the factor of rotary scaling must be positive, got {self.factor}")
        if self.kind != "linear" and self.n_ctx_original < 1:
            raise ValueError(f"{self.kind} scaling needs the original context length, n_ctx_original")
        if self.kind == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"llama3 scaling needs 0 < low_freq_factor < high_freq_factor; got {self.low_freq_factor} and "
                f"{self.high_freq_factor}"
            )


@dataclasses.dataclass(frozen=True)
class PatchConfig:
    """Square patches of an image, which take the place of tokens. The first position is a learned one of its own."""

    image_size: int
    patch_size: int
    n_channels: int = 3

    def __post_init__(self):
        if self.patch_size < 1 or self.image_size % self.patch_size:
            raise ValueError(f"image_size={self.image_size} is not a multiple of patch_size={self.patch_size}")

    @property
    def n_positions(self) -> int:
        return (self.image_size // self.patch_size) ** 2 + 1


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Static description of a decoder.

    Attributes:
      d_mlp: 0 for an attention-only model; of one expert in a mixture.
      causal: False lets every position see all others, as in an encoder.
      patches: the inputs are images.
      positions: rotary, a learned table added to the embedding, or none.
      rope_dim: leading components of a head that turn; None means all.
      rope_adjacent: component 2i turns with 2i+1, not component i with i + rope_dim/2.
      rope_local_theta: another base, without scaling, in layers that have a window.
      rope_layers: for every layer whether its queries and keys turn; empty means all do.
      windows: for every layer how many positions back a query sees, itself included, 0 for all; empty means all.
      embed_scale: multiplies the token embedding.
      n_token_types: rows of a table of token types (segments) that is added to the embedding.
      norm: "none" leaves the stream as it is, which makes every read linear.
      norm_offset: added to the norms' weights.
      norms: where they stand: "pre" before attention and MLP, "output" on what they add to the stream, "sandwich" both,
        "post" on the stream after each addition.
      embed_norm: a norm after the embedding.
      parallel: attention and MLP read the same stream, `resid_pre`.
      shared_norm: in a parallel block, both read through the norm of the attention.
      qk_norm: an RMSNorm of queries and keys before they turn: over each head, or over all heads together.
      attn_scale: of the scores; None means d_head^-1/2.
      score_softcap: scores become cap · tanh(scores / cap); 0 for none. `logit_softcap` likewise.
      activation: "gelu" is the tanh approximation.
      gated: the MLP is `down(act(gate(x)) * up(x))` instead of `down(act(up(x)))`.
      n_experts: 0 for one MLP; otherwise a mixture, of which every token uses `n_active_experts`.
      renormalize_experts: the weights of the chosen experts are made to sum to 1.
      tied: the unembedding is the transposed embedding.
      head: "none" for an encoder, whose output is the last stream.
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
    causal: bool = True
    patches: PatchConfig | None = None
    positions: Literal["rotary", "learned", "none"] = "rotary"
    rope_theta: float = 10_000.0
    rope_dim: int | None = None
    rope_adjacent: bool = False
    rope_scaling: RopeScaling | None = None
    rope_local_theta: float | None = None
    rope_layers: tuple[bool, ...] = ()
    windows: tuple[int, ...] = ()
    embed_scale: float = 1.0
    n_token_types: int = 0
    norm: Literal["rms", "layer", "none"] = "rms"
    norm_eps: float = 1e-5
    norm_offset: float = 0.0
    norms: Literal["pre", "output", "sandwich", "post"] = "pre"
    embed_norm: bool = False
    parallel: bool = False
    shared_norm: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    unembed_bias: bool = False
    qk_norm: Literal["none", "head", "whole"] = "none"
    attn_scale: float | None = None
    score_softcap: float = 0.0
    logit_softcap: float = 0.0
    activation: Literal["silu", "gelu", "gelu_exact", "quick_gelu", "relu"] = "silu"
    gated: bool = True
    n_experts: int = 0
    n_active_experts: int = 0
    renormalize_experts: bool = True
    tied: bool = True
    head: Literal["logits", "none"] = "logits"

    def __post_init__(self):
        check_choices(self)
        for field, kind in (("windows", int), ("rope_layers", bool)):
            object.__setattr__(self, field, _per_layer(field, getattr(self, field), kind, self.n_layers))
        for field in ("n_layers", "d_model", "n_heads", "n_kv_heads", "d_head", "d_vocab", "n_ctx"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")
        if self.d_mlp < 0:
            raise ValueError(f"d_mlp must be at least 0, got {self.d_mlp}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}")
        if self.positions == "rotary" and self.rope_dim is None and self.d_head % 2:
            raise ValueError(f"rotary positions need an even d_head, got {self.d_head}")
        if self.rope_dim is not None and (self.rope_dim % 2 or not 0 < self.rope_dim <= self.d_head):
            raise ValueError(f"rope_dim is even and at most d_head={self.d_head}, got {self.rope_dim}")
        if any(window < 0 for window in self.windows):
            raise ValueError(f"a window is a number of positions, or 0 for none; got {min(self.windows)}")
        if self.windows and not self.causal:
            raise ValueError("windows look back from a position: they need causal=True")
        for field in ("score_softcap", "logit_softcap"):
            if not 0 <= getattr(self, field) < math.inf:
                raise ValueError(f"{field} is a positive number, or 0 for none; got {getattr(self, field)}")
        if self.parallel and (self.norms not in ("pre", "sandwich") or not self.d_mlp):
            raise ValueError(f"a parallel block has an MLP and norms before its two halves, not norms={self.norms!r}")
        if self.shared_norm and not self.parallel:
            raise ValueError("shared_norm is of parallel blocks: it needs parallel=True")
        if not 0 <= self.n_active_experts <= self.n_experts or (self.n_experts and not self.n_active_experts):
            raise ValueError(f"n_active_experts={self.n_active_experts} of n_experts={self.n_experts} experts")
        if self.n_experts and not (self.gated and self.d_mlp and not self.mlp_bias):
            raise ValueError("experts are gated MLPs without biases")
        if self.patches is not None and (self.positions == "rotary" or self.n_ctx != self.patches.n_positions):
            raise ValueError(f"an image of {self.patches.n_positions} positions, n_ctx={self.n_ctx}, not rotary")
        if self.patches is not None and self.tied and self.head == "logits":
            raise ValueError("an image has no token embedding that the unembedding could be tied to")
        if self.patches is not None and (self.n_token_types or self.embed_scale != 1.0):
            raise ValueError("n_token_types and embed_scale are of token embeddings, which a model of images lacks")

    @property
    def n_rotary(self) -> int:
        """Components of a head that turn."""
        return self.d_head if self.rope_dim is None else self.rope_dim

    @property
    def score_scale(self) -> float:
        return self.d_head**-0.5 if self.attn_scale is None else self.attn_scale


def _per_layer(field: str, values: object, kind: type, n_layers: int) -> tuple:
    """A field with an entry for every layer, or none, as a tuple: a configuration is hashed where a model is compiled.

    Raises:
      ValueError: neither a tuple nor a list, entries of another kind, or of another number.
    """
    if not isinstance(values, tuple | list) or not all(type(value) is kind for value in values):
        raise ValueError(f"{field} is a tuple with one {kind.__name__} for every layer, or empty; got {values!r}")
    if values and len(values) != n_layers:
        raise ValueError(f"{field} has {len(values)} entries for {n_layers} layers")
    return tuple(values)


def check_choices(config: object) -> None:
    """Raises ValueError for a field that is none of the strings it is declared to be; a branch would pass it over."""
    for field, hint in get_type_hints(type(config)).items():
        if get_origin(hint) is Literal and getattr(config, field) not in get_args(hint):
            raise ValueError(f"{field} is one of {', '.join(get_args(hint))}; got {getattr(config, field)!r}")
