"""Capitals: "The capital of France is the city of" → " Paris" rather than the capital of another country."""

from collections.abc import Iterator

import numpy as np

from mi_jax.core.errors import InputError
from mi_jax.data.task import Task
from mi_jax.data.tasks.prompts import Pair, draw_task, fill, one_token
from mi_jax.data.tokenizer import Tokenizer

_CAPITALS = (
    "France Paris, Italy Rome, Germany Berlin, Spain Madrid, England London, Japan Tokyo, China Beijing, "
    "Russia Moscow, Egypt Cairo, Greece Athens, Austria Vienna, Poland Warsaw, Portugal Lisbon, Ireland Dublin, "
    "Sweden Stockholm, Norway Oslo, Denmark Copenhagen, Hungary Budapest, Cuba Havana, Peru Lima, Canada Ottawa, "
    "Iran Tehran, Iraq Baghdad, Syria Damascus, Israel Jerusalem, Lebanon Beirut, Turkey Ankara, Kenya Nairobi, "
    "Afghanistan Kabul, Scotland Edinburgh, Ukraine Kiev, Belgium Brussels, Finland Helsinki, Thailand Bangkok, "
    "Australia Canberra, Vietnam Hanoi, Indonesia Jakarta, Switzerland Bern, Libya Tripoli, Chile Santiago"
)
CAPITALS = tuple((a, b) for a, b in (pair.split() for pair in _CAPITALS.split(", ")))
TEMPLATES = (
    "The capital of {country} is the city of",
    "The capital city of {country} is",
    "Question: What is the capital of {country}?\nAnswer: The capital is",
    "She lives in {country}, in the capital city,",
)
DIFFICULTY = (
    "SmolLM2-135M (120 pairs, seed 0): the right capital above the other in 1.000 [0.969, 1.000], chance 0.5, and the "
    "top token in 0.82. The countries are well-known ones whose capital is one token."
)


def capitals(tokenizer: Tokenizer, n: int, *, seed: int, special_tokens: bool = True) -> Task:
    """The capital of a country against that of the country which the counterfactual names.

    Raises:
      InputError: fewer than two capitals are one token with this tokenizer.
    """
    usable = set(one_token(tokenizer, (capital for _, capital in CAPITALS)))
    known = [pair for pair in CAPITALS if pair[1] in usable]
    if len(known) < 2:
        raise InputError(f"capitals: {len(known)} of the capitals are one token with this tokenizer, two are needed")
    return draw_task(
        "capitals",
        tokenizer,
        _pairs(np.random.default_rng(seed), known),
        n,
        difficulty=DIFFICULTY,
        special_tokens=special_tokens,
    )


def _pairs(rng: np.random.Generator, known: list[tuple[str, str]]) -> Iterator[Pair]:
    i = 0
    while True:
        (country, capital), (other, wrong) = (known[j] for j in rng.choice(len(known), 2, replace=False))
        template = i % len(TEMPLATES)
        clean, corrupt = (fill(TEMPLATES[template], country=name) for name in (country, other))
        yield Pair(clean, corrupt, [f" {capital}"], [f" {wrong}"], {"COUNTRY": ("country", 0)}, template)
        i += 1
