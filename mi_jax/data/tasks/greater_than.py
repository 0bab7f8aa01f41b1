"""Greater-than (Hanna et al. 2023): "The war lasted from the year 1732 to the year 17" → any year above 32.

A tokenizer that cuts a year into two and two digits is asked for the last two, one that cuts every digit for the third
alone ("… from the year 1752 to the year 17" → a digit above 5, against one below). The counterfactual begins in a year
that ends in 01, after which nearly every year is right.
"""

from collections.abc import Iterator

import numpy as np

from mi_jax.core.errors import InputError
from mi_jax.data.task import Task
from mi_jax.data.tasks.prompts import Pair, draw_task, fill
from mi_jax.data.tokenizer import Tokenizer

NOUNS = (
    "war siege reign treaty empire dynasty project campaign expedition voyage rebellion occupation drought conflict "
    "construction investigation journey mission program partnership"
).split()
TEMPLATES = (
    "The {noun} lasted from the year {century}{year} to the year {again}",
    "The {noun} began in the year {century}{year} and ended in the year {again}",
    "The {noun} started in {century}{year} and finished in {again}",
)
CENTURIES = ("11", "12", "13", "14", "15", "16", "17", "18")
DIFFICULTY = (
    "SmolLM2-135M (120 pairs, seed 0; one digit is asked for): later years likelier than earlier ones in 1.000 "
    "[0.969, 1.000], by a difference of 0.65; chance 0.43 by the number of digits, the counterfactual 0.05. GPT-2 "
    "small does it with two digits (Hanna et al. 2023)."
)


def greater_than(tokenizer: Tokenizer, n: int, *, seed: int, special_tokens: bool = True) -> Task:
    """Years after the first against years before it; the metric is a difference of probabilities.

    Raises:
      InputError: the tokenizer cuts years neither into two and two digits nor into single ones.
    """
    digits = _digits(tokenizer)
    return draw_task(
        "greater-than",
        tokenizer,
        _pairs(np.random.default_rng(seed), digits),
        n,
        measure="probability-difference",
        difficulty=DIFFICULTY,
        special_tokens=special_tokens,
    )


def _digits(tokenizer: Tokenizer) -> int:
    """How many digits the token after the century has."""
    parts = [part.strip() for part in tokenizer.strings(tokenizer.encode("in the year 1742", special_tokens=False))]
    if parts[-2:] == ["17", "42"]:
        return 2
    if parts[-4:] == ["1", "7", "4", "2"]:
        return 1
    raise InputError(
        f"greater-than: this tokenizer cuts a year into {parts}; the task needs the two last digits as one token after "
        "the two first, or every digit as a token"
    )


def _pairs(rng: np.random.Generator, digits: int) -> Iterator[Pair]:
    scale = 10 ** (2 - digits)
    i = 0
    while True:
        # the first and the last of the years to come leave one of the two sides empty
        year, century = int(rng.integers(2 * scale, 99 - scale + 1)), str(rng.choice(CENTURIES))
        shared = {"noun": str(rng.choice(NOUNS)), "century": century, "again": century}
        template = i % len(TEMPLATES)
        texts = [f"{y:0{digits}d}" for y in range(10**digits)]
        cut = year // scale
        clean, corrupt = (fill(TEMPLATES[template], year=y, **shared) for y in (f"{year:02d}", "01"))
        # a year of the same token as the first may be above or below it
        below = texts[:cut] if digits == 1 else texts[: cut + 1]
        yield Pair(clean, corrupt, texts[cut + 1 :], below, {"YY": ("year", digits - 2)}, template)
        i += 1
