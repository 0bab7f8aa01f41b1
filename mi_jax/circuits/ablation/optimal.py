"""Optimal ablation: the constants that leave a circuit as much as constants can (Li & Janson 2024).

Every source gets one vector, shared by all prompts and positions, and the vectors together minimise the loss of the
circuit whose other edges carry them. Means and zeros are points of the same space, so that no constant ablation leaves
the circuit less. That holds on the prompts of the fit: constants of a few prompts also fit what is particular to these,
so a circuit is measured on others (`held_out_constants`).
"""

import dataclasses
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float

from mi_jax.circuits.ablation.means import source_means
from mi_jax.circuits.graph import Graph
from mi_jax.circuits.runs.divergence import kl_divergence
from mi_jax.circuits.runs.masked import masked_forward
from mi_jax.core.errors import InputError
from mi_jax.data.task import Task
from mi_jax.models.decoder import Decoder

Loss = Callable[[Float[Array, "batch 1 d_vocab"], Float[Array, "batch 1 d_vocab"]], Float[Array, " batch"]]


@dataclasses.dataclass(frozen=True)
class OptimalAblation:
    """Fitted constants.

    Attributes:
      values: of every source.
      patch: the same, as a masked run takes them.
      losses: mean loss before every step, and after the last.
      loss: of `values`, the least of them.
    """

    values: Float[Array, "source d_model"]
    patch: Float[Array, "source batch pos d_model"]
    losses: Float[np.ndarray, " step"]
    loss: float


def optimal_ablation(
    model: Decoder,
    task: Task,
    circuit: Bool[np.ndarray, "source reader"] | None = None,
    *,
    loss: Loss = kl_divergence,
    steps: int = 100,
    learning_rate: float = 0.05,
    reference: Task | None = None,
) -> OptimalAblation:
    """Fits the ablation values of a circuit with Adam, from the means, on the prompts of `task`.

    Measure a circuit under these values on other prompts than those of the fit.

    Args:
      circuit: edges that keep what their sources write; None keeps no edge.
      loss: from the logits of the circuit and of the whole model on the clean prompts, at the position of the answer,
        to a number for every prompt.
      learning_rate: in units of the root mean square of what a source writes.
      reference: whose corrupt prompts the means are taken over; None is the task itself.

    Raises:
      InputError: a circuit of another shape, or no steps.
    """
    edges = Graph.of(model.config).edges
    circuit = np.zeros_like(edges) if circuit is None else circuit
    if circuit.shape != edges.shape:
        raise InputError(f"a circuit has shape {edges.shape} [source reader], got {circuit.shape}")
    if steps < 1:
        raise InputError(f"steps must be at least 1, got {steps}")
    corrupted = jnp.asarray(edges & ~circuit)
    values, losses = _fit(model, task, corrupted, reference or task, jnp.asarray(learning_rate), loss, steps)
    return OptimalAblation(values, _everywhere(model, values, task), np.asarray(losses), float(losses.min()))


def held_out_constants(
    model: Decoder, task: Task, reference: Task | None = None
) -> Float[Array, "source batch pos d_model"]:
    """Optimal values of the circuit without edges, of every prompt from a fit on other prompts.

    Args:
      reference: prompts of the fit. None: each half of the task (every other prompt) gets what is fitted on the other.

    Raises:
      InputError: a task of one prompt and no reference.
    """
    if reference is not None:
        return _everywhere(model, optimal_ablation(model, reference).values, task)
    if len(task) < 2:
        raise InputError(
            "optimal ablation values are fitted on other prompts than they are measured on; this task has one: give "
            "more prompts, or reference= prompts for the fit"
        )
    rows = np.arange(len(task))
    even, odd = (optimal_ablation(model, task[rows[rows % 2 == side]]).values for side in (0, 1))
    of_row = jnp.asarray(rows % 2 == 0)[None, :, None, None]
    first, second = (_everywhere(model, values, task) for values in (odd, even))
    return jnp.where(jnp.broadcast_to(of_row, first.shape), first, second)


def _everywhere(
    model: Decoder, values: Float[Array, "source d_model"], task: Task
) -> Float[Array, "source batch pos d_model"]:
    patch = jnp.broadcast_to(values[:, None, None], (len(values), *task.clean.shape, values.shape[-1]))
    return patch.astype(model.unembedding.dtype)


@eqx.filter_jit
def _fit(
    model: Decoder, task: Task, corrupted: Array, reference: Task, learning_rate: Array, loss: Loss, steps: int
) -> tuple[Array, Array]:
    means, size = source_means(model, reference)
    means = means[:, 0]
    dtype = model.unembedding.dtype
    weights = corrupted.astype(dtype)
    whole = model(task.clean, task.mask, output_pos=task.position)
    shape = (len(means), *task.clean.shape, means.shape[-1])
    optimizer = optax.adam(learning_rate.astype(means.dtype))

    def values_of(moved):
        return means + moved * size[:, None]

    def mean_loss(moved):
        patch = jnp.broadcast_to(values_of(moved)[:, None, None], shape).astype(dtype)
        logits = masked_forward(model, task.clean, weights, patch, task.mask, output_pos=task.position)
        return loss(logits, whole).mean()

    def step(carry, _):
        moved, state, best, least = carry
        now, gradient = jax.value_and_grad(mean_loss)(moved)
        best, least = _better(best, least, moved, now)
        # optax raises a float to an integer count of steps
        with jax.numpy_dtype_promotion("standard"):
            update, state = optimizer.update(gradient, state)
        return (moved + update, state, best, least), now

    still = jnp.zeros_like(means)
    carry = (still, optimizer.init(still), still, jnp.asarray(jnp.inf, means.dtype))
    (moved, _, best, least), losses = jax.lax.scan(step, carry, length=steps)
    end = mean_loss(moved)
    best, _ = _better(best, least, moved, end)
    return values_of(best), jnp.append(losses, end)


def _better(best: Array, least: Array, moved: Array, loss: Array) -> tuple[Array, Array]:
    return jnp.where(loss < least, moved, best), jnp.minimum(loss, least)
