"""What a search tries to keep low: the distance of a circuit's output from the model's, or the loss of the metric."""

from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from mi_jax.circuits.runs.divergence import kl_divergence
from mi_jax.core.errors import InputError
from mi_jax.core.precision import widened
from mi_jax.data.task import Task

Objective = Literal["kl", "metric", "squared"]
OBJECTIVES = ("kl", "metric", "squared")
Loss = Callable[[Array], Float[Array, ""]]


def loss_of(objective: Objective, task: Task, full: Float[Array, "batch 1 d_vocab"]) -> Loss:
    """From the logits of a circuit at `task.position` to one number that is low where the circuit is good.

    - `"kl"`: `KL(model ‖ circuit)` in nats, averaged over the prompts; not defined where the model is so certain that
      a token's probability is 0.
    - `"metric"`: minus the mean metric of the task.
    - `"squared"`: the squared difference of the logits, averaged over prompts and vocabulary.

    Args:
      full: logits of the whole model.
    """
    if objective == "kl":
        return lambda logits: kl_divergence(logits, full).mean()
    if objective == "metric":
        return lambda logits: -task.metric(logits).mean()
    return lambda logits: jnp.square(widened(logits) - widened(full)).mean()


def check_objective(objective: str) -> None:
    """Raises `InputError` for an objective that does not exist."""
    if objective not in OBJECTIVES:
        raise InputError(f"objective must be one of {', '.join(OBJECTIVES)}; got {objective!r}")
