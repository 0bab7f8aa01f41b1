"""The decisions about the edges into one reader, one after the other, in windows that are evaluated at once."""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mi_jax.circuits.graph import Graph
from mi_jax.circuits.search.objective import Objective, loss_of
from mi_jax.circuits.search.resume import CleanRun, Plan, Present, Runs, logits_reader
from mi_jax.data.task import Task
from mi_jax.models.decoder import Decoder

# Stands for all edges into the reader.
WHOLE = -1


class Decided(NamedTuple):
    """Which edges into a reader are removed now, what each candidate cost, the loss, and how it was found."""

    row: Bool[Array, " source"]
    costs: Float[Array, " candidate"]
    loss: Float[Array, ""]
    runs: Int[Array, ""]
    rounds: Int[Array, ""]


@eqx.filter_jit
def decided(
    model: Decoder,
    task: Task,
    clean: CleanRun,
    removed: Bool[Array, "source reader"],
    reader: Int[Array, ""],
    candidates: Int[Array, " candidate"],
    n: Int[Array, ""],
    loss: Float[Array, ""],
    threshold: Float[Array, ""],
    absolute: Bool[Array, ""],
    now: Present | None,
    plan: Plan,
    *,
    layer: int,
    into_head: bool,
    objective: Objective,
    window: int,
) -> Decided:
    """Tries to remove the first n candidates, sources or `WHOLE`, from what a reader of a layer reads.

    Args:
      loss: of the circuit so far.
      now: what the circuit computes from the layer on; None for the logits.
      layer: of the reader; the number of layers stands for the logits.
    """
    graph, measure = Graph.of(model.config), loss_of(objective, task, clean.logits)
    if now is None:
        logits = logits_reader(model, task, clean)
    else:
        runs = Runs(model, task, clean, removed, layer)
        local = reader - layer * graph.layer_readers
        logits = runs.head_reader(local, now, plan) if into_head else runs.mlp_reader(now, plan)
    losses = jax.vmap(lambda row: measure(logits(row.astype(clean.patch.dtype))))
    exists = jnp.asarray(graph.edges)[:, reader]
    return _windows(losses, removed[:, reader], exists, candidates, n, loss, threshold, absolute, window)


@eqx.filter_jit
def present(model: Decoder, task: Task, clean: CleanRun, removed: Bool[Array, "source reader"], layer: int) -> Present:
    """What a circuit computes from a layer on."""
    return Runs(model, task, clean, removed, layer).present()


def _windows(
    losses: Callable[[Array], Array],
    row: Array,
    exists: Array,
    candidates: Array,
    n: Array,
    loss: Array,
    threshold: Array,
    absolute: Array,
    window: int,
) -> Decided:
    size, offsets = len(candidates), jnp.arange(window, dtype=jnp.int32)
    # room behind the last candidate, so that a window may reach beyond it
    padded = jnp.concatenate([candidates, jnp.full((window,), size, candidates.dtype)])

    def step(state):
        start, guesses, decided = state
        sources = jax.lax.dynamic_slice_in_dim(padded, start, window)
        guessed = jax.lax.dynamic_slice_in_dim(guesses, start, window)
        added = (jax.nn.one_hot(sources, len(exists), dtype=bool) | (sources == WHOLE)[:, None]) & exists[None]
        # the circuits that candidates meet if those before them are decided as guessed
        taken = jnp.where(guessed[:, None], added, False)
        tried = decided.row[None] | added | jnp.cumsum(taken, 0, dtype=jnp.int32).astype(bool)
        values = losses(tried)
        known = jnp.concatenate([decided.loss[None], values])
        met = jax.lax.cummax(jnp.where(guessed, offsets + 1, 0))
        before = known[jnp.concatenate([jnp.zeros((1,), jnp.int32), met[:-1]])]
        costs = values - before
        removable = jnp.where(absolute, jnp.abs(costs), costs) < threshold
        right = jnp.cumprod(removable == guessed, dtype=jnp.int32).astype(bool)
        valid = start + offsets < n
        counts = valid & jnp.concatenate([jnp.ones((1,), bool), right[:-1]])
        done = counts & removable
        latest = jnp.where(done, offsets + 1, 0).max()
        old = jax.lax.dynamic_slice_in_dim(decided.costs, start, window)
        new = Decided(
            decided.row | (added & done[:, None]).any(0),
            jax.lax.dynamic_update_slice_in_dim(decided.costs, jnp.where(counts, costs, old), start, 0),
            jnp.where(latest > 0, values[latest - 1], decided.loss),
            decided.runs + valid.sum(dtype=jnp.int32),
            decided.rounds + 1,
        )
        guesses = jax.lax.dynamic_update_slice_in_dim(guesses, jnp.where(valid, removable, True), start, 0)
        return start + counts.sum(dtype=jnp.int32), guesses, new

    zero = jnp.zeros((), jnp.int32)
    begin = Decided(row, jnp.zeros(size + window, loss.dtype), loss, zero, zero)
    guesses = jnp.ones(size + window, bool)
    _, _, found = jax.lax.while_loop(lambda state: state[0] < n, step, (zero, guesses, begin))
    return found
