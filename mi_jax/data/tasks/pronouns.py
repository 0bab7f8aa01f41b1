"""Gendered pronouns (Mathwin et al. 2023): "So Anna is such a good friend, isn't" → " she" rather than " he"."""

from collections.abc import Iterator

import numpy as np

from mi_jax.core.errors import InputError
from mi_jax.data.task import Task
from mi_jax.data.tasks.prompts import Pair, draw_task, fill, one_token
from mi_jax.data.tokenizer import Tokenizer

FEMALE = (
    "Alice Anna Emily Emma Grace Jane Julia Kate Laura Lisa Lucy Maria Mary Rachel Ruth Sarah Sophie Susan Helen Karen "
    "Linda Nancy Barbara Jennifer Jessica Elizabeth Margaret Michelle Rebecca Catherine"
).split()
MALE = (
    "Adam Andrew Ben Brian Carl Charles Daniel David Eric Frank George Henry Jack James Jason John Kevin Mark Martin "
    "Matthew Michael Paul Peter Robert Simon Steve Thomas Tom William Richard"
).split()
TEMPLATES = (
    "So {name} is such a good {noun}, isn't",
    "{Opening}, {name} was a very kind {noun}, wasn't",
    "The {noun} is called {name}, and I think",
    "My {noun} {name} is tired, because",
)
NOUNS = "friend teacher doctor student cook driver writer singer lawyer worker player neighbor".split()
_OPENINGS = ("Yes", "Well", "Indeed")
DIFFICULTY = (
    "SmolLM2-135M (120 pairs, seed 0): the pronoun of the name above the other in 1.000 [0.969, 1.000], chance 0.5. "
    "The last two wordings leave room for other words: the pronoun is the top token in 0.49."
)


def gendered_pronouns(tokenizer: Tokenizer, n: int, *, seed: int, special_tokens: bool = True) -> Task:
    """The pronoun of the name against the other one; the counterfactual has a name of the other gender.

    Raises:
      InputError: no female or no male name is one token with this tokenizer.
    """
    female, male = one_token(tokenizer, FEMALE), one_token(tokenizer, MALE)
    if not female or not male:
        raise InputError(
            f"gendered pronouns: {len(female)} female and {len(male)} male names are one token with this tokenizer; "
            "the task needs one of each"
        )
    return draw_task(
        "gendered-pronouns",
        tokenizer,
        _pairs(np.random.default_rng(seed), female, male),
        n,
        difficulty=DIFFICULTY,
        special_tokens=special_tokens,
    )


def _pairs(rng: np.random.Generator, female: list[str], male: list[str]) -> Iterator[Pair]:
    i = 0
    while True:
        names = [str(rng.choice(female)), str(rng.choice(male))]
        pronouns = [" she", " he"]
        shared = {"noun": str(rng.choice(NOUNS)), "Opening": str(rng.choice(_OPENINGS))}
        # consecutive pairs share a template, so that it is balanced over the two genders
        gender, template = i % 2, (i // 2) % len(TEMPLATES)
        clean, corrupt = (fill(TEMPLATES[template], name=names[g], **shared) for g in (gender, 1 - gender))
        yield Pair(clean, corrupt, [pronouns[gender]], [pronouns[1 - gender]], {"NAME": ("name", 0)}, template)
        i += 1
