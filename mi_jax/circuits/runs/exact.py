"""Exact scores: every edge corrupted on its own, all of them in one program.

Up to the reader of the edge nothing changes, so a run starts from the stored stream of the reader's layer. There the
readers of one source share the projections: reading `stream + difference` gives every query, key and value at once, and
of each edge one head differs. Layers after it are plain layers, and the last computes the position of the answer alone.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mi_jax.circuits.ablation.values import ablation_values
from mi_jax.circuits.graph import Graph
from mi_jax.circuits.runs.answer import AnswerLayout
from mi_jax.circuits.runs.exact_from_base import exact_from_base
from mi_jax.circuits.runs.sources import PlainRun, plain_run
from mi_jax.core.errors import InputError
from mi_jax.core.precision import widened_dtype
from mi_jax.core.taps import Tap
from mi_jax.data.task import Task
from mi_jax.models.attention import attention
from mi_jax.models.block import block
from mi_jax.models.decoder import Decoder
from mi_jax.models.layout import Layout, Prompts

_PROJECTED = ("attn.q", "attn.k", "attn.v")


def exact_edges(
    model: Decoder,
    task: Task,
    *,
    ablation: str | Float[Array, "source batch pos d_model"] = "resample",
    base: Bool[np.ndarray, "source reader *pos"] | None = None,
    among: Bool[np.ndarray, "source reader *pos"] | None = None,
    positions: bool = False,
    batch_size: int = 32,
) -> Float[np.ndarray, "source reader *pos"]:
    """Of every edge what the mean metric loses when that edge alone is corrupted, `m(base) − m(base without it)`.

    Args:
      ablation: what a corrupted edge carries, see `ablation_values`.
      base: the circuit that edges are taken from; None is the whole graph. An edge outside it is added instead, and its
        score is `m(base with it) − m(base)`: positive where the edge supports the metric, in either case.
      among: edges to score; the others get 0. None scores all.
      positions: an edge is corrupted at one position of its reader at a time; scores, `base` and `among` then have a
        third axis. In a causal model all scores after the position of the last answer are 0, without a run.
      batch_size: edges at once; bounds the memory.

    Raises:
      InputError: a base of another shape, an unknown ablation, or no edges at once.
    """
    if batch_size < 1:
        raise InputError(f"batch_size is at least 1, got {batch_size}")
    graph, n_pos = Graph.of(model.config), task.clean.shape[1]
    edges, axes = graph.edges, "[source reader]"
    if positions:
        edges, axes = np.repeat(graph.edges[:, :, None], n_pos, 2), "[source reader pos]"
    for name, mask in (("base", base), ("among", among)):
        if mask is not None and mask.shape != edges.shape:
            raise InputError(f"{name} has shape {edges.shape} {axes}, got {mask.shape}")
    patch = ablation_values(model, task, ablation)
    # a norm over all heads together makes every head depend on the one that changes
    if base is None and among is None and not positions and model.config.qk_norm != "whole":
        return np.asarray(_single_edges(model, task, patch, batch_size))
    base = edges if base is None else base & edges
    scored = edges if among is None else among & edges
    if positions and model.config.causal:
        scored = scored & (np.arange(n_pos) <= np.asarray(task.position).max())[None, None]
    return exact_from_base(model, task, patch, base, scored, batch_size)


class _Fixed:
    """A tap that replaces some values, adds to the MLP's input, and keeps what was asked for."""

    def __init__(self, values: dict[str, Array] | None = None, to_mlp: Array | None = None, keep: tuple[str, ...] = ()):
        self._values, self._to_mlp, self._keep = values or {}, to_mlp, keep
        self.seen: dict[str, Array] = {}

    def touches(self, name: str) -> bool:
        return name in self._values or name in self._keep

    def __call__(self, name: str, x: Array) -> Array:
        x = self._values.get(name, x)
        if name == "mlp.in" and self._to_mlp is not None:
            x = x + self._to_mlp
        if name in self._keep:
            self.seen[name] = x
        return x


class _Runs:
    """Metrics of runs in which one reader of one layer reads something else."""

    def __init__(self, model: Decoder, task: Task, run: PlainRun, difference: Array, batch_size: int):
        self.model, self.task, self.run, self.difference = model, task, run, difference
        self.batch_size, self.graph = batch_size, Graph.of(model.config)
        self.prompts, self.answers = Prompts(task.mask), AnswerLayout(task.mask, task.position)
        self.last = self.graph.n_layers - 1

    def metric(self, x: Float[Array, "batch 1 d_model"]) -> Float[Array, ""]:
        return self.task.metric(self.model.head(x, Tap(self.model.site_table, {}, (), {}, None))).mean()

    def without_edges(self) -> Float[Array, ""]:
        return self.metric(self.answers.asking(self.run.streams[-1]))

    def from_layer(self, number: int | Array, x: Array, tap: _Fixed) -> Float[Array, ""]:
        """The metric when `tap` edits a layer that reads the stream x. A number that is an int is the last layer."""
        if isinstance(number, int):
            return self.metric(self._layer(number, x, tap, self.answers))
        x = self._layer(number, x, tap, self.prompts)
        x = jax.lax.fori_loop(number + 1, self.last, lambda i, x: self._layer(i, x, _Fixed(), self.prompts), x)
        return self.metric(self._layer(self.last, x, _Fixed(), self.answers))

    def _layer(self, number: int | Array, x: Array, tap: _Fixed, layout: Layout) -> Array:
        return block(self.model.layer(number, self._params(number)), x, tap, self.model.config, layout)

    def _params(self, number: int | Array):
        return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, number, keepdims=False), self.model.blocks)

    def _stream(self, number: int | Array) -> Array:
        return jax.lax.dynamic_index_in_dim(self.run.streams, number, keepdims=False)

    def attention_readers(self, number: int | Array, source: Array) -> Float[Array, " reader"]:
        """The metric for every query, key and value of a layer that reads this source corrupted."""
        x = self._stream(number)
        z, kind, chosen = self._heads(number, x, x + self.difference[source])

        def one(row):
            kind, chosen = row
            mixed = jnp.where(chosen[None, None, :, None], z[kind], z[0])
            return self.from_layer(number, x, _Fixed({"attn.z": mixed}))

        return _mapped(one, (kind, chosen), self.batch_size)

    def _heads(self, number: int | Array, x: Array, changed: Array) -> tuple[Array, Array, Array]:
        """What heads give when none, the queries, the keys or the values change; per reader, which, and of which head.

        A key or value that several heads share changes all of them.
        """
        layout = self.answers if isinstance(number, int) else self.prompts
        layer, config = self.model.layer(number, self._params(number)), self.model.config

        def seen(x, tap):
            attention(layer.params.attn, layer.params.attn_norm, x, tap, config, layout, layer.turn, layer.window)
            return tap.seen

        plain, other = (seen(v, _Fixed(keep=_PROJECTED)) for v in (x, changed))
        mixtures = [plain] + [plain | {name: other[name]} for name in _PROJECTED]
        z = jnp.stack([seen(x, _Fixed(m, keep=("attn.z",)))["attn.z"] for m in mixtures])
        h, kv = self.graph.n_heads, self.graph.n_kv_heads
        kind = np.repeat(np.arange(1, 4, dtype=np.int32), (h, kv, kv))
        shared = np.repeat(np.eye(kv, dtype=bool), h // kv, axis=1)
        return z, jnp.asarray(kind), jnp.asarray(np.concatenate([np.eye(h, dtype=bool), shared, shared]))

    def mlp_reader(self, number: int | Array, sources: Int[Array, " edge"]) -> Float[Array, " edge"]:
        """The metric when the MLP of a layer reads these sources corrupted, one at a time."""
        x = self._stream(number)
        answer = isinstance(number, int)

        def one(source):
            difference = self.difference[source]
            return self.from_layer(number, x, _Fixed(to_mlp=self.answers.asking(difference) if answer else difference))

        return _mapped(one, sources, self.batch_size)

    def logits_reader(self) -> Float[Array, " source"]:
        """The metric when the logits read a source corrupted."""
        x = self.answers.asking(self.run.streams[-1])
        return _mapped(lambda d: self.metric(x + self.answers.asking(d)), self.difference, self.batch_size)


@eqx.filter_jit
def _single_edges(model: Decoder, task: Task, patch: Array, batch_size: int) -> Float[Array, "source reader"]:
    graph, run = Graph.of(model.config), plain_run(model, task.clean, task.mask)
    runs = _Runs(model, task, run, patch - run.sources, batch_size)
    metrics = jnp.zeros(graph.edges.shape, widened_dtype(run.streams.dtype)).at[:, -1].set(runs.logits_reader())
    last, per_layer, readers = graph.n_layers - 1, graph.layer_sources, graph.layer_readers
    heads = readers - graph.has_mlp

    # all layers but the last are one program; the last is another, of one position
    def sources_before(layer):
        return 1 + layer * per_layer

    pairs = np.array([(n, s) for n in range(last) for s in range(sources_before(n))], np.int32).reshape(-1, 2)
    if last:
        found = jax.lax.map(lambda pair: runs.attention_readers(pair[0], pair[1]), jnp.asarray(pairs))
        columns = pairs[:, :1] * readers + np.arange(heads)[None, :]
        metrics = metrics.at[pairs[:, 1:], columns].set(found)
    ends = np.arange(sources_before(last), dtype=np.int32)
    found = jax.lax.map(lambda source: runs.attention_readers(last, source), jnp.asarray(ends))
    metrics = metrics.at[: len(ends), last * readers : last * readers + heads].set(found)
    if graph.has_mlp:
        before = [np.flatnonzero(graph.edges[:, (n + 1) * readers - 1]).astype(np.int32) for n in range(last + 1)]
        rows = [(n, chunk) for n in range(last) for chunk in _chunked(before[n], batch_size)]
        if last:
            numbers, chunks = (np.stack([row[i] for row in rows]).astype(np.int32) for i in (0, 1))
            found = jax.lax.map(lambda row: runs.mlp_reader(*row), (jnp.asarray(numbers), jnp.asarray(chunks)))
            metrics = metrics.at[chunks, (numbers[:, None] + 1) * readers - 1].set(found)
        found = runs.mlp_reader(last, jnp.asarray(before[last]))
        metrics = metrics.at[before[last], -2].set(found)
    return jnp.where(jnp.asarray(graph.edges), runs.without_edges() - metrics, 0.0)


def _chunked(sources: np.ndarray, size: int) -> np.ndarray:
    """Rows of one size, the last filled up with repetitions."""
    return np.pad(sources, (0, -len(sources) % size), mode="edge").reshape(-1, size)


def _mapped(f, xs, batch_size: int):
    """`lax.map` in equal batches, of at most this size, so that no remainder is compiled apart."""
    n = jax.tree.leaves(xs)[0].shape[0]
    n_batches = -(-n // batch_size)
    size = -(-n // n_batches)
    index = np.minimum(np.arange(n_batches * size), n - 1).reshape(n_batches, size).astype(np.int32)
    out = jax.lax.map(lambda rows: jax.vmap(f)(jax.tree.map(lambda a: a[rows], xs)), jnp.asarray(index))
    return out.reshape(-1, *out.shape[2:])[:n]
