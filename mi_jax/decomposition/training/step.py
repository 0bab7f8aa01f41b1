"""One training step, jitted: static shapes, nothing asked of the host."""

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from mi_jax.decomposition.activations import BatchTopK, JumpReLU, TopK
from mi_jax.decomposition.config import Objective
from mi_jax.decomposition.dictionary import Dictionary
from mi_jax.decomposition.initial import unit_rows
from mi_jax.decomposition.objective import Coefficients, Losses, in_turn, loss, without_dead
from mi_jax.decomposition.training.adam import adam_update
from mi_jax.decomposition.training.config import Knobs, TrainConfig, direction, rate
from mi_jax.decomposition.training.gradients import gradients
from mi_jax.decomposition.training.resample import resample
from mi_jax.decomposition.training.state import TrainState, knobs_of, trainable
from mi_jax.decomposition.training.threshold import running

METRICS = (
    "loss",
    "reconstruction",
    "penalty",
    "auxiliary",
    "fvu",
    "l0",
    "dead_fraction",
    "sparsity",
    "overflow",
    "rows",
)
# of the running mean that the controller reads
L0_DECAY = 0.95


def update(
    state: TrainState,
    knobs: Knobs,
    x: Float[Array, "token d_in"],
    y: Float[Array, "token d_out"],
    objective: Objective,
    train: TrainConfig,
    frozen_decoder: bool = False,
    valid: Bool[Array, " token"] | None = None,
) -> tuple[TrainState, dict[str, Array]]:
    """The state after one step on a batch of activations x and targets y, and the scalars that `METRICS` names.

    Every row that is `valid` has the same weight in training, whatever the other rows of its batch: the gradient is
    that of the mean over these rows times their share of the batch. Metrics are means over them.
    """
    dictionary = with_k(state, knobs, train)
    dead = in_turn(state.since_fired >= train.dead_after, objective.aux_candidates, state.step)
    coefficients = scheduled(state, knobs, objective, train)

    def loss_of(dictionary, places, few):
        aims = objective if few is not None else without_dead(objective)
        return loss(dictionary, x, y, dead, aims, coefficients, places, few, valid)

    total, parts, grads, fits = gradients(
        loss_of,
        dictionary,
        dictionary.choose(x, valid),
        bounded=bounded(dictionary),
        frozen_decoder=frozen_decoder,
        dead=(dead, objective),
        weight=None if valid is None else valid.mean(dtype=x.dtype),
    )
    sparsity = coefficients.sparsity
    state, metrics = descended(
        state, knobs, dictionary, grads, total, parts, y, sparsity, fits, train, frozen_decoder, valid
    )
    if train.resample_every and not frozen_decoder:
        state = resample(state, x, y, objective, train, valid)
    return state, metrics


def bounded(dictionary: Dictionary) -> bool:
    """Whether a batch may have more codes than there are places for."""
    return getattr(dictionary.activation, "max_active", None) is not None


def descended(
    state: TrainState,
    knobs: Knobs,
    dictionary: Any,
    grads: Any,
    total: Float[Array, ""],
    parts: Losses,
    y: Float[Array, "token *layer d_out"],
    sparsity: Float[Array, ""],
    fits: Bool[Array, ""],
    train: TrainConfig,
    frozen_decoder: bool = False,
    valid: Bool[Array, " token"] | None = None,
) -> tuple[TrainState, dict[str, Array]]:
    """The state after a step along any gradient of a dictionary or cross-layer transcoder, and its metrics.

    Args:
      state: before the step.
      knobs: the run's own numbers.
      dictionary: the state's, with this step's number of codes.
      grads: of the arrays that `trainable` names, None for the others.
      total, parts: the loss.
      y: what was predicted; the metric `fvu` compares with its variance, for which rows that are not valid count with
        that of normalised activations, so that a batch of one row has one as well.
      sparsity: λ of this step.
      fits: whether the codes had places enough.
      train: the schedule.
      frozen_decoder: leave the decoder as it is.
      valid: rows that have weight; None for all.
    """
    params, fixed = eqx.partition(dictionary, trainable(dictionary, frozen_decoder))
    if train.decoder == "unit" and not frozen_decoder:
        across = jax.tree.map(_across, grads.w_dec, dictionary.w_dec)
        grads = eqx.tree_at(lambda d: d.w_dec, grads, across)
    params, moments = _moved(params, grads, state, knobs, train)
    dictionary = eqx.combine(params, fixed)
    dictionary = _constrained(dictionary, parts, train, state.step, frozen_decoder)
    n, width = y.shape[0], y[0].size
    if valid is None:
        rows, share = jnp.asarray(n, y.dtype), 1.0
        centred = y - y.mean(0)[None]
        spread = (centred * centred).sum() / n
    else:
        rows = valid.sum(dtype=y.dtype)
        share, weight = rows / n, valid.astype(y.dtype)[:, None]
        centred = (y - ((y * weight).sum(0) / jnp.maximum(rows, 1.0))[None]) * weight
        spread = (centred * centred).sum() / n + (1.0 - share) * width
    # of a cross-layer transcoder: per token and layer
    l0 = parts.fired.sum().astype(y.dtype) / (jnp.maximum(rows, 1.0) * (width // y.shape[-1]))
    dead = state.since_fired >= train.dead_after
    metrics = {
        "loss": total,
        "reconstruction": parts.reconstruction,
        "penalty": parts.penalty,
        "auxiliary": parts.auxiliary,
        "fvu": parts.error / jnp.maximum(spread, 1e-30),
        "l0": l0,
        "dead_fraction": dead.mean(dtype=y.dtype),
        "sparsity": sparsity,
        "overflow": 1.0 - fits.astype(y.dtype),
        "rows": rows,
    }
    # no more than is asked for, so that a long training does not overflow
    tokens = jnp.minimum(state.since_fired, train.dead_after) + (n if valid is None else valid.sum(dtype=jnp.int32))
    since_fired = jnp.where(parts.fired > 0, 0, tokens)
    mean_l0 = jnp.where(state.step == 0, l0, state.l0 + (1 - L0_DECAY) * share * (l0 - state.l0))
    state = TrainState(
        dictionary=dictionary,
        optimiser=moments,
        step=state.step + 1,
        since_fired=since_fired,
        log_sparsity=_controlled(state, knobs, mean_l0, train),
        l0=mean_l0,
    )
    return state, metrics


@partial(jax.jit, static_argnames=("objective", "train", "frozen_decoder"), donate_argnames="state")
def train_step(
    state: TrainState,
    x: Float[Array, "token d_in"],
    y: Float[Array, "token d_out"] | None = None,
    *,
    objective: Objective,
    train: TrainConfig,
    knobs: Knobs | None = None,
    frozen_decoder: bool = False,
    valid: Bool[Array, " token"] | None = None,
) -> tuple[TrainState, dict[str, Array]]:
    """One optimiser step. `state` is donated: its buffers are gone after the call.

    Args:
      state: from `init_state`.
      x: activations that are read, normalised.
      y: what is predicted; None for x.
      objective: the loss.
      train: the schedule.
      knobs: the run's own numbers; those of the objective and the schedule if not given.
      frozen_decoder: leave the decoder as it is.
      valid: rows that have weight; None for all. A batch with few of them moves the dictionary by as much less.

    Returns:
      The new state and the scalars that `METRICS` names.
    """
    if knobs is None:
        knobs = knobs_of(getattr(state.dictionary.activation, "k", 1), objective, train)
    return update(state, knobs, x, x if y is None else y, objective, train, frozen_decoder, valid)


def _moved(params: PyTree, grads: PyTree, state: TrainState, knobs: Knobs, train: TrainConfig) -> tuple[PyTree, PyTree]:
    """Parameters and moments after one update."""
    step_size = knobs.learning_rate * jnp.asarray(rate(train)(state.step), jnp.float32)
    if train.optimiser == "adam" and train.clip is None:
        return adam_update(grads, state.optimiser, params, step_size, b1=train.b1, b2=train.b2)
    # optax raises its decay rates to the power of an integer count, which strict dtype promotion would refuse
    with jax.numpy_dtype_promotion("standard"):
        updates, moments = direction(train).update(grads, state.optimiser, params)
    return jax.tree.map(lambda p, u: p - step_size * u, params, updates), moments


def with_k(state: TrainState[Dictionary], knobs: Knobs, train: TrainConfig) -> Dictionary:
    """The dictionary with this step's number of codes."""
    activation = state.dictionary.activation
    if not isinstance(activation, TopK | BatchTopK) or activation.k_now is None:
        return state.dictionary
    k = knobs.k.astype(jnp.float32)
    if train.k_start is not None:
        done = jnp.minimum(state.step.astype(jnp.float32) / max(train.k_steps, 1), 1.0)
        k = train.k_start + (k - train.k_start) * done
    return eqx.tree_at(lambda d: d.activation.k_now, state.dictionary, jnp.round(k).astype(jnp.int32))


def scheduled(state: TrainState, knobs: Knobs, objective: Objective, train: TrainConfig) -> Coefficients:
    """The numbers of the loss at the state's step."""
    step = state.step.astype(jnp.float32)
    sparsity = knobs.sparsity * jnp.exp(state.log_sparsity)
    if train.sparsity_warmup_steps:
        sparsity = sparsity * jnp.minimum((step + 1) / train.sparsity_warmup_steps, 1.0)
    start = objective.p_start * train.steps
    done = jnp.clip((step - start) / max(train.steps - start, 1.0), 0.0, 1.0)
    return Coefficients(sparsity=sparsity, p=1.0 + (objective.p - 1.0) * done)


def _controlled(state: TrainState, knobs: Knobs, l0: Array, train: TrainConfig) -> Array:
    """Integral control: log λ moves by the gain times the logarithm of L0 / target."""
    if not train.control:
        return state.log_sparsity
    wrong = jnp.log(jnp.maximum(l0, 1e-3) / jnp.maximum(knobs.target_l0, 1e-3))
    return state.log_sparsity + train.control * jnp.clip(wrong, -1.0, 1.0)


def _across(g: Array, w: Array) -> Array:
    """A gradient without its part along each row of unit norm; a row has all axes but the first."""
    along = (g * w).reshape(w.shape[0], -1).sum(1)
    return g - along.reshape(-1, *(1,) * (w.ndim - 1)) * w


def _constrained(dictionary: Any, parts: Losses, train: TrainConfig, step: Array, frozen_decoder: bool) -> Any:
    """Unit rows, thresholds that are not negative, and BatchTopK's running threshold."""
    if train.decoder == "unit" and not frozen_decoder:
        units = jax.tree.map(lambda w: unit_rows(w.reshape(w.shape[0], -1)).reshape(w.shape), dictionary.w_dec)
        dictionary = eqx.tree_at(lambda d: d.w_dec, dictionary, units)
    activation = dictionary.activation
    if isinstance(activation, JumpReLU):
        return eqx.tree_at(lambda d: d.activation.threshold, dictionary, jnp.maximum(activation.threshold, 0.0))
    if isinstance(activation, BatchTopK):
        new = running(activation.threshold, parts.smallest, step, train.threshold_rate)
        return eqx.tree_at(lambda d: d.activation.threshold, dictionary, new)
    return dictionary
