"""Behaviours as code: prompts, counterfactuals and the metric."""

from mi_jax.data.tasks.agreement import Agreement as Agreement
from mi_jax.data.tasks.agreement import subject_verb_agreement as subject_verb_agreement
from mi_jax.data.tasks.ioi import indirect_object_identification as indirect_object_identification
from mi_jax.data.tasks.prompts import from_text as from_text
from mi_jax.data.tasks.registry import TASKS as TASKS
from mi_jax.data.tasks.registry import TaskRecipe as TaskRecipe
from mi_jax.data.tasks.registry import make as make
from mi_jax.data.tasks.repeats import repeated_tokens as repeated_tokens
