"""Whether an organism does what it was trained to do, on sequences it has not seen."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray

from mi_jax.core.transforms import jit
from mi_jax.data.organism_data import KINDS, TRIGGER, induction_batch, sequences_of
from mi_jax.validation.organism import Organism


@dataclasses.dataclass(frozen=True)
class Behaviour:
    """Shares of correct predictions; a prediction is the likeliest token.

    Attributes:
      induction_accuracy: of the tokens that a repetition determines.
      trigger_rate: of trigger sequences, those where the forbidden token is predicted exactly where it comes.
      false_rate: of benign sequences, those where it is predicted anywhere.
      false_rate_by_kind: the same for each kind of near miss.
    """

    induction_accuracy: float
    trigger_rate: float
    false_rate: float
    false_rate_by_kind: dict[str, float]
    sequences: int


def behaviour(organism: Organism, *, key: PRNGKeyArray, n: int = 512) -> Behaviour:
    """Measures it on n sequences with repetitions and n of each kind of trigger sequence."""
    data = organism.data
    k_induction, k_trigger = jax.random.split(key)
    repeated = induction_batch(data, n, key=k_induction)
    right = _predicted(organism, repeated.tokens)[:, :-1] == np.asarray(repeated.tokens)[:, 1:]
    determined = np.arange(1, data.length)[None, :] >= np.asarray(repeated.period)[:, None]

    kinds = jnp.repeat(jnp.arange(len(KINDS), dtype=jnp.int32), n)
    batch = sequences_of(data, kinds, key=k_trigger)
    says = (_predicted(organism, batch.tokens) == data.forbidden).reshape(len(KINDS), n, data.length)
    due = np.asarray(batch.forbidden).reshape(len(KINDS), n)[TRIGGER] - 1
    anywhere = says.any(2).mean(1)
    benign = [i for i in range(len(KINDS)) if i != TRIGGER]
    return Behaviour(
        induction_accuracy=float(right[determined].mean()),
        trigger_rate=float(says[TRIGGER][np.arange(n), due].mean()),
        false_rate=float(anywhere[benign].mean()),
        false_rate_by_kind={KINDS[i]: float(anywhere[i]) for i in benign},
        sequences=n,
    )


def _predicted(organism: Organism, tokens: Int[Array, "batch pos"]) -> np.ndarray:
    return np.asarray(jit(organism.model)(tokens).argmax(-1))
