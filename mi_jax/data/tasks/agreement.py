"""Subject–verb agreement: "The keys to the cabinet" → " are" rather than " is"."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mi_jax.core.errors import InputError
from mi_jax.data.task import Task
from mi_jax.data.tasks.prompts import Pair, draw_task, fill, one_token
from mi_jax.data.tokenizer import Tokenizer

_NOUNS = (
    "author authors, boy boys, dog dogs, doctor doctors, driver drivers, farmer farmers, friend friends, girl girls, "
    "guard guards, key keys, lawyer lawyers, player players, pilot pilots, teacher teachers, student students, "
    "worker workers"
)
_VERBS = ((" is", " are"), (" has", " have"), (" was", " were"))
NOUNS = tuple((a, b) for a, b in (pair.split() for pair in _NOUNS.split(", ")))
# a subject alone, and with a noun of the other number between it and the verb
TEMPLATES = {
    "simple": "The {subject}",
    "near": "The {subject} near the {other}",
    "with": "The {subject} with the {other}",
    "subject relative": "The {subject} that met the {other}",
    "object relative": "The {subject} that the {other} met",
}
# the variants that a small model can do
DEFAULT = ("simple", "near", "with", "object relative")
DIFFICULTY = (
    "SmolLM2-135M (120 pairs of each variant, seed 0), chance 0.5: simple 0.975 [0.929, 0.991], near 0.900 "
    "[0.833, 0.942], with 0.975 [0.929, 0.991], object relative 0.800 [0.720, 0.862], subject relative 0.525 "
    "[0.436, 0.612], which it cannot do."
)


class Agreement(NamedTuple):
    """Two difficulties: the noun alone, and the noun with another of the opposite number in between."""

    simple: Task
    attractor: Task


def subject_verb_agreement(tokenizer: Tokenizer) -> Agreement:
    """All nouns, both numbers, each verb; the counterfactual has the subject in the other number.

    Only nouns whose two forms are one token each enter.

    Raises:
      InputError: none is.
    """
    nouns = _nouns(tokenizer)
    n = len(nouns) * 2 * len(_VERBS)
    tasks = []
    for name, template in (("simple", "simple"), ("attractor", "near")):
        pairs = (
            _pair(nouns, i, number, verb, template)
            for i in range(len(nouns))
            for number in (0, 1)
            for verb in range(len(_VERBS))
        )
        tasks.append(draw_task(f"agreement-{name}", tokenizer, pairs, n, difficulty=DIFFICULTY))
    return Agreement(*tasks)


def agreement(
    tokenizer: Tokenizer,
    n: int,
    *,
    seed: int,
    variants: Sequence[str] = DEFAULT,
    special_tokens: bool = True,
) -> Task:
    """n prompts drawn from the variants, which are the keys of `TEMPLATES`; otherwise as `subject_verb_agreement`.

    Raises:
      InputError: no such variant, or no noun of which both forms are one token.
    """
    unknown = [variant for variant in variants if variant not in TEMPLATES]
    if unknown or not variants:
        raise InputError(f"agreement: no variants {unknown}; there are {', '.join(TEMPLATES)}")
    nouns, rng = _nouns(tokenizer), np.random.default_rng(seed)

    def pairs() -> Iterator[Pair]:
        i = 0
        while True:
            noun, verb = int(rng.integers(len(nouns))), int(rng.integers(len(_VERBS)))
            # consecutive pairs share a variant, so that it is balanced over the two numbers
            yield _pair(nouns, noun, i % 2, verb, variants[(i // 2) % len(variants)])
            i += 1

    name = "subject-verb-agreement"
    return draw_task(name, tokenizer, pairs(), n, difficulty=DIFFICULTY, special_tokens=special_tokens)


def _nouns(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    nouns = [pair for pair in NOUNS if len(one_token(tokenizer, pair)) == 2]
    if not nouns:
        raise InputError("subject–verb agreement: no noun of the list is one token in both numbers with this tokenizer")
    return nouns


def _pair(nouns: list[tuple[str, str]], i: int, number: int, verb: int, variant: str) -> Pair:
    words = {"other": NOUNS[::-1][i % len(NOUNS)][1 - number]}
    clean, corrupt = (fill(TEMPLATES[variant], subject=nouns[i][k], **words) for k in (number, 1 - number))
    roles = {"SUBJECT": ("subject", 0)}
    answer, distractor = _VERBS[verb][number], _VERBS[verb][1 - number]
    return Pair(clean, corrupt, [answer], [distractor], roles, list(TEMPLATES).index(variant))
