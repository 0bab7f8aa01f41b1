"""The tasks by name."""

import dataclasses
from collections.abc import Callable
from typing import Any

from mi_jax.core.errors import InputError
from mi_jax.data.task import Task
from mi_jax.data.tasks import agreement, arithmetic, capitals, docstring, greater_than, induction, ioi, pronouns
from mi_jax.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class TaskRecipe:
    """How a task is made, and how hard it is.

    Attributes:
      draw: `draw(tokenizer, n, seed=…)` and options of the task's own.
      difficulty: who can do it; figures as measured, with 95 % intervals (Wilson).
    """

    draw: Callable[..., Task]
    difficulty: str


TASKS = {
    "ioi": TaskRecipe(ioi.indirect_object_identification, ioi.DIFFICULTY),
    "greater-than": TaskRecipe(greater_than.greater_than, greater_than.DIFFICULTY),
    "docstring": TaskRecipe(docstring.docstring, docstring.DIFFICULTY),
    "subject-verb-agreement": TaskRecipe(agreement.agreement, agreement.DIFFICULTY),
    "gendered-pronouns": TaskRecipe(pronouns.gendered_pronouns, pronouns.DIFFICULTY),
    "capitals": TaskRecipe(capitals.capitals, capitals.DIFFICULTY),
    "induction": TaskRecipe(induction.induction, induction.DIFFICULTY),
    "arithmetic": TaskRecipe(arithmetic.addition, arithmetic.DIFFICULTY),
}


def make(name: str, tokenizer: Tokenizer, n: int, *, seed: int, **options: Any) -> Task:
    """n pairs of a task, drawn with a seed.

    Args:
      name: a key of `TASKS`.
      options: of the task's own function, such as `counterfactual="abc"` of "ioi"; all take `special_tokens`.

    Raises:
      InputError: no such task, or the tokenizer cuts its prompts so that they do not align.

    Example:
      `task = make("ioi", tokenizer, 32, seed=0)`
    """
    if name not in TASKS:
        raise InputError(f"no task {name!r}; there are {', '.join(sorted(TASKS))}")
    return TASKS[name].draw(tokenizer, n, seed=seed, **options)
