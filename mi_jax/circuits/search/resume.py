"""Runs of circuits that corrupt nothing before some layer: only the layers from there on are computed.

Of the last layer only what the answer needs: its queries and its MLP at the position of the answer alone.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mi_jax.circuits.graph import Graph
from mi_jax.circuits.masked import State, advance, weighted
from mi_jax.circuits.sources import SourceTap, plain_run
from mi_jax.core.taps import Tap
from mi_jax.data.task import Task
from mi_jax.models.block import Block, block
from mi_jax.models.decoder import Decoder

# Starts that have a compiled program of their own; in a deeper model a run starts at the next one before its layer.
_STARTS = 8


class CleanRun(eqx.Module):
    """What the runs of circuits share: the whole model on the clean prompts.

    Attributes:
      streams: before every layer, and after the last.
      difference: of every source, what a corrupted edge carries minus what the source writes.
      logits: at the position of the answer.
    """

    streams: Float[Array, "stream batch pos d_model"]
    difference: Float[Array, "source batch pos d_model"]
    patch: Float[Array, "source batch pos d_model"]
    logits: Float[Array, "batch 1 d_vocab"]


@eqx.filter_jit
def clean_run(model: Decoder, task: Task, patch: Float[Array, "source batch pos d_model"]) -> CleanRun:
    """The whole model on the clean prompts of a task."""
    run = plain_run(model, task.clean, task.mask)
    logits = model(task.clean, task.mask, output_pos=task.position)
    return CleanRun(run.streams, patch - run.sources, patch, logits)


def start_before(n_layers: int, layer: int) -> int:
    """The last layer at or before this one at which runs start; the number of layers stands for the logits."""
    if layer >= n_layers - 1:
        return layer
    spacing = -(-n_layers // _STARTS)
    return layer // spacing * spacing


def resumed(
    model: Decoder, task: Task, clean: CleanRun, removed: Bool[Array, "source reader"], layer: int
) -> Float[Array, "batch 1 d_vocab"]:
    """Logits at the position of the answer, of the circuit without some edges, none of which is read before `layer`."""
    graph, weights = Graph.of(model.config), removed.astype(clean.patch.dtype)
    last = graph.n_layers - 1
    state = State(clean.streams[layer], (clean.difference[: 1 + layer * graph.layer_sources],))
    if layer < last:
        state = advance(model, state, weights, clean.patch, task.mask, range(layer, last), remat=False)
    x, parts = state.x, [_at(d, task.position, 2) for d in state.differences]
    if layer <= last:
        x, own = _last_layer(model, task, state, parts, weights, clean.patch)
        parts.append(own)
    else:
        x = _at(x, task.position, 1)
    x = x + _weighted(weights[:, -1:], parts)[0]
    return model.head(x, Tap(model.site_table, {}, (), {}, None))


def _at(x: Array, position: Int[Array, " batch"], axis: int) -> Array:
    """The value at the position of each prompt, the batch being the axis before that of the positions."""
    shape = [1] * x.ndim
    shape[axis - 1] = len(position)
    return jnp.take_along_axis(x, position.reshape(shape), axis=axis)


def _weighted(weights: Float[Array, "source reader"], parts: list[Array]) -> Float[Array, "reader batch pos d_model"]:
    """The weighted sum over sources that come in several parts."""
    ends = [sum(len(p) for p in parts[: i + 1]) for i in range(len(parts))]
    terms = [weighted(weights[end - len(p) : end], p) for end, p in zip(ends, parts, strict=True)]
    # a layout of its own for the product: merged into what reads it, it is an order of magnitude slower on a CPU
    return jax.lax.optimization_barrier(sum(terms[1:], terms[0]))


def _last_layer(
    model: Decoder, task: Task, state: State, parts: list[Array], weights: Array, patch: Array
) -> tuple[Float[Array, "batch 1 d_model"], Float[Array, "source batch 1 d_model"]]:
    """The stream after the last layer and what its sources write short of the patch, at the position of the answer."""
    graph, config = Graph.of(model.config), model.config
    number = graph.n_layers - 1
    columns = weights[:, number * graph.layer_readers : -1]
    queries, others = columns[:, : graph.n_heads], columns[:, graph.n_heads : graph.n_heads + 2 * graph.n_kv_heads]
    asking = _weighted(jnp.concatenate([queries, columns[:, graph.n_heads + 2 * graph.n_kv_heads :]], 1), parts)
    keys = _weighted(others, list(state.differences))
    params = jax.tree.map(lambda a: a[number], model.blocks)
    own = slice(1 + number * graph.layer_sources, None)
    tap = _LastTap(graph, params, asking, keys, columns[own], _at(patch[own], task.position, 2))
    layout = _AnswerLayout(task.mask, task.position)
    x = block(model.layer(number, params), state.x, tap, config, layout)
    return x, jnp.concatenate(tap.written)


class _LastTap(SourceTap):
    """Feeds the readers of the last layer, those of the answer at its position alone."""

    def __init__(self, graph: Graph, params: Block, asking: Array, keys: Array, weights: Array, patch: Array):
        super().__init__(graph, params)
        self._asking, self._keys, self._weights, self._patch = asking, keys, weights, patch

    def touches(self, name: str) -> bool:
        return name in ("attn.q_in", "attn.k_in", "attn.v_in") or super().touches(name)

    def __call__(self, name: str, x: Array) -> Array:
        h, kv = self._graph.n_heads, self._graph.n_kv_heads
        if name == "attn.q_in":
            return x + jnp.moveaxis(self._asking[:h], 0, 2)
        if name in ("attn.k_in", "attn.v_in"):
            rows = self._keys[:kv] if name == "attn.k_in" else self._keys[kv:]
            return x + jnp.moveaxis(rows, 0, 2)
        if name == "mlp.in":
            x = x + self._asking[-1]
            return x if self._graph.parallel else x + weighted(self._weights[:h, -1:], self.written[0])[0]
        return super().__call__(name, x)

    def write(self, z: Array) -> None:
        begin = sum(len(part) for part in self.written)
        super().write(self._patch[begin : begin + len(z)] - z)


class _AnswerLayout(eqx.Module):
    """The layout of a layer in which only the position of the answer asks."""

    mask: Bool[Array, "batch pos"]
    answer: Int[Array, " batch"]

    @property
    def positions(self) -> Int[Array, "1 pos"]:
        return jnp.arange(self.mask.shape[1], dtype=jnp.int32)[None]

    @property
    def asking_positions(self) -> Int[Array, "batch 1"]:
        return self.answer[:, None]

    @property
    def queries(self) -> Int[Array, "batch 1"]:
        return self.asking_positions

    @property
    def keys(self) -> Int[Array, "1 pos"]:
        return self.positions

    def asking(self, x: Array) -> Array:
        return _at(x, self.answer, 1)

    def rows(self, name: str, x: Array) -> Array:
        return x

    def flat(self, x: Array) -> Array:
        return x
