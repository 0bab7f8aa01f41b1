"""Indirect object identification (Wang et al. 2022): "When A and B went to the store, B gave a drink to" → A.

The counterfactual changes the second subject. "swap" puts the other name there, so that the answer becomes B; "third"
puts a third name there, so that nothing tells the two apart. "abc" puts three other names in all places, as the paper's
own mean ablation does.
"""

import string
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from mi_jax.core.errors import InputError
from mi_jax.data.task import Task
from mi_jax.data.tasks.prompts import Pair, draw_task, fill, one_token
from mi_jax.data.tokenizer import Tokenizer

Counterfactual = Literal["swap", "third", "abc"]

TEMPLATES = (
    "When {a} and {b} went to the {place}, {s} gave a {thing} to",
    "After {a} and {b} arrived at the {place}, {s} handed a {thing} to",
    "While {a} and {b} were working at the {place}, {s} gave a {thing} to",
    "Then {a} and {b} had a long argument at the {place}, and {s} threw a {thing} to",
    "The {place} was quiet when {a} and {b} walked in, and {s} passed a {thing} to",
)
NAMES = (
    "Adam Alice Andrew Anna Ben Brian Carl Charles Chris Daniel David Emily Emma Eric Frank George Grace Henry Jack "
    "James Jane Jason John Julia Kate Kevin Laura Lisa Lucy Maria Mark Martin Mary Matthew Michael Paul Peter Rachel "
    "Robert Ruth Sam Sarah Simon Sophie Steve Susan Thomas Tom William"
).split()
PLACES = "store park school office garden station hospital restaurant library beach".split()
THINGS = "drink book ring letter ball key bottle map ticket coin".split()
DIFFICULTY = (
    "SmolLM2-135M (120 pairs, seed 0): the indirect object above the subject in 0.992 [0.954, 0.999], chance 0.5; with "
    "a third name as the second subject 0.49, with three other names 0.44. GPT-2 small does it (Wang et al. 2022)."
)


def indirect_object_identification(
    tokenizer: Tokenizer,
    n: int,
    *,
    seed: int,
    templates: Sequence[str] = TEMPLATES,
    counterfactual: Counterfactual = "swap",
    special_tokens: bool = True,
) -> Task:
    """Draws n prompts, half of them with the indirect object named first, half second.

    Only names, places and things that are one token enter, so that clean and corrupt prompts align. The roles are the
    paper's: IO, S1, S1+1 (the token after it), S2 and END.

    Raises:
      InputError: no template, or too few names, are usable with this tokenizer.
    """
    names, places, things = (one_token(tokenizer, words) for words in (NAMES, PLACES, THINGS))
    needed = 6 if counterfactual == "abc" else 3
    if counterfactual not in ("swap", "third", "abc"):
        raise InputError(f"IOI: no counterfactual {counterfactual!r}; there are 'swap', 'third' and 'abc'")
    if not templates or len(names) < needed or not places or not things:
        raise InputError(
            f"IOI needs a template, {needed} one-token names, a place and a thing; the tokenizer has {names}"
        )
    for template in templates:
        missing = {"a", "b", "s", "place", "thing"} - {field for _, field, _, _ in string.Formatter().parse(template)}
        if missing:
            raise InputError(f"IOI template {template!r} lacks {', '.join(sorted(missing))}")
    rng = np.random.default_rng(seed)
    pairs = _pairs(rng, (names, places, things), templates, counterfactual)
    return draw_task("ioi", tokenizer, pairs, n, difficulty=DIFFICULTY, special_tokens=special_tokens)


def _pairs(
    rng: np.random.Generator, words: Sequence[list[str]], templates: Sequence[str], counterfactual: Counterfactual
) -> Iterator[Pair]:
    names, places, things = words
    i = 0
    while True:
        drawn = rng.choice(names, 6 if counterfactual == "abc" else 3, replace=False)
        io, subject, third, *others = (str(name) for name in drawn)
        order = ("a", "b") if i % 2 else ("b", "a")
        shared = {"place": str(rng.choice(places)), "thing": str(rng.choice(things))}
        # consecutive pairs share a template, so that it is balanced over the two orders of the names
        number = (i // 2) % len(templates)
        first = dict(zip(order, (io, subject), strict=True))
        clean = fill(templates[number], s=subject, **first, **shared)
        if counterfactual == "abc":
            first = dict(zip(order, others[:2], strict=True))
        last = {"swap": io, "third": third, "abc": others[-1] if others else third}[counterfactual]
        corrupt = fill(templates[number], s=last, **first, **shared)
        roles = {"IO": (order[0], 0), "S1": (order[1], 0), "S1+1": (order[1], 1), "S2": ("s", 0)}
        yield Pair(clean, corrupt, [f" {io}"], [f" {subject}"], roles, number)
        i += 1
