"""Losses of circuits that differ in what one reader reads, from the layer of that reader on.

Before it nothing is corrupted yet. What the present circuit computes there is computed once, and of each variant only
what differs from it: in the reader's layer the heads that the reader belongs to, in later layers the parts that
something leads to.
"""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mi_jax.circuits.answer import at_answer
from mi_jax.circuits.graph import Graph
from mi_jax.circuits.search.layers import (
    Feed,
    Heads,
    Wrote,
    after_heads,
    depend_on_each_other,
    feed,
    groups_of,
    heads_of,
    one_group,
    place_of,
    summed,
)
from mi_jax.circuits.search.objective import Loss
from mi_jax.circuits.sources import plain_run
from mi_jax.core.taps import Tap
from mi_jax.data.task import Task
from mi_jax.models.decoder import Decoder


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


class Written(NamedTuple):
    """Differences that some sources wrote, with the weights of their edges into every reader."""

    weights: Float[Array, "source reader"]
    values: Float[Array, "source batch query d_model"]


class Later(NamedTuple):
    """What the layers after one did; those between are stacked, and None where there is none."""

    between: Wrote | None
    last: Wrote | None


class Runs:
    """Runs of one circuit that are resumed at one layer.

    Args:
      removed: edges, none of which is read before `layer`.
      layer: that of the reader; the number of layers stands for the logits.
    """

    def __init__(
        self, model: Decoder, task: Task, clean: CleanRun, removed: Bool[Array, "source reader"], layer: int
    ):
        self.model, self.task, self.clean, self.layer = model, task, clean, layer
        self.graph = Graph.of(model.config)
        self.weights = removed.astype(clean.patch.dtype)
        self.last = self.graph.n_layers - 1
        self.first_own = 1 + layer * self.graph.layer_sources
        self.earlier = Written(self.weights[: self.first_own], clean.difference[: self.first_own])
        self.shared = depend_on_each_other(model.config)
        if layer <= self.last:
            self.place = place_of(model, task, layer, is_last=layer == self.last)
            self.x = clean.streams[layer]

    def logits_reader(self, loss: Loss) -> Callable[[Array], Array]:
        """The loss when the logits read the sources of a row corrupted."""
        x, values = (at_answer(v, self.task.position, a) for v, a in ((self.clean.streams[-1], 1), (self._all, 2)))
        return lambda row: loss(self._head(x + summed(row[:, None], values)[0]))

    @property
    def _all(self) -> Array:
        return self.clean.difference

    def mlp_reader(self, loss: Loss, changes: Bool[Array, "layer 2"]) -> Callable[[Array], Array]:
        """The loss when the MLP of the layer reads the sources of a row corrupted."""
        wrote, later, bases = self._present()
        bases = self._with(bases, self._own_heads(wrote, None))
        own = slice(self.first_own + self.graph.n_heads, self.first_own + self.graph.layer_sources)
        own_heads = slice(self.first_own, self.first_own + self.graph.n_heads)
        values = at_answer(self.earlier.values, self.task.position, 2) if self.place.is_last else self.earlier.values

        def run(row):
            into = summed(row[: self.first_own, None], values)
            heads = self._heads(None, self.layer, is_last=self.place.is_last)._replace(to_mlp=row[own_heads])
            x, new = after_heads(self.model, self.place, self.x, wrote.z, into, heads)
            return loss(self._rest(x, Written(self.weights[own], new.mlp), bases, later, changes)[0])

        return run

    def head_reader(
        self, loss: Loss, reader: Int[Array, ""], changes: Bool[Array, "layer 2"]
    ) -> Callable[[Array], Array]:
        """The loss when a query, key or value of the layer, by its number there, reads a row corrupted."""
        graph, groups, config = self.graph, groups_of(self.model.config), self.model.config
        h, kv = graph.n_heads, graph.n_kv_heads
        wrote, later, bases = self._present()
        numbers = jnp.concatenate(
            [jnp.full((h,), 0, jnp.int32), jnp.full((kv,), h, jnp.int32), jnp.full((kv,), h + kv, jnp.int32)]
        )
        sizes = [groups.heads] * h + [groups.kv_heads] * (2 * kv)
        group = (reader - numbers[reader]) // jnp.asarray(sizes, jnp.int32)[reader]
        queries = group * groups.heads + jnp.arange(groups.heads, dtype=jnp.int32)
        keys = h + group * groups.kv_heads + jnp.arange(groups.kv_heads, dtype=jnp.int32)
        columns = jnp.concatenate([queries, keys, keys + kv])
        read = self.weights[: self.first_own, self.layer * graph.layer_readers + columns]
        plain, chosen = summed(read, self.earlier.values), columns == reader
        smaller, place = one_group(config, self.place, group)
        moving = None if self.shared else queries
        if moving is not None:
            fixed = jnp.ones(h, bool).at[moving].set(False)
            bases = self._with(bases, self._own_heads(wrote, fixed))
        into = self._fixed_into_mlp(wrote, moving)
        g, k = groups.heads, groups.heads + 2 * groups.kv_heads
        own_heads = self.weights[self.first_own : self.first_own + h]
        own_mlp = self.weights[self.first_own + h : self.first_own + graph.layer_sources]
        own = jnp.concatenate([own_heads if moving is None else own_heads[moving], own_mlp])

        def run(row):
            changed = summed(row[: self.first_own, None], self.earlier.values)
            values = jnp.where(chosen[:, None, None, None], changed, plain)
            asking = at_answer(values[:g], self.task.position, 2) if place.is_last else values[:g]
            z = heads_of(smaller, place, self.x, Feed(asking, values[g:k], asking[:0]))
            z = z if groups.n == 1 else jax.lax.dynamic_update_slice_in_dim(wrote.z, z, group * g, 2)
            heads = self._heads(moving, self.layer, is_last=self.place.is_last)
            x, new = after_heads(self.model, self.place, self.x, z, into, heads, wrote, changes[self.layer, 1])
            mine = Written(own, jnp.concatenate([new.heads, new.mlp]))
            return loss(self._rest(x, mine, bases, later, changes)[0])

        return run

    def _columns(self, weights: Array, number: int | Array) -> Array:
        n = self.graph.layer_readers
        return jax.lax.dynamic_slice_in_dim(weights, number * n, n, 1)

    def _heads(self, moving: Array | None, number: int | Array, *, is_last: bool) -> Heads:
        begin, h = 1 + number * self.graph.layer_sources, self.graph.n_heads
        rows = jax.lax.dynamic_slice_in_dim(self.weights, begin, h)
        to_mlp = self._columns(rows, number)[:, -1]
        patch = jax.lax.dynamic_slice_in_dim(self.clean.patch, begin, self.graph.layer_sources)
        patch = at_answer(patch, self.task.position, 2) if is_last else patch
        mlp_patch, patch = patch[h:], patch[:h]
        return Heads(moving, *((v if moving is None else v[moving]) for v in (to_mlp, patch)), mlp_patch)

    def _own_heads(self, wrote: Wrote, which: Array | None) -> Written:
        rows = self.weights[self.first_own : self.first_own + self.graph.n_heads]
        return Written(rows if which is None else jnp.where(which[:, None], rows, 0), wrote.heads)

    def _fixed_into_mlp(self, wrote: Wrote, moving: Array | None) -> Array:
        """What the MLP of the layer reads of sources that do not change."""
        graph = self.graph
        if not graph.has_mlp:
            return wrote.mlp
        column = self._columns(self.earlier.weights, self.layer)[:, -1:]
        values = at_answer(self.earlier.values, self.task.position, 2) if self.place.is_last else self.earlier.values
        into = summed(column, values)
        if moving is None or graph.parallel:
            return into
        to_mlp = self._heads(None, self.layer, is_last=self.place.is_last).to_mlp.at[moving].set(0.0)
        return into + summed(to_mlp[:, None], wrote.heads)

    def _present(self) -> tuple[Wrote, Later, list]:
        """What the circuit itself does, and what the later layers read of earlier ones."""
        fed = feed(
            self.graph,
            self.task,
            self._columns(self.earlier.weights, self.layer),
            self.earlier.values,
            is_last=self.place.is_last,
        )
        z = heads_of(self.model.config, self.place, self.x, fed)
        x, wrote = after_heads(self.model, self.place, self.x, z, fed.mlp, self._heads(None, self.layer, is_last=self.place.is_last))
        bases = self._feeds(self.earlier)
        rows = self.weights[self.first_own : self.first_own + self.graph.layer_sources]
        mine = Written(rows, jnp.concatenate([wrote.heads, wrote.mlp]))
        return wrote, self._rest(x, mine, bases, None, None)[1], bases

    def _feeds(self, written: Written) -> list:
        """What layers between, the last one and the logits read of some sources."""
        between = None
        if self.layer + 1 < self.last:
            n = self.graph.layer_readers
            weights = written.weights[:, (self.layer + 1) * n : self.last * n]
            between = summed(weights, written.values).reshape(-1, n, *written.values.shape[1:])
        last = None
        if self.layer < self.last:
            last = feed(
                self.graph, self.task, self._columns(written.weights, self.last), written.values, is_last=True
            )
        values = written.values
        if values.shape[2] > 1 or not self.place.is_last:
            values = at_answer(values, self.task.position, 2)
        return [between, last, summed(written.weights[:, -1:], values)[0]]

    def _with(self, bases: list, written: Written) -> list:
        return jax.tree.map(jnp.add, bases, self._feeds(written))

    def _rest(
        self, x: Array, mine: Written, bases: list, known: Later | None, changes: Array | None
    ) -> tuple[Array, Later]:
        """The logits when some sources of the layer wrote this, and what later layers did."""
        between, last = None, None
        feeds = self._with(bases, mine)
        if self.layer + 1 < self.last:
            x, between, values = self._between(x, feeds[0], None if known is None else known.between, changes)
            begin = self.first_own + self.graph.layer_sources
            feeds = self._with_last(feeds, Written(self.weights[begin : begin + len(values)], values))
        if self.layer < self.last:
            wrote = None if known is None else known.last
            x, last = self._step(self.last, x, feeds[1], wrote, changes, is_last=True)
            values = jnp.concatenate([last.heads, last.mlp])
            begin = len(self.weights) - len(values)
            x = x + summed(self.weights[begin:, -1:], values)[0]
        return self._head(x + feeds[2]), Later(between, last)

    def _with_last(self, feeds: list, written: Written) -> list:
        last = feed(self.graph, self.task, self._columns(written.weights, self.last), written.values, is_last=True)
        logits = summed(written.weights[:, -1:], at_answer(written.values, self.task.position, 2))[0]
        return [None, jax.tree.map(jnp.add, feeds[1], last), feeds[2] + logits]

    def _between(self, x: Array, feeds: Array, known: Wrote | None, changes: Array | None):
        """The layers between the reader's and the last."""
        graph, begin = self.graph, self.first_own + self.graph.layer_sources
        n, per_layer, h, end = len(feeds), graph.layer_sources, graph.n_heads, graph.n_heads + 2 * graph.n_kv_heads
        rows = self.weights[begin : begin + n * per_layer]
        buffer = jnp.zeros((n * per_layer, *x.shape), x.dtype)

        def body(carry, row):
            x, buffer = carry
            i, base, wrote = row
            number = self.layer + 1 + i
            read = base if n == 1 else base + summed(self._columns(rows, number), buffer)
            x, wrote = self._step(number, x, Feed(read[:h], read[h:end], read[end:]), wrote, changes, is_last=False)
            own = jnp.concatenate([wrote.heads, wrote.mlp])
            return (x, jax.lax.dynamic_update_slice_in_dim(buffer, own, i * per_layer, 0)), wrote

        (x, buffer), wrote = jax.lax.scan(body, (x, buffer), (jnp.arange(n, dtype=jnp.int32), feeds, known))
        return x, wrote, buffer

    def _step(
        self, number: int | Array, x: Array, fed: Feed, known: Wrote | None, changes: Array | None, *, is_last: bool
    ) -> tuple[Array, Wrote]:
        place = place_of(self.model, self.task, number, is_last=is_last)
        heads = self._heads(None, number, is_last=is_last)
        if known is None or changes is None:
            z = heads_of(self.model.config, place, x, fed)
            return after_heads(self.model, place, x, z, fed.mlp, heads)
        z = jax.lax.cond(changes[number, 0], lambda: heads_of(self.model.config, place, x, fed), lambda: known.z)
        return after_heads(self.model, place, x, z, fed.mlp, heads, known, changes[number, 1])

    def _head(self, x: Array) -> Array:
        return self.model.head(x, Tap(self.model.site_table, {}, (), {}, None))
