"""A forward pass in which chosen edges carry what another example of the batch wrote.

It is resample ablation on edges, cheap enough to train through: the other run is the same run, one example further, so
one pass computes both. Training through it makes a network compute a behaviour along the remaining edges only.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mi_jax.circuits.graph import Graph
from mi_jax.core.taps import Tap
from mi_jax.models.block import block
from mi_jax.models.decoder import Decoder
from mi_jax.models.layout import Prompts

_READS = {"attn.q_in": 0, "attn.k_in": 1, "attn.v_in": 2}


class _ResampleTap:
    """Adds `Σ_s edges[s, r] · (z_s of the next example − z_s)` to what reader r reads."""

    def __init__(self, graph: Graph, edges: Array, differences: list[Array], layer: int):
        self._graph, self._edges, self._differences = graph, edges, differences
        self._first = layer * graph.layer_readers

    def touches(self, name: str) -> bool:
        return name in _READS or name == "attn.head_out"

    def __call__(self, name: str, x: Array) -> Array:
        g = self._graph
        if name in _READS:
            before = (0, g.n_heads, g.n_heads + g.n_kv_heads)[_READS[name]]
            start = self._first + before
            return x + self._sum("sr,sbpd->bprd", slice(start, start + x.shape[2]))
        if name == "mlp.in":
            return x + self._sum("s,sbpd->bpd", self._first + g.layer_readers - 1)
        if name == "attn.head_out":
            self._differences.extend(_difference(x[:, :, i]) for i in range(g.n_heads))
        if name == "mlp_out":
            self._differences.append(_difference(x))
        return x

    def _sum(self, equation: str, readers: slice | int) -> Array:
        written = jnp.stack(self._differences)
        return jnp.einsum(equation, self._edges[: len(written), readers], written)


def _difference(z: Array) -> Array:
    return jnp.roll(z, 1, 0) - z


def resampled_forward(
    model: Decoder, tokens: Int[Array, "batch pos"], edges: Float[Array, "source reader"]
) -> Float[Array, "batch pos d_vocab"]:
    """Logits of a run in which the edges with `edges[s, r] = 1` carry what the previous example's source wrote.

    Example 0 takes from the last one. Zeros give the plain run.
    """
    graph = Graph.of(model.config)
    x, mask = model.embedded(tokens)
    differences = [_difference(x)]
    for number in range(graph.n_layers):
        params = jax.tree.map(lambda a, number=number: a[number], model.blocks)
        tap = _ResampleTap(graph, edges, differences, number)
        x = block(model.layer(number, params), x, tap, model.config, Prompts(mask))
    x = x + jnp.einsum("s,sbpd->bpd", edges[:, -1], jnp.stack(differences))
    return model.head(x, Tap(model.site_table, {}, (), {}, None))
