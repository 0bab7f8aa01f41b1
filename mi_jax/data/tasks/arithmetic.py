"""Arithmetic: "5+2=7, 1+3=4, 3+4=" → "7", two solved sums and one to solve, with sums of one token.

The counterfactual changes one operand of the last sum.
"""

from collections.abc import Iterator

import numpy as np

from mi_jax.core.errors import InputError
from mi_jax.data.task import Task
from mi_jax.data.tasks.prompts import Pair, draw_task, fill
from mi_jax.data.tokenizer import Tokenizer

_SOLVED = ("{a0}+{b0}={c0}\n{a1}+{b1}={c1}\n", "{a0}+{b0}={c0}, {a1}+{b1}={c1}, ")
TEMPLATES = tuple(solved + "{a}+{b}=" for solved in _SOLVED)
DIFFICULTY = (
    "SmolLM2-135M (120 pairs, seed 0, sums up to 9): the sum above the other in 0.933 [0.874, 0.966], chance 0.5, the "
    "counterfactual 0.13; the top token in 0.55. Small models add small numbers only."
)


def addition(
    tokenizer: Tokenizer, n: int, *, seed: int, largest: int | None = None, special_tokens: bool = True
) -> Task:
    """The sum against the sum that the counterfactual asks for.

    Args:
      largest: the largest sum; as much as is one token, up to 99, if not given.

    Raises:
      InputError: `largest` is below 3, or sums are not one token.
    """
    if largest is None:
        whole = len(tokenizer.encode("1+1=42")) == len(tokenizer.encode("1+1=4"))
        largest = 99 if whole else 9
    if largest < 3:
        raise InputError(f"arithmetic: largest={largest}; sums go up to 3 at least, so that two of them differ")
    return draw_task(
        "arithmetic",
        tokenizer,
        _pairs(np.random.default_rng(seed), largest),
        n,
        difficulty=DIFFICULTY,
        special_tokens=special_tokens,
    )


def _pairs(rng: np.random.Generator, largest: int) -> Iterator[Pair]:
    i = 0
    while True:
        sums = rng.integers(2, largest + 1, 3)
        a = [int(rng.integers(1, total)) for total in sums]
        solved, asked = {}, (a[2], int(sums[2]))
        for j in (0, 1):
            solved |= {f"a{j}": str(a[j]), f"b{j}": str(sums[j] - a[j]), f"c{j}": str(sums[j])}
        right = int(sums[2])
        wrong = a[2] + int(rng.integers(1, largest - a[2] + 1))
        # a sum that is solved above would only have to be copied
        if wrong != right and asked not in [(a[j], int(sums[j])) for j in (0, 1)]:
            template = i % len(TEMPLATES)
            clean, corrupt = (
                fill(TEMPLATES[template], a=str(a[2]), b=str(total - a[2]), **solved) for total in (right, wrong)
            )
            yield Pair(clean, corrupt, [str(right)], [str(wrong)], {"A": ("a", 0), "B": ("b", 0)}, template)
            i += 1
