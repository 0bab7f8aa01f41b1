"""The limit of a sweep's speed: the fewest floating-point operations over the measured rate of matmuls.

A resumed sweep computes only what a patch can change: the layers from the patched one on and, since attention is
causal, the positions from the patched one on. The keys and values before that position are those of the unpatched
run. With L layers, T positions, B examples and F(t) operations of one layer for the token at position t,

    residual stream, layer × position:  B Σ_{l<L} Σ_{p<T} (L − l) Σ_{t≥p} F(t)
    heads, layer × head, all positions: B n_heads Σ_{l<L} Σ_t (G + (L − 1 − l) F(t))

where G is what one layer does after the heads' outputs. Added to both: the unpatched run and, for every cell, the
logits that the metric reads. Counted are multiplications and additions of matmuls; norms, softmax and activation
functions are taken to be free, so that no program can be faster than this limit without skipping work. (Two savings
are not counted: a program may leave out those positions of the last layer, and those queries, keys and values of the
patched layer, that the metric cannot see or the patch cannot change.)
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


def residual_sweep_flops(config: DecoderConfig, batch: int, n_pos: int, *, logits: int) -> int:
    """Fewest operations of patching the residual stream over layer × position.

    Args:
      config: the model's shape.
      batch: examples.
      n_pos: tokens of each.
      logits: how many logits of an example the metric reads.
    """
    resumed = sum(
        forward_flops(config, batch, n_pos, first=first, layers=config.n_layers - layer)
        for layer in range(config.n_layers)
        for first in range(n_pos)
    )
    read = config.n_layers * n_pos * 2 * batch * logits * config.d_model
    return forward_flops(config, batch, n_pos) + resumed + read


def head_sweep_flops(config: DecoderConfig, batch: int, n_pos: int, *, logits: int) -> int:
    """Fewest operations of patching the output of every head at all positions; arguments as above."""
    patched_layer = batch * n_pos * linear_flops(config, after_heads=True)
    resumed = config.n_heads * sum(
        patched_layer + forward_flops(config, batch, n_pos, layers=config.n_layers - 1 - layer)
        for layer in range(config.n_layers)
    )
    read = config.n_layers * config.n_heads * 2 * batch * logits * config.d_model
    return forward_flops(config, batch, n_pos) + resumed + read


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
