"""Runs of circuits that differ in what one reader reads, from the layer of that reader on.

Before it nothing is corrupted yet. What the present circuit computes from there on is kept, and of each variant only
what differs from it is computed: in the reader's layer the heads that the reader belongs to, in later layers the parts
that some edge of the circuit leads to.
"""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mi_jax.circuits.answer import at_answer
from mi_jax.circuits.graph import Graph
from mi_jax.circuits.search.layers import (
    Feed,
    Groups,
    Heads,
    Place,
    Wrote,
    after_heads,
    depend_on_each_other,
    feed,
    groups_of,
    heads_of,
    members,
    one_group,
    place_of,
    summed,
)
from mi_jax.circuits.sources import plain_run
from mi_jax.core.taps import Tap
from mi_jax.data.task import Task
from mi_jax.models.decoder import Decoder

Read = Callable[[Array], Array]


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


class Change(NamedTuple):
    """By how much the differences of some sources change, with the weights of their edges into every reader."""

    weights: Float[Array, "source reader"]
    values: Float[Array, "source batch query d_model"]


class Present(NamedTuple):
    """What the circuit computes from a layer on; a part that does not exist is None.

    Attributes:
      here, between, last: what the layer, those after it and the last one did; those between are stacked.
      between_reads, last_reads, logits_read: what they and the logits read beside the stream.
    """

    here: Wrote
    between: Wrote | None
    between_reads: Float[Array, "layer reader batch pos d_model"] | None
    last: Wrote | None
    last_reads: Feed | None
    logits_read: Float[Array, "batch 1 d_model"]


class Plan(NamedTuple):
    """What of every layer has to be computed again.

    Attributes:
      groups: numbers of the groups of heads, those that change first.
      n_groups: how many change.
      mlp: whether the MLP does.
    """

    groups: Int[Array, "layer group"]
    n_groups: Int[Array, " layer"]
    mlp: Bool[Array, " layer"]


class Runs:
    """Runs of circuits that are resumed at one layer.

    Args:
      removed: edges, none of which is read before `layer`.
      layer: that of the reader.
    """

    def __init__(self, model: Decoder, task: Task, clean: CleanRun, removed: Bool[Array, "source reader"], layer: int):
        self.model, self.task, self.clean, self.layer = model, task, clean, layer
        self.graph = Graph.of(model.config)
        self.weights = removed.astype(clean.patch.dtype)
        self.last = self.graph.n_layers - 1
        self.begin = 1 + layer * self.graph.layer_sources
        self.end = self.begin + self.graph.layer_sources
        self.place = place_of(model, task, layer, is_last=layer == self.last)
        self.x = clean.streams[layer]
        # differences of the sources before the layer, at the positions that ask
        self.earlier = clean.difference[: self.begin]
        self.asking = self._at_answer(self.earlier) if self.place.is_last else self.earlier

    def present(self) -> Present:
        """What the circuit itself computes."""
        graph, model, n = self.graph, self.model, self.graph.layer_readers
        own = self._columns(self.weights, self.layer)
        fed = feed(graph, self.task, own[: self.begin], self.earlier, is_last=self.place.is_last)
        z = heads_of(model.config, self.place, self.x, fed)
        heads = self._heads(None, self.layer, is_last=self.place.is_last)
        x, here = after_heads(model, self.place, self.x, z, fed.mlp, heads)
        written, between, between_reads, last, last_reads = [self.earlier, _sources(here)], None, None, None, None
        if self.layer + 1 < self.last:
            buffer = jnp.zeros_like(self.clean.difference).at[: self.end].set(jnp.concatenate(written))

            def body(carry, number):
                x, buffer = carry
                read = summed(self._columns(self.weights, number), buffer)
                fed = Feed(*jnp.split(read, (graph.n_heads, n - graph.has_mlp)))
                place = place_of(model, self.task, number, is_last=False)
                z = heads_of(model.config, place, x, fed)
                heads = self._heads(None, number, is_last=False)
                x, wrote = after_heads(model, place, x, z, fed.mlp, heads)
                at = 1 + number * graph.layer_sources
                return (x, jax.lax.dynamic_update_slice_in_dim(buffer, _sources(wrote), at, 0)), (wrote, read)

            numbers = jnp.arange(self.layer + 1, self.last, dtype=jnp.int32)
            (x, buffer), (between, between_reads) = jax.lax.scan(body, (x, buffer), numbers)
            written = [buffer[: 1 + self.last * graph.layer_sources]]
        if self.layer < self.last:
            values = jnp.concatenate(written)
            rows = self._columns(self.weights, self.last)[: len(values)]
            last_reads = feed(graph, self.task, rows, values, is_last=True)
            place = place_of(model, self.task, self.last, is_last=True)
            z = heads_of(model.config, place, x, last_reads)
            heads = self._heads(None, self.last, is_last=True)
            last = after_heads(model, place, x, z, last_reads.mlp, heads)[1]
            written = [values, _sources(last)]
        values = jnp.concatenate([self._at_answer(v) for v in written])
        return Present(here, between, between_reads, last, last_reads, summed(self.weights[:, -1:], values)[0])

    def mlp_reader(self, now: Present, plan: Plan) -> Callable[[Array], Array]:
        """The logits when the MLP of the layer reads the sources of a row corrupted."""
        own = slice(self.begin + self.graph.n_heads, self.end)
        heads = self._heads(None, self.layer, is_last=self.place.is_last)

        def run(row):
            into = summed(row[: self.begin, None], self.asking)
            to_mlp = row[self.begin : self.begin + self.graph.n_heads]
            x, here = after_heads(self.model, self.place, self.x, now.here.z, into, heads._replace(to_mlp=to_mlp))
            return self._rest(x, [Change(self.weights[own], here.mlp - now.here.mlp)], now, plan)

        return run

    def head_reader(self, reader: Int[Array, ""], now: Present, plan: Plan) -> Callable[[Array], Array]:
        """The same when a query, key or value of the layer, by its number there, reads a row corrupted."""
        graph, groups, config = self.graph, groups_of(self.model.config), self.model.config
        group = _group_of(graph, groups)[reader]
        queries, keys = members(graph, groups, group)
        columns = jnp.concatenate([queries, graph.n_heads + keys, graph.n_heads + graph.n_kv_heads + keys])
        read = self.weights[: self.begin, self.layer * graph.layer_readers + columns]
        plain, chosen = summed(read, self.earlier), columns == reader
        smaller, place = one_group(config, self.place, group)
        moving = None if depend_on_each_other(config) else queries
        heads = self._heads(moving, self.layer, is_last=self.place.is_last)
        into = now.here.mlp
        if graph.has_mlp:
            into = summed(self._columns(self.weights[: self.begin], self.layer)[:, -1:], self.asking)
        if moving is not None and not graph.parallel:
            others = self._heads(None, self.layer, is_last=self.place.is_last).to_mlp.at[moving].set(0.0)
            into = into + summed(others[:, None], now.here.heads)
        rows, old = self.weights[self.begin : self.begin + graph.n_heads], now.here.heads
        rows, old = (rows, old) if moving is None else (rows[moving], old[moving])
        own, n = jnp.concatenate([rows, self.weights[self.begin + graph.n_heads : self.end]]), len(queries)

        def run(row):
            changed = summed(row[: self.begin, None], self.earlier)
            values = jnp.where(chosen[:, None, None, None], changed, plain)
            asking = self._at_answer(values[:n]) if place.is_last else values[:n]
            z = heads_of(smaller, place, self.x, Feed(asking, values[n:], asking[:0]))
            z = z if groups.n == 1 else jax.lax.dynamic_update_slice_in_dim(now.here.z, z, group * n, 2)
            x, here = after_heads(self.model, self.place, self.x, z, into, heads, now.here, plan.mlp[self.layer])
            change = Change(own, jnp.concatenate([here.heads - old, here.mlp - now.here.mlp]))
            return self._rest(x, [change], now, plan)

        return run

    def _rest(self, x: Array, changes: list[Change], now: Present, plan: Plan) -> Float[Array, "batch 1 d_vocab"]:
        """The logits when sources of the layer changed."""
        if now.between is not None and now.between_reads is not None:
            x, changes = self._between(x, changes, now.between, now.between_reads, plan)
        if now.last is not None and now.last_reads is not None:
            x, changes = self._last(x, changes, now.last, now.last_reads, plan)
        read = now.logits_read
        for change in changes:
            read = read + summed(change.weights[:, -1:], self._at_answer(change.values))[0]
        return self._head(x + read)

    def _last(self, x: Array, changes: list[Change], known: Wrote, reads: Feed, plan: Plan):
        """The stream after the last layer, and what changes for the logits."""
        here = [Change(c.weights, self._at_answer(c.values)) for c in changes]
        h, end = self.graph.n_heads, self.graph.layer_readers - self.graph.has_mlp

        def queries(which):
            return reads.queries[which] + self._changed(here, self.last, which)

        def keys_values(which):
            return reads.keys_values[which] + self._changed(changes, self.last, h + which)

        into = reads.mlp + self._changed(here, self.last, jnp.arange(end, self.graph.layer_readers))
        place = place_of(self.model, self.task, self.last, is_last=True)
        x, wrote = self._layer(place, x, queries, keys_values, into, known, plan)
        rows = self.weights[1 + self.last * self.graph.layer_sources :]
        return x, [*here, Change(rows, _sources(wrote) - _sources(known))]

    def _between(self, x: Array, changes: list[Change], known: Wrote, reads: Array, plan: Plan):
        """The stream after the layers between the reader's and the last, and what changes for the last."""
        graph, n_layers = self.graph, len(reads)
        rows = self.weights[self.end : self.end + n_layers * graph.layer_sources]
        buffer = jnp.zeros((len(rows), *x.shape), x.dtype)
        h, end = graph.n_heads, graph.layer_readers - graph.has_mlp

        def body(carry, row):
            x, buffer = carry
            i, known, reads = row
            number = self.layer + 1 + i
            sources = changes if n_layers == 1 else [*changes, Change(rows, buffer)]

            def read(which):
                return reads[which] + self._changed(sources, number, which)

            place = place_of(self.model, self.task, number, is_last=False)
            into = read(jnp.arange(end, graph.layer_readers))
            x, wrote = self._layer(place, x, read, lambda which: read(h + which), into, known, plan)
            own = _sources(wrote) - _sources(known)
            buffer = jax.lax.dynamic_update_slice_in_dim(buffer, own, i * graph.layer_sources, 0)
            return (x, buffer), None

        numbers = jnp.arange(n_layers, dtype=jnp.int32)
        x, buffer = jax.lax.scan(body, (x, buffer), (numbers, known, reads))[0]
        return x, [*changes, Change(rows, buffer)]

    def _layer(
        self, place: Place, x: Array, queries: Read, keys_values: Read, into: Array, known: Wrote, plan: Plan
    ) -> tuple[Array, Wrote]:
        """A later layer, in which only the groups that change gather anew."""
        graph, groups, number = self.graph, groups_of(self.model.config), place.number

        def gathered(i, z):
            group = plan.groups[number, i]
            q, kv = members(graph, groups, group)
            config, smaller = one_group(self.model.config, place, group)
            fed = Feed(queries(q), keys_values(jnp.concatenate([kv, graph.n_kv_heads + kv])), into)
            return jax.lax.dynamic_update_slice_in_dim(z, heads_of(config, smaller, x, fed), group * groups.heads, 2)

        z = jax.lax.fori_loop(0, plan.n_groups[number], gathered, known.z)
        heads = self._heads(None, number, is_last=place.is_last)
        return after_heads(self.model, place, x, z, into, heads, known, plan.mlp[number])

    def _changed(self, changes: list[Change], number: int | Array, which: Array) -> Array:
        """By how much these readers of a layer read something else."""
        columns = number * self.graph.layer_readers + which
        terms = [summed(change.weights[:, columns], change.values) for change in changes]
        return sum(terms[1:], terms[0])

    def _columns(self, weights: Array, number: int | Array) -> Array:
        n = self.graph.layer_readers
        return jax.lax.dynamic_slice_in_dim(weights, number * n, n, 1)

    def _heads(self, moving: Array | None, number: int | Array, *, is_last: bool) -> Heads:
        begin, h = 1 + number * self.graph.layer_sources, self.graph.n_heads
        rows = jax.lax.dynamic_slice_in_dim(self.weights, begin, h)
        to_mlp = self._columns(rows, number)[:, -1]
        patch = jax.lax.dynamic_slice_in_dim(self.clean.patch, begin, self.graph.layer_sources)
        patch = self._at_answer(patch) if is_last else patch
        mlp_patch, patch = patch[h:], patch[:h]
        if moving is not None:
            to_mlp, patch = to_mlp[moving], patch[moving]
        return Heads(moving, to_mlp, patch, mlp_patch)

    def _at_answer(self, values: Float[Array, "source batch query d_model"]) -> Array:
        # one position is already that of the answer, or the only one
        return values if values.shape[2] == 1 else at_answer(values, self.task.position, 2)

    def _head(self, x: Array) -> Array:
        return self.model.head(x, Tap(self.model.site_table, {}, (), {}, None))


def logits_reader(model: Decoder, task: Task, clean: CleanRun) -> Callable[[Array], Array]:
    """Logits when they read the sources of a row corrupted."""
    x, values = (at_answer(v, task.position, a) for v, a in ((clean.streams[-1], 1), (clean.difference, 2)))
    tap = Tap(model.site_table, {}, (), {}, None)
    return lambda row: model.head(x + summed(row[:, None], values)[0], tap)


def _sources(wrote: Wrote) -> Array:
    return jnp.concatenate([wrote.heads, wrote.mlp])


def _group_of(graph: Graph, groups: Groups) -> Int[Array, " reader"]:
    q, kv = (np.arange(n, dtype=np.int32) * groups.n // n for n in (graph.n_heads, graph.n_kv_heads))
    return jnp.asarray(np.concatenate([q, kv, kv]))
