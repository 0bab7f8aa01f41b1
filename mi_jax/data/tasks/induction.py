"""Induction (Olsson et al. 2022): "… star jury rain hot … jury rain" → " hot", what followed the last time.

A list of random words, then a piece of it again. The counterfactual repeats another piece, so another word follows.
"""

from collections.abc import Iterator

import numpy as np

from mi_jax.core.errors import InputError
from mi_jax.data.task import Task
from mi_jax.data.tasks.prompts import Pair, draw_task, fill, one_token
from mi_jax.data.tokenizer import Tokenizer

WORDS = (
    "apple arm bank bed bird blue boat book box boy bread bus car cat chair city coat cold corn cup day desk dog door "
    "drum ear egg eye face farm fire fish flag foot fork game gold grass green hall hand hat head hill horse hot house "
    "ice iron jury key king lake lamp leaf leg lion map milk moon nail neck nose oil page pen pig pipe poem port rain "
    "red ring road rock roof room rope rose salt sand sea ship shoe sky snow soap song soup star sun tail tea tent "
    "tree truck wall watch wave wind wine wolf wood wool yard"
).split()
DIFFICULTY = (
    "SmolLM2-135M (120 pairs, seed 0, lists of 10 words, 3 repeated): the word that followed above the other in 0.858 "
    "[0.785, 0.910], chance 0.5, the counterfactual 0.11. Longer pieces are easier."
)


def induction(
    tokenizer: Tokenizer, n: int, *, seed: int, length: int = 10, repeated: int = 3, special_tokens: bool = True
) -> Task:
    """The word that followed the last time against the one that followed what the counterfactual repeats.

    Args:
      length: words of the list.
      repeated: words of the piece that comes again.

    Raises:
      InputError: the list is too short for two pieces, or longer than the words that are one token.
    """
    words = one_token(tokenizer, WORDS)
    if not 1 <= repeated <= length - 2 or length > len(words):
        raise InputError(
            f"induction: length={length}, repeated={repeated}; this tokenizer has {len(words)} of the words as one "
            "token, so length is at most that, and repeated from 1 to length − 2"
        )
    return draw_task(
        "induction",
        tokenizer,
        _pairs(np.random.default_rng(seed), words, length, repeated),
        n,
        difficulty=DIFFICULTY,
        special_tokens=special_tokens,
    )


def _pairs(rng: np.random.Generator, words: list[str], length: int, repeated: int) -> Iterator[Pair]:
    template = " ".join(f"{{w{j}}}" for j in range(length + repeated))
    while True:
        listed = [str(word) for word in rng.choice(words, length, replace=False)]
        start, other = (int(s) for s in rng.choice(length - repeated, 2, replace=False))
        clean, corrupt = (
            fill(template, **{f"w{j}": w for j, w in enumerate([*listed, *listed[s : s + repeated]])})
            for s in (start, other)
        )
        answer, wrong = (f" {listed[s + repeated]}" for s in (start, other))
        # where the answer stood the first time: an induction head of the last token attends there
        yield Pair(clean, corrupt, [answer], [wrong], {"FIRST+1": (f"w{start + repeated}", 0)})
