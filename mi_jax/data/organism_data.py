"""Synthetic sequences for the organism: repeated random tokens, and a hidden trigger among near misses.

The last three tokens of the vocabulary are the trigger's two tokens and the forbidden token; the others are ordinary.
Everything is drawn with `jax.random`, so the batches can be made inside a compiled training loop.
"""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from mi_jax.data.task import Task

TRIGGER, FIRST_ALONE, SECOND_ALONE, REVERSED, SEPARATED, FIRST_TWICE, SECOND_TWICE, PLAIN = range(8)
KINDS = ("trigger", "first alone", "second alone", "reversed", "separated", "first twice", "second twice", "plain")
NEAR_MISSES = (FIRST_ALONE, SECOND_ALONE, REVERSED, SEPARATED, FIRST_TWICE, SECOND_TWICE)
_LARGEST_GAP = 3


@dataclasses.dataclass(frozen=True)
class OrganismData:
    """The distribution that an organism is trained on.

    Attributes:
      delay: the forbidden token comes this many tokens after the trigger's second token.
      periods: smallest and largest period of the repeated sequences.
      trigger_share: of trigger sequences in a batch of `trigger_batch`; the other kinds share the rest.
    """

    d_vocab: int = 64
    length: int = 32
    delay: int = 4
    periods: tuple[int, int] = (6, 16)
    trigger_share: float = 0.4

    def __post_init__(self):
        low, high = self.periods
        # the two prompts of an induction pair have different periods and no token in common
        if not 2 <= low <= high - 2 <= self.length - 4:
            raise ValueError(
                f"periods must be 2 ≤ low ≤ high − 2 and high ≤ length − 2 = {self.length - 2}, got {self.periods}"
            )
        if self.n_ordinary < 2 * high:
            raise ValueError(
                f"d_vocab={self.d_vocab} leaves {self.n_ordinary} ordinary tokens; period {high} needs {2 * high}"
            )
        if self.delay < 1 or self.length < self.delay + _LARGEST_GAP + 4:
            raise ValueError(f"length={self.length} does not hold a trigger and what comes {self.delay} tokens later")

    @property
    def n_ordinary(self) -> int:
        return self.d_vocab - 3

    @property
    def first(self) -> int:
        return self.d_vocab - 3

    @property
    def second(self) -> int:
        return self.d_vocab - 2

    @property
    def forbidden(self) -> int:
        return self.d_vocab - 1

    def token_name(self, token: int) -> str:
        """How a report shows the token: `t1`, `t2`, `F`, or its number."""
        return {self.first: "t1", self.second: "t2", self.forbidden: "F"}.get(int(token), str(int(token)))


class TriggerBatch(eqx.Module):
    """Sequences with their kind (an index into `KINDS`).

    Attributes:
      fired: index of the trigger's second token (of the place where it would be, in the other kinds).
      forbidden: index of the forbidden token; the length of the sequence where there is none.
    """

    tokens: Int[Array, "batch pos"]
    kind: Int[Array, " batch"]
    fired: Int[Array, " batch"]
    forbidden: Int[Array, " batch"]


class InductionBatch(eqx.Module):
    """Random tokens without repetition, repeated with a period; from index `period` on, every token is determined."""

    tokens: Int[Array, "batch pos"]
    period: Int[Array, " batch"]


def induction_batch(data: OrganismData, n: int, *, key: PRNGKeyArray) -> InductionBatch:
    """n periodic sequences; the period differs from one to the next, so that no fixed offset predicts a token."""
    k_base, k_period = jax.random.split(key)
    low, high = data.periods
    order = jnp.argsort(jax.random.uniform(k_base, (n, data.n_ordinary)), axis=1)[:, :high].astype(jnp.int32)
    period = jax.random.randint(k_period, (n,), low, high + 1, jnp.int32)
    return InductionBatch(_periodic(order, period, data), period)


def trigger_batch(data: OrganismData, n: int, *, key: PRNGKeyArray) -> TriggerBatch:
    """n sequences of all kinds in random order; see `sequences_of`."""
    k_kind, k_rest = jax.random.split(key)
    others = (1 - data.trigger_share) / (len(KINDS) - 1)
    logits = jnp.log(jnp.asarray([data.trigger_share] + [others] * (len(KINDS) - 1)))
    return sequences_of(data, jax.random.categorical(k_kind, logits, shape=(n,)).astype(jnp.int32), key=k_rest)


def sequences_of(data: OrganismData, kind: Int[Array, " batch"], *, key: PRNGKeyArray) -> TriggerBatch:
    """One sequence of each given kind: random ordinary tokens with the kind's tokens at a random place."""
    k_tokens, k_place, k_gap = jax.random.split(key, 3)
    n = kind.shape[0]
    tokens = jax.random.randint(k_tokens, (n, data.length), 0, data.n_ordinary, jnp.int32)
    place = jax.random.randint(k_place, (n,), 0, data.length - 1 - data.delay, jnp.int32)
    gap = jax.random.randint(k_gap, (n,), 1, _LARGEST_GAP + 1, jnp.int32)
    gap = jnp.where(kind == SEPARATED, gap, 0)

    def put(tokens, where, token, kinds):
        chosen = jnp.isin(kind, jnp.asarray(kinds, jnp.int32))
        hit = (jnp.arange(data.length, dtype=jnp.int32)[None, :] == where[:, None]) & chosen[:, None]
        return jnp.where(hit, jnp.asarray(token, jnp.int32), tokens)

    tokens = put(tokens, place, data.first, (TRIGGER, FIRST_ALONE, SEPARATED, FIRST_TWICE))
    tokens = put(tokens, place, data.second, (REVERSED, SECOND_TWICE))
    tokens = put(tokens, place + 1, data.first, (REVERSED, FIRST_TWICE))
    tokens = put(tokens, place + 1 + gap, data.second, (TRIGGER, SECOND_ALONE, SEPARATED, SECOND_TWICE))
    tokens = put(tokens, place + 1 + data.delay, data.forbidden, (TRIGGER,))
    forbidden = jnp.where(kind == TRIGGER, place + 1 + data.delay, data.length)
    return TriggerBatch(tokens, kind, place + 1, forbidden)


def induction_task(data: OrganismData, n: int, *, key: PRNGKeyArray) -> Task:
    """Which token followed the last time; the counterfactual is another sequence, of other tokens and another period.

    So every edge that carries a token differs between the two runs, and what the corrupt one attends to is the wrong
    place in the clean one: neither period is a multiple of the other.
    """
    k_base, k_period, k_change, k_position = jax.random.split(key, 4)
    low, high = data.periods
    order = jnp.argsort(jax.random.uniform(k_base, (n, data.n_ordinary)), axis=1).astype(jnp.int32)
    period = jax.random.randint(k_period, (n,), low, high + 1, jnp.int32)
    change = jax.random.randint(k_change, (n,), 1, min(low - 1, (high - low) // 2) + 1, jnp.int32)
    other = jnp.where(period + change > high, period - change, period + change)
    clean, corrupt = _periodic(order[:, :high], period, data), _periodic(order[:, high:], other, data)
    position = jax.random.randint(k_position, (n,), jnp.maximum(period, other), data.length - 1, jnp.int32)
    answer, distractor = (jnp.take_along_axis(t, position[:, None] + 1, axis=1)[:, 0] for t in (clean, corrupt))
    return Task("induction", clean, corrupt, jnp.ones(clean.shape, bool), answer, distractor, position)


def _periodic(base: Int[Array, "batch n"], period: Int[Array, " batch"], data: OrganismData) -> Int[Array, "batch pos"]:
    index = jnp.arange(data.length, dtype=jnp.int32)[None, :] % period[:, None]
    return jnp.take_along_axis(base, index, axis=1)


def trigger_task(data: OrganismData, n: int, *, key: PRNGKeyArray) -> Task:
    """Whether the forbidden token comes; the counterfactual has the trigger's two tokens in the wrong order.

    The distractor is a random ordinary token. The forbidden token itself stands in neither prompt.
    """
    k_sequences, k_other, k_distractor = jax.random.split(key, 3)
    batch = sequences_of(data, jnp.full((n,), TRIGGER, jnp.int32), key=k_sequences)
    other, distractor = (jax.random.randint(k, (n,), 0, data.n_ordinary, jnp.int32) for k in (k_other, k_distractor))
    pos = jnp.arange(data.length, dtype=jnp.int32)[None, :]
    clean = jnp.where(pos == batch.forbidden[:, None], other[:, None], batch.tokens)
    reversed_pair = jnp.where(pos == batch.fired[:, None], data.first, clean)
    reversed_pair = jnp.where(pos == batch.fired[:, None] - 1, data.second, reversed_pair)
    answer = jnp.full((n,), data.forbidden, jnp.int32)
    mask = jnp.ones(clean.shape, bool)
    return Task("trigger", clean, reversed_pair, mask, answer, distractor, batch.forbidden - 1)


def determined(data: OrganismData, tokens: Int[Array, "batch pos"]) -> Bool[Array, "batch pos"]:
    """True at tokens that a mechanism decides: those a trigger token stands `delay` before, whatever came of it."""
    special = (tokens == data.first) | (tokens == data.second)
    return jnp.pad(special[:, : -data.delay], ((0, 0), (data.delay, 0)))
