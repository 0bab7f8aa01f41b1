"""Circuits by gradient descent: a random gate on every edge, trained to keep the output and to remove edges.

- `"edge-pruning"` (Bhaskar et al. 2024): hard-concrete gates and a target number of edges. With s the share of edges
  that are expected to be removed and t its target, the loss is `L + λ₁(t − s) + λ₂(t − s)²`, where λ₁ and λ₂ ascend the
  same loss and t grows linearly from 0 during the first part of the training.
- `"subnetwork-probing"` (Cao et al. 2021): hard-concrete gates and the loss `L + penalty · (1 − s)`.
- `"ugs"` (Li & Janson 2024): gates with uniform gradient sampling and the same loss.

L is the objective (`loss_of`). All of the training is one compiled program.
"""

import dataclasses
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from mi_jax.circuits.ablation.values import ablation_values
from mi_jax.circuits.graph import Graph
from mi_jax.circuits.graph.selection import select_edges
from mi_jax.circuits.runs.masked import masked_forward
from mi_jax.circuits.search.gates import hard_concrete, hard_concrete_open, uniform_gradient
from mi_jax.circuits.search.objective import Objective, check_objective, loss_of
from mi_jax.core.errors import InputError
from mi_jax.data.task import Task
from mi_jax.models.decoder import Decoder

MaskMethod = Literal["edge-pruning", "subnetwork-probing", "ugs"]
MASK_METHODS = ("edge-pruning", "subnetwork-probing", "ugs")


@dataclasses.dataclass(frozen=True)
class MaskTraining:
    """How gates are trained.

    Attributes:
      penalty: weight of the share of edges that are kept, for "subnetwork-probing" and "ugs", in the objective's unit.
      learning_rate: of the logits, by Adam; `multiplier_rate` of λ₁ and λ₂, by gradient ascent with Adam too.
      warmup: share of the steps in which the target of "edge-pruning" grows.
      samples: draws of all gates in a step.
      batch_size: prompts in a step, drawn anew each time; None takes all.
      initial_logit: of every gate; 2 keeps an edge with a probability of 0.88, or 0.97 for hard-concrete gates.
      by_position: a gate for every position at which an edge is read, too.
    """

    steps: int = 300
    penalty: float = 1.0
    learning_rate: float = 0.1
    multiplier_rate: float = 0.1
    warmup: float = 0.6
    samples: int = 1
    batch_size: int | None = None
    initial_logit: float = 2.0
    by_position: bool = False

    def __post_init__(self):
        if self.steps < 1 or self.samples < 1 or (self.batch_size is not None and self.batch_size < 1):
            raise InputError(
                f"steps, samples and batch_size are at least 1, got {self.steps}, {self.samples} and {self.batch_size}"
            )
        if not 0 < self.warmup <= 1:
            raise InputError(f"warmup is a share of the steps, above 0 and at most 1; got {self.warmup}")


@dataclasses.dataclass(frozen=True)
class LearnedMask:
    """Trained gates.

    Attributes:
      scores: the logit of every gate, `[source reader]` or `[source reader pos]`; above 0 where the edge is kept more
        often than not, and −∞ where no edge exists.
      losses: the objective in every step, of the drawn circuits.
      kept: the share of edges that were expected to be kept, in every step.
    """

    graph: Graph
    method: str
    scores: np.ndarray
    losses: np.ndarray
    kept: np.ndarray

    def mask(self, n: int | None = None) -> np.ndarray:
        """The edges with a logit above 0, or the n with the largest logits."""
        if n is None:
            return self.scores > 0
        return select_edges(self.graph, self.scores, n, absolute=False)


def learn_mask(
    model: Decoder,
    task: Task,
    *,
    method: MaskMethod = "edge-pruning",
    n_edges: int | None = None,
    config: MaskTraining | None = None,
    objective: Objective = "kl",
    ablation: str | Array = "resample",
    key: PRNGKeyArray,
) -> LearnedMask:
    """Trains a gate on every edge.

    Args:
      n_edges: how many edges "edge-pruning" is to keep; with `by_position`, counted at every position.
      objective: what the circuit is to keep low, see `loss_of`.
      ablation: what removed edges carry, see `ablation_values`.

    Raises:
      InputError: an unknown method or objective, or "edge-pruning" without a number of edges that the graph has.
    """
    check_objective(objective)
    config = MaskTraining() if config is None else config
    if method not in MASK_METHODS:
        raise InputError(f"method must be one of {', '.join(MASK_METHODS)}; got {method!r}")
    if config.batch_size is not None and config.batch_size > len(task):
        raise InputError(f"batch_size is {config.batch_size}, the task has {len(task)} prompts")
    graph = Graph.of(model.config)
    positions = task.clean.shape[1] if config.by_position else 1
    total = graph.n_edges * positions
    if method == "edge-pruning" and (n_edges is None or not 0 < n_edges < total):
        raise InputError(f"edge-pruning needs n_edges, between 1 and {total - 1}; got {n_edges}")
    target = jnp.asarray(1 - (n_edges or 0) / total, jnp.float32)
    patch = ablation_values(model, task, ablation)
    logits, losses, kept = _train(model, task, patch, target, key, method, objective, config)
    exists = graph.edges[:, :, None] if config.by_position else graph.edges
    return LearnedMask(graph, method, np.where(exists, logits, -np.inf), np.asarray(losses), np.asarray(kept))


@eqx.filter_jit
def _train(
    model: Decoder,
    task: Task,
    patch: Float[Array, "source batch pos d_model"],
    target: Float[Array, ""],
    key: PRNGKeyArray,
    method: MaskMethod,
    objective: Objective,
    config: MaskTraining,
) -> tuple[Array, Array, Array]:
    graph = Graph.of(model.config)
    shape = (*graph.edges.shape, task.clean.shape[1]) if config.by_position else graph.edges.shape
    exists = jnp.broadcast_to(jnp.asarray(graph.edges).reshape(*graph.edges.shape, *(1,) * (len(shape) - 2)), shape)
    full = model(task.clean, task.mask, output_pos=task.position)
    draw, chance = (uniform_gradient, jax.nn.sigmoid) if method == "ugs" else (hard_concrete, hard_concrete_open)

    def total_loss(params, step, key):
        logits, multipliers = params
        rows, gates = jax.random.split(key)
        some, values, reference = task, patch, full
        if config.batch_size is not None:
            chosen = jax.random.choice(rows, len(task), (config.batch_size,), replace=False)
            some, reference = jax.tree.map(lambda a: a[chosen], (task, full))
            values = patch[:, chosen]
        loss = loss_of(objective, some, reference)

        def one(key):
            gate = jnp.where(exists, draw(logits, key=key), 1).astype(patch.dtype)
            return loss(masked_forward(model, some.clean, 1 - gate, values, some.mask, output_pos=some.position))

        objective_value = jax.vmap(one)(jax.random.split(gates, config.samples)).mean()
        kept = jnp.where(exists, chance(logits), 0).sum() / exists.sum().astype(logits.dtype)
        if method == "edge-pruning":
            short = target * jnp.minimum(1, (step + 1) / (config.warmup * config.steps)) - (1 - kept)
            size = multipliers[0] * short + multipliers[1] * jnp.square(short)
        else:
            size = config.penalty * kept
        return objective_value + size, (objective_value, kept)

    descend = optax.adam(config.learning_rate)
    ascend = optax.chain(optax.scale(-1.0), optax.adam(config.multiplier_rate))

    def step(carry, row):
        params, state = carry
        (_, seen), gradients = jax.value_and_grad(total_loss, has_aux=True)(params, *row)
        # optax raises a float to an integer count of steps
        with jax.numpy_dtype_promotion("standard"):
            moved, first = descend.update(gradients[0], state[0])
            raised, second = ascend.update(gradients[1], state[1])
        return (jax.tree.map(jnp.add, params, (moved, raised)), (first, second)), seen

    params = (jnp.full(shape, config.initial_logit, jnp.float32), jnp.zeros(2, jnp.float32))
    state = (descend.init(params[0]), ascend.init(params[1]))
    steps = jnp.arange(config.steps, dtype=jnp.float32)
    (params, _), (losses, kept) = jax.lax.scan(step, (params, state), (steps, jax.random.split(key, config.steps)))
    return params[0], losses, kept
