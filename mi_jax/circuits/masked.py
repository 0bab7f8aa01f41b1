"""The masked-edge forward: one program in which every edge can carry another run's value.

With `mask[s, r]` in [0, 1], reader r reads `stream + Σ_s mask[s, r] · (patch[s] − z[s])`, where `z[s]` is what source s
writes in this very run. All ones on the edges gives the run that `patch` came from; zeros give the run itself.
The block is the model's own: only the tap differs.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mi_jax.circuits.graph import Graph
from mi_jax.core.taps import Tap
from mi_jax.models.block import block
from mi_jax.models.decoder import Decoder
from mi_jax.models.layout import Prompts

_SOURCES = ("attn.head_out", "mlp_out")


class _EdgeTap:
    """A tap that feeds every reader its own stream and records what every source writes."""

    def __init__(self, graph: Graph, difference: Array, patch: Array, mask: Array, layer: Array):
        self._graph, self._patch, self._mask = graph, patch, mask
        self.difference = difference
        self._first = 1 + layer * graph.layer_sources
        self._deltas: Array | None = None

    def touches(self, name: str) -> bool:
        return name in ("attn.q_in", "attn.k_in", "attn.v_in", *_SOURCES)

    def __call__(self, name: str, x: Array) -> Array:
        h, kv = self._graph.n_heads, self._graph.n_kv_heads
        if name in ("attn.q_in", "attn.k_in", "attn.v_in"):
            if self._deltas is None:
                self._deltas = jnp.einsum("sr,sbpd->bprd", self._mask[:, : h + 2 * kv], self.difference)
            start, n = {"attn.q_in": (0, h), "attn.k_in": (h, kv), "attn.v_in": (h + kv, kv)}[name]
            return x + self._deltas[:, :, start : start + n]
        if name == "mlp.in":
            return x + jnp.einsum("s,sbpd->bpd", self._mask[:, -1], self.difference)
        if name == "attn.head_out":
            self._write(jnp.moveaxis(x, 2, 0), self._first)
        if name == "mlp_out":
            self._write(x[None], self._first + h)
        return x

    def _write(self, z: Array, start: Array) -> None:
        patch = jax.lax.dynamic_slice_in_dim(self._patch, start, z.shape[0], 0)
        self.difference = jax.lax.dynamic_update_slice_in_dim(self.difference, patch - z, start, 0)


def masked_forward(
    model: Decoder,
    tokens: Int[Array, "batch pos"],
    edges: Float[Array, "source reader"],
    patch: Float[Array, "source batch pos d_model"],
    mask: Bool[Array, "batch pos"] | None = None,
    *,
    output_pos: Int[Array, " batch"] | None = None,
) -> Float[Array, "batch out_pos d_vocab"]:
    """Logits of a run in which the edges with `edges[s, r] = 1` carry `patch[s]` instead of what the source wrote.

    Args:
      edges: weights in [0, 1], zero where no edge exists (`Graph.edges`).
      patch: the sources of another run (`source_outputs`), zeros or means, for zero or mean ablation.
    """
    graph = Graph.of(model.config)
    mask = jnp.ones(tokens.shape, bool) if mask is None else mask
    x = embedded(model, tokens)
    difference = jnp.zeros_like(patch).at[0].set(patch[0] - x)
    by_layer = edges[:, :-1].reshape(graph.n_sources, graph.n_layers, graph.layer_readers).transpose(1, 0, 2)

    def body(carry, row):
        x, difference = carry
        number, params, weights = row
        tap = _EdgeTap(graph, difference, patch, weights, number)
        x = block(model.layer(number, params), x, tap, model.config, Prompts(mask))
        return (x, tap.difference), None

    numbers = jnp.arange(graph.n_layers, dtype=jnp.int32)
    (x, difference), _ = jax.lax.scan(body, (x, difference), (numbers, model.blocks, by_layer))
    x = x + jnp.einsum("s,sbpd->bpd", edges[:, -1], difference)
    return model.head(x, Tap(model.site_table, {}, (), {}, None), output_pos)


def source_outputs(
    model: Decoder, tokens: Int[Array, "batch pos"], mask: Bool[Array, "batch pos"] | None = None
) -> Float[Array, "source batch pos d_model"]:
    """What every source writes to the stream in a plain run."""
    graph = Graph.of(model.config)
    sites = ("embed", *_SOURCES[: 1 + graph.has_mlp])
    _, acts = model(tokens, mask, capture=sites, output=False)
    per_layer = jnp.moveaxis(acts["attn.head_out"], 3, 1)
    if graph.has_mlp:
        per_layer = jnp.concatenate([per_layer, acts["mlp_out"][:, None]], 1)
    return jnp.concatenate([acts["embed"][None], per_layer.reshape(-1, *per_layer.shape[2:])])


def embedded(model: Decoder, tokens: Int[Array, "batch pos"]) -> Float[Array, "batch pos d_model"]:
    """The stream before the first layer."""
    return model(tokens, capture=("embed",), output=False)[1]["embed"]
