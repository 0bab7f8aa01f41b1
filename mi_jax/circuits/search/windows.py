"""Decisions about the edges into one reader, one after the other, in windows that are evaluated at once.

Each edge of a window is tried in the circuit that it would meet if the decisions before it were as guessed. Up to and
including the first wrong guess these are the runs that the sequential rule makes; the rest is evaluated again in the
next window, with what was just measured as the guess.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Stands for all edges into the reader.
WHOLE = -1


class Decided(NamedTuple):
    """Which sources are removed now, what each candidate cost, the loss, and how it was found."""

    removed: Bool[Array, " source"]
    costs: Float[Array, " candidate"]
    loss: Float[Array, ""]
    runs: Int[Array, ""]
    rounds: Int[Array, ""]


def in_windows(
    losses: Callable[[Bool[Array, "window source"]], Float[Array, " window"]],
    exists: Bool[Array, " source"],
    candidates: Int[Array, " candidate"],
    n: Int[Array, ""],
    loss: Float[Array, ""],
    threshold: Float[Array, ""],
    absolute: Bool[Array, ""],
    window: int,
) -> Decided:
    """Decides about the first n candidates in turn.

    Args:
      losses: of the circuits without these sources of the reader.
      exists: the sources that have an edge into the reader.
      loss: of the circuit so far.
      absolute: compare the size of the change of the loss.
    """
    size, offsets = len(candidates), jnp.arange(window, dtype=jnp.int32)
    # room behind the last candidate, so that a window may reach beyond it
    padded = jnp.concatenate([candidates, jnp.full((window,), size, candidates.dtype)])

    def step(state):
        start, guesses, decided = state
        sources = jax.lax.dynamic_slice_in_dim(padded, start, window)
        guessed = jax.lax.dynamic_slice_in_dim(guesses, start, window)
        added = (jax.nn.one_hot(sources, len(exists), dtype=bool) | (sources == WHOLE)[:, None]) & exists[None]
        taken = jnp.where(guessed[:, None], added, False)
        values = losses(decided.removed[None] | added | jnp.cumsum(taken, 0, dtype=jnp.int32).astype(bool))
        # the loss that each candidate meets: after the last one before it that is guessed to be removed
        known = jnp.concatenate([decided.loss[None], values])
        met = jax.lax.cummax(jnp.where(guessed, offsets + 1, 0))
        costs = values - known[jnp.concatenate([jnp.zeros((1,), jnp.int32), met[:-1]])]
        removable = jnp.where(absolute, jnp.abs(costs), costs) < threshold
        right = jnp.cumprod(removable == guessed, dtype=jnp.int32).astype(bool)
        valid = start + offsets < n
        counts = valid & jnp.concatenate([jnp.ones((1,), bool), right[:-1]])
        done = counts & removable
        latest = jnp.where(done, offsets + 1, 0).max()
        old = jax.lax.dynamic_slice_in_dim(decided.costs, start, window)
        new = Decided(
            decided.removed | (added & done[:, None]).any(0),
            jax.lax.dynamic_update_slice_in_dim(decided.costs, jnp.where(counts, costs, old), start, 0),
            jnp.where(latest > 0, values[latest - 1], decided.loss),
            decided.runs + valid.sum(dtype=jnp.int32),
            decided.rounds + 1,
        )
        guesses = jax.lax.dynamic_update_slice_in_dim(guesses, jnp.where(valid, removable, True), start, 0)
        return start + counts.sum(dtype=jnp.int32), guesses, new

    zero = jnp.zeros((), jnp.int32)
    costs = jnp.zeros(size + window, loss.dtype)
    begin = Decided(jnp.zeros_like(exists), costs, loss, zero, zero)
    return jax.lax.while_loop(lambda s: s[0] < n, step, (zero, jnp.ones(size + window, bool), begin))[2]
