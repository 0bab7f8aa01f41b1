"""Subject–verb agreement: "The keys to the cabinet" → " are" rather than " is"."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from mi_jax.data.task import Task
from mi_jax.data.tokenizer import Tokenizer

_NOUNS = (
    "author authors, boy boys, dog dogs, doctor doctors, driver drivers, farmer farmers, friend friends, girl girls, "
    "guard guards, key keys, lawyer lawyers, player players, pilot pilots, teacher teachers, student students, "
    "worker workers"
)
_VERBS = ((" is", " are"), (" has", " have"), (" was", " were"))
NOUNS = tuple((a, b) for a, b in (pair.split() for pair in _NOUNS.split(", ")))
_ATTRACTORS = NOUNS[::-1]


class Agreement(NamedTuple):
    """Two difficulties: the noun alone, and the noun with another of the opposite number in between."""

    simple: Task
    attractor: Task


def subject_verb_agreement(tokenizer: Tokenizer) -> Agreement:
    """All nouns, both numbers, each verb; the counterfactual has the subject in the other number.

    Only nouns whose two forms are one token each enter.

    Raises:
      ValueError: none is.
    """
    nouns = [pair for pair in NOUNS if all(len(tokenizer.encode(f" {noun}")) == 1 for noun in pair)]
    if not nouns:
        raise ValueError("subject–verb agreement: no noun of the list is one token with this tokenizer")
    rows = {"simple": [], "attractor": []}
    for i, pair in enumerate(nouns):
        for number in (0, 1):
            for verb in _VERBS:
                other = _ATTRACTORS[i % len(_ATTRACTORS)][1 - number]
                answer, distractor = (tokenizer.single(verb[n]) for n in (number, 1 - number))
                for name, tail in (("simple", ""), ("attractor", f" near the {other}")):
                    prompts = [f"The {pair[n]}{tail}" for n in (number, 1 - number)]
                    rows[name].append((*prompts, answer, distractor))
    return Agreement(*(_task(tokenizer, f"agreement-{name}", row) for name, row in rows.items()))


def _task(tokenizer: Tokenizer, name: str, rows: list[tuple[str, str, int, int]]) -> Task:
    clean, corrupt, answer, distractor = zip(*rows, strict=True)
    clean_tokens, mask = tokenizer.batch(clean)
    corrupt_tokens, corrupt_mask = tokenizer.batch(corrupt)
    aligned = (mask == corrupt_mask).all(1)
    columns = (clean_tokens, corrupt_tokens, mask, np.array(answer), np.array(distractor), mask.sum(1) - 1)
    clean_tokens, corrupt_tokens, mask, answer, distractor, position = (column[aligned] for column in columns)
    return Task(
        name,
        clean=jnp.asarray(clean_tokens),
        corrupt=jnp.asarray(corrupt_tokens),
        mask=jnp.asarray(mask),
        answer=jnp.asarray(answer, jnp.int32),
        distractor=jnp.asarray(distractor, jnp.int32),
        position=jnp.asarray(position, jnp.int32),
    )
