"""The limit of speed: the fewest operations over the measured rate of matmuls, or bytes over the rate of reads.

A resumed sweep computes only what a patch can change: the layers from the patched one on and, since attention is
causal, the positions from the patched one on. The keys and values before that position are those of the unpatched
run. Where one position of the output is read, the last layer is needed at that position alone, and besides only its
keys and values. With L layers, T positions, B examples, F(t) operations of one layer for the token at position t and
E(p) of the last layer when the positions from p on have changed,

    residual stream, layer × position:  B Σ_{l<L} Σ_{p<T} (E(p) + (L − 1 − l) Σ_{t≥p} F(t))
    heads, layer × head, all positions: B n_heads (g + Σ_{l<L−1} (E(0) + T G + (L − 2 − l) Σ_t F(t)))

where G is what one layer does after the heads' outputs for one token, and g the same in the last layer. Added to both:
the unpatched run and, for every cell, the logits that the metric reads. Counted are multiplications and additions of
matmuls; norms, softmax and activation functions are taken to be free, so that no program can be faster than this limit
without skipping work. (Not counted is that a program may leave out those queries, keys and values of the patched layer
that the patch cannot change.)

A step of decoding does few operations on every weight, so reading them may take longer. Its limit is the larger of
operations / matmul rate and bytes / read rate, the bytes being those of all weights and of the keys and values so far.
"""

import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from mi_jax.models import DecoderConfig


def linear_flops(config: DecoderConfig, *, after_heads: bool = False) -> int:
    """Operations of one layer's weights for one token; `after_heads` leaves out queries, keys and values."""
    heads = config.n_heads * config.d_head
    kv_heads = config.n_kv_heads * config.d_head
    mlp = (3 if config.gated else 2) * config.d_mlp
    attention = heads if after_heads else 2 * heads + 2 * kv_heads
    return 2 * config.d_model * (attention + mlp)


def attention_flops(config: DecoderConfig, keys: int) -> int:
    """Operations of one layer's scores and weighted values for one token that attends to `keys` tokens."""
    return 4 * config.n_heads * config.d_head * keys


def forward_flops(config: DecoderConfig, batch: int, n_pos: int, *, first: int = 0, layers: int | None = None) -> int:
    """Operations of `layers` layers (all if not given) at the positions from `first` on, without the logits."""
    layers = config.n_layers if layers is None else layers
    tokens = sum(linear_flops(config) + attention_flops(config, t + 1) for t in range(first, n_pos))
    return layers * batch * tokens


def last_layer_flops(config: DecoderConfig, batch: int, n_pos: int, *, first: int = 0) -> int:
    """Operations of a layer of which the last position's output is needed, where those from `first` on have changed."""
    keys_and_values = 2 * config.d_model * 2 * config.n_kv_heads * config.d_head
    read = linear_flops(config) - keys_and_values + attention_flops(config, n_pos)
    return batch * ((n_pos - first) * keys_and_values + read)


def _unpatched_flops(config: DecoderConfig, batch: int, n_pos: int) -> int:
    whole = forward_flops(config, batch, n_pos, layers=config.n_layers - 1)
    return whole + last_layer_flops(config, batch, n_pos)


def residual_sweep_flops(config: DecoderConfig, batch: int, n_pos: int, *, logits: int) -> int:
    """Fewest operations of patching the residual stream over layer × position, read at the last position.

    Args:
      config: the model's shape.
      batch: examples.
      n_pos: tokens of each.
      logits: how many logits of an example the metric reads.
    """
    resumed = sum(
        forward_flops(config, batch, n_pos, first=first, layers=config.n_layers - 1 - layer)
        + last_layer_flops(config, batch, n_pos, first=first)
        for layer in range(config.n_layers)
        for first in range(n_pos)
    )
    read = config.n_layers * n_pos * 2 * batch * logits * config.d_model
    return _unpatched_flops(config, batch, n_pos) + resumed + read


def head_sweep_flops(config: DecoderConfig, batch: int, n_pos: int, *, logits: int) -> int:
    """Fewest operations of patching the output of every head at all positions; arguments as above."""
    after_heads = batch * linear_flops(config, after_heads=True)
    resumed = after_heads + sum(
        n_pos * after_heads
        + forward_flops(config, batch, n_pos, layers=config.n_layers - 2 - layer)
        + last_layer_flops(config, batch, n_pos)
        for layer in range(config.n_layers - 1)
    )
    read = config.n_layers * config.n_heads * 2 * batch * logits * config.d_model
    return _unpatched_flops(config, batch, n_pos) + config.n_heads * resumed + read


def logits_flops(config: DecoderConfig, tokens: int) -> int:
    """Operations of unembedding so many tokens."""
    return 2 * tokens * config.d_model * config.d_vocab


def whole_forward_flops(config: DecoderConfig, batch: int, n_pos: int) -> int:
    """Operations of a forward with the logits of all positions."""
    return forward_flops(config, batch, n_pos) + logits_flops(config, batch * n_pos)


def decode_step_flops(config: DecoderConfig, batch: int, keys: int) -> int:
    """Operations of one step that attends to `keys` tokens, its own among them, for every example."""
    per_token = linear_flops(config) + attention_flops(config, keys)
    return batch * config.n_layers * per_token + logits_flops(config, batch)


def decode_step_bytes(config: DecoderConfig, batch: int, keys: int, *, itemsize: int = 4) -> int:
    """Bytes that one such step reads: matrices of the layers, the unembedding, and the cached keys and values."""
    weights = config.n_layers * linear_flops(config) // 2 + config.d_model * config.d_vocab
    cache = 2 * batch * (keys - 1) * config.n_layers * config.n_kv_heads * config.d_head
    return itemsize * (weights + cache)


def decode_seconds(
    config: DecoderConfig, batch: int, n_prompt: int, n_new: int, *, matmul_rate: float, read_rate: float
) -> float:
    """Fewest seconds of continuing prompts by `n_new` tokens in float32: the prompts at once, then token by token.

    Args:
      config: the model's shape.
      batch: prompts.
      n_prompt: tokens of each.
      n_new: tokens that each is continued by; the last one is not read again.
      matmul_rate: operations per second.
      read_rate: bytes per second.
    """
    prompt = forward_flops(config, batch, n_prompt) + logits_flops(config, batch)
    needed = [(prompt, decode_step_bytes(config, batch, 1))]
    for keys in range(n_prompt + 1, n_prompt + n_new):
        needed.append((decode_step_flops(config, batch, keys), decode_step_bytes(config, batch, keys)))
    return sum(max(flops / matmul_rate, read / read_rate) for flops, read in needed)


def matmul_shapes(config: DecoderConfig, rows: Sequence[int] = (1024, 4096)) -> list[tuple[int, int, int]]:
    """`(m, k, n)` of the products that occur in a layer, for some numbers of tokens, and of one large square one."""
    d, f = config.d_model, config.d_mlp
    return [(m, k, n) for m in rows for k, n in ((d, d), (d, f), (f, d))] + [(2048, 2048, 2048)]


def matmul_rate(shapes: Sequence[tuple[int, int, int]], *, repeats: int = 5) -> float:
    """The highest rate of `jnp.dot` in float32 over all shapes and repeats, in operations per second."""
    best = 0.0
    dot = jax.jit(jnp.dot)
    for m, k, n in shapes:
        a, b = jnp.ones((m, k), jnp.float32), jnp.ones((k, n), jnp.float32)
        jax.block_until_ready(dot(a, b))
        for _ in range(repeats):
            start = time.perf_counter()
            jax.block_until_ready(dot(a, b))
            best = max(best, 2 * m * k * n / (time.perf_counter() - start))
    return best


def read_rate(size: int = 2**29, *, repeats: int = 5) -> float:
    """The highest rate at which an array of so many bytes is read, in bytes per second: summed, or times a vector."""
    width = 512
    array = jnp.ones((size // (4 * width), width), jnp.float32)
    vector = jnp.ones((width,), jnp.float32)
    best = 0.0
    for read in (jax.jit(jnp.sum), jax.jit(lambda x: jnp.dot(x, vector))):
        jax.block_until_ready(read(array))
        for _ in range(repeats):
            start = time.perf_counter()
            jax.block_until_ready(read(array))
            best = max(best, array.nbytes / (time.perf_counter() - start))
    return best
