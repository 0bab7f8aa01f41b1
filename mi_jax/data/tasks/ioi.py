"""Indirect object identification (Wang et al. 2022): "When A and B went to the store, B gave a drink to" → A.

The counterfactual changes the second subject. "swap" puts the other name there, so that the answer becomes B; "third"
puts a third name there, so that nothing tells the two apart.
"""

import string
from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
import numpy as np

from mi_jax.data.task import Task
from mi_jax.data.tokenizer import Tokenizer

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


def indirect_object_identification(
    tokenizer: Tokenizer,
    n: int,
    *,
    seed: int,
    templates: Sequence[str] = TEMPLATES,
    counterfactual: Literal["swap", "third"] = "swap",
) -> Task:
    """Draws n prompts, half of them with the indirect object named first, half second.

    Only names, places and things that are one token enter, so that clean and corrupt prompts align.

    Raises:
      ValueError: no template, or fewer than three names, are usable with this tokenizer.
    """
    names = [name for name in NAMES if len(tokenizer.encode(f" {name}")) == 1]
    places, things = ([w for w in words if len(tokenizer.encode(f" {w}")) == 1] for words in (PLACES, THINGS))
    if not templates or len(names) < 3 or not places or not things:
        raise ValueError(f"IOI needs a template, three one-token names, a place and a thing; the tokenizer has {names}")
    for template in templates:
        missing = {"a", "b", "s", "place", "thing"} - {field for _, field, _, _ in string.Formatter().parse(template)}
        if missing:
            raise ValueError(f"IOI template {template!r} lacks {', '.join(sorted(missing))}")
    rng = np.random.default_rng(seed)
    clean, corrupt, answers, distractors = [], [], [], []
    for i in range(n):
        io, subject, third = rng.choice(names, 3, replace=False)
        first, second = (io, subject) if i % 2 else (subject, io)
        words = {"a": first, "b": second, "place": rng.choice(places), "thing": rng.choice(things)}
        # consecutive pairs share a template, so that it is balanced over the two orders of the names
        template = templates[(i // 2) % len(templates)]
        clean.append(template.format(s=subject, **words))
        corrupt.append(template.format(s=io if counterfactual == "swap" else third, **words))
        answers.append(tokenizer.single(f" {io}"))
        distractors.append(tokenizer.single(f" {subject}"))
    clean_tokens, mask = tokenizer.batch(clean)
    corrupt_tokens, corrupt_mask = tokenizer.batch(corrupt)
    assert (mask == corrupt_mask).all()
    return Task(
        "ioi",
        clean=jnp.asarray(clean_tokens),
        corrupt=jnp.asarray(corrupt_tokens),
        mask=jnp.asarray(mask),
        answer=jnp.asarray(answers, jnp.int32),
        distractor=jnp.asarray(distractors, jnp.int32),
        position=jnp.asarray(mask.sum(1) - 1, jnp.int32),
    )
