"""Causal scrubbing (Chan et al. 2022): resample everything that a hypothesis allows to change, and see what is left.

The hypothesis is unrolled into a tree of paths from the logits. Going down from the logits, every interpretation is run
on a prompt drawn from those that agree with its parent's prompt on its function, and every source that a node reads
without the hypothesis caring comes from a random prompt. What the sources write is computed once for all prompts; a
node of the tree then gathers rows of it, replaces what its children give, and runs its own heads or MLPs again. So a
sample costs a layer for every layer that a node has sources in, whatever the depth of the model, and all samples are
one program.

Recovered is `(m_scrubbed − m_random) / (m − m_random)`, where m_random gives every prompt the logits of every prompt: 1
where the hypothesis keeps all of the metric, 0 where no better than a shuffle of the answers.
"""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mi_jax.circuits.graph import Graph
from mi_jax.circuits.runs.sources import PlainRun, SourceTap, plain_run
from mi_jax.circuits.scrubbing.hypothesis import Hypothesis, TreeNode, agreeing_groups, treeify
from mi_jax.circuits.scrubbing.sampling import draw_rows
from mi_jax.core.errors import InputError
from mi_jax.core.taps import Tap
from mi_jax.data.task import Task
from mi_jax.decomposition.evaluation.estimates import Estimate, Null, bootstrap
from mi_jax.models.block import block
from mi_jax.models.decoder import Decoder
from mi_jax.models.layout import Prompts


@dataclasses.dataclass(frozen=True)
class Scrubbing:
    """How much of the metric a hypothesis keeps.

    Attributes:
      recovered: with its 95 % interval over prompts.
      null: of the same hypothesis with its values shuffled over prompts, one draw a shuffle.
      metric: of the scrubbed model, mean over samples; `model_metric` and `random_metric` are the ends of the scale.
      runs: nodes of the tree, the logits included.
    """

    recovered: Estimate
    null: Null
    metric: Float[np.ndarray, " batch"]
    model_metric: Float[np.ndarray, " batch"]
    random_metric: Float[np.ndarray, " batch"]
    runs: int


class _ReaderTap(SourceTap):
    """Adds to what single readers of a layer read, and keeps what the layer's sources write."""

    def __init__(self, graph: Graph, params, change: dict[int, Array]):
        super().__init__(graph, params)
        self._change = change

    def touches(self, name: str) -> bool:
        return name in ("attn.q_in", "attn.k_in", "attn.v_in") or super().touches(name)

    def __call__(self, name: str, x: Array) -> Array:
        h, kv = self._graph.n_heads, self._graph.n_kv_heads
        starts = {"attn.q_in": (0, h), "attn.k_in": (h, kv), "attn.v_in": (h + kv, kv)}
        if name in starts:
            start, n = starts[name]
            for r, change in self._change.items():
                if start <= r < start + n:
                    x = x.at[:, :, r - start].add(change)
            return x
        if name == "mlp.in" and h + 2 * kv in self._change:
            return x + self._change[h + 2 * kv]
        return super().__call__(name, x)


@eqx.filter_jit
def _scrubbed(
    model: Decoder, task: Task, nodes: tuple[TreeNode, ...], rows: Array, others: Array
) -> tuple[Array, Array, Array]:
    """The metric of every sample, of the model, and of every prompt given the logits of all."""
    graph = Graph.of(model.config)
    run = plain_run(model, task.clean, task.mask)
    untouched = Tap(model.site_table, {}, (), {}, None)

    def sample(drawn):
        mine, free = drawn
        values: dict[int, dict[int, Array]] = {}
        for t in reversed(range(1, len(nodes))):
            values[t] = _written(model, task, graph, run, nodes[t], mine[t], free[t], values)
        change = _change(graph, run, nodes[0], graph.n_readers - 1, mine[0], free[0], values)
        return task.metric(model.head(run.streams[-1] + change, untouched, task.position))

    logits = model.head(run.streams[-1], untouched, task.position)
    turns = jnp.arange(logits.shape[0], dtype=jnp.int32)
    shuffled = jax.lax.map(lambda i: task.metric(jnp.roll(logits, i, axis=0)), turns)
    return jax.lax.map(sample, (rows, others)), task.metric(logits), shuffled.mean(0)


def _written(
    model: Decoder, task: Task, graph: Graph, run: PlainRun, node: TreeNode, rows: Array, free: Array, values
) -> dict[int, Array]:
    """What the sources of a node write when they read what the tree gives them."""
    out = {s: run.sources[s, rows] for s in node.sources if node.whole or s == 0}
    # heads of a layer are run together, apart from its MLP, which must not read what these heads write here
    together: dict[tuple[int, bool], list[int]] = {}
    for s in node.sources:
        if s not in out:
            layer, place = divmod(s - 1, graph.layer_sources)
            together.setdefault((layer, place < graph.n_heads), []).append(s)
    for (layer, _), sources in together.items():
        readers = sorted({r for s in sources for r in graph.reader_rows(graph.sources[s])})
        change = {r - layer * graph.layer_readers: _change(graph, run, node, r, rows, free, values) for r in readers}
        params = jax.tree.map(lambda x, layer=layer: x[layer], model.blocks)
        tap = _ReaderTap(graph, params, change)
        number = jnp.asarray(layer, jnp.int32)
        block(model.layer(number, params), run.streams[layer, rows], tap, model.config, Prompts(task.mask))
        written = jnp.concatenate(tap.written)
        out |= {s: written[(s - 1) % graph.layer_sources] for s in sources}
    return out


def _change(
    graph: Graph, run: PlainRun, node: TreeNode, reader: int, rows: Array, free: Array, values
) -> Float[Array, "batch pos d_model"]:
    """What the tree gives a reader, minus what it would read on the node's own prompt."""
    important = {s: t for s, r, t in node.important if r == reader}
    all_sources = np.flatnonzero(graph.edges[:, reader])
    unimportant = np.array([s for s in all_sources if s not in important], np.int32)
    own = run.sources[all_sources[:, None], rows[None, :]].sum(0)
    given = run.sources[unimportant[:, None], free[unimportant]].sum(0)
    for s, t in important.items():
        given = given + values[t][s]
    return given - own


def causal_scrub(
    model: Decoder,
    task: Task,
    hypothesis: Hypothesis,
    *,
    key: Array,
    samples: int = 16,
    null_samples: int = 16,
    unimportant: str = "independent",
    seed: int = 0,
) -> Scrubbing:
    """Tests a hypothesis on the clean prompts of a task, which are also what is resampled.

    Args:
      key: draws the bootstrap.
      samples: trees drawn for every prompt.
      null_samples: trees drawn with shuffled values.
      unimportant: "independent" draws a prompt for each source that does not matter, "together" one for each node.
      seed: draws the trees.

    Raises:
      InputError: a hypothesis that does not fit the graph, prompts of different lengths (a source would be read at
        positions that another prompt does not have), or a metric that a shuffle of the answers leaves as it is.

    Example:
      subject = Interpretation("subject", ("a5.h1",), task.answer)
      causal_scrub(model, task, Hypothesis((Read(subject),)), key=jax.random.key(0)).recovered
    """
    graph = Graph.of(model.config)
    if unimportant not in ("independent", "together"):
        raise InputError(f"unimportant is 'independent' or 'together', got {unimportant!r}")
    mask = np.asarray(task.mask)
    if not (mask == mask[:1]).all():
        raise InputError("causal scrubbing exchanges what prompts write at each position: take prompts of one length")
    nodes, interpretations = treeify(hypothesis, graph)
    groups = [agreeing_groups(i, task) for i in interpretations]
    size = {"n_prompts": len(task), "n_sources": graph.n_sources, "together": unimportant == "together"}
    kept = draw_rows(nodes, groups, **size, samples=samples, permuted=False, seed=seed)
    null = draw_rows(nodes, groups, **size, samples=null_samples, permuted=True, seed=seed + 1)
    rows, others = (jnp.asarray(np.concatenate(pair)) for pair in zip(kept, null, strict=True))
    scrubbed, full, random = (np.asarray(x, np.float64) for x in _scrubbed(model, task, nodes, rows, others))
    scale = full.mean() - random.mean()
    if not abs(scale) > 1e-6 * max(1.0, abs(full.mean())):
        raise InputError(f"task {task.name!r}: the model's metric ({full.mean():.6g}) is that of shuffled answers")
    sums = np.stack([scrubbed[:samples].mean(0), full, random], 1)
    return Scrubbing(
        bootstrap(lambda t: (t[..., 0] - t[..., 2]) / (t[..., 1] - t[..., 2]), sums, key=key),
        Null.of((scrubbed[samples:].mean(1) - random.mean()) / scale),
        *sums.T,
        runs=len(nodes),
    )
