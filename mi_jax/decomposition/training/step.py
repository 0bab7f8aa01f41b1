"""One training step, jitted: static shapes, nothing asked of the host."""

import dataclasses
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
from mi_jax.decomposition.objective import Coefficients, Losses, add_at, dead_latents, in_turn, loss, reads_dead
from mi_jax.decomposition.training.adam import adam_update
from mi_jax.decomposition.training.config import TrainConfig, direction, rate
from mi_jax.decomposition.training.resample import resample
from mi_jax.decomposition.training.state import TrainState, trainable
from mi_jax.decomposition.training.threshold import running

METRICS = ("loss", "reconstruction", "penalty", "auxiliary", "fvu", "l0", "dead_fraction", "sparsity", "overflow")
# of the running mean that the controller reads
L0_DECAY = 0.95


def update(
    state: TrainState,
    x: Float[Array, "token d_in"],
    y: Float[Array, "token d_out"],
    objective: Objective,
    train: TrainConfig,
    frozen_decoder: bool = False,
) -> tuple[TrainState, dict[str, Array]]:
    """The state after one step on a batch of activations x and targets y, and the scalars that `METRICS` names."""
    mask = trainable(state.dictionary, frozen_decoder)
    dictionary = with_k(state, train)
    params, fixed = eqx.partition(dictionary, mask)
    dead = in_turn(state.since_fired >= train.dead_after, objective.aux_candidates, state.step)
    coefficients = scheduled(state, objective, train)

    def plain(params, chosen, objective):
        def of(params):
            return loss(eqx.combine(params, fixed), x, y, dead, objective, coefficients, chosen)

        return jax.value_and_grad(of, has_aux=True)(params)

    def with_dead(params, chosen):
        # dead latents are few: their gradient is added to the rows that they are, not as arrays of the whole size
        few, few_fixed = eqx.partition(dead_latents(dictionary, dead, objective), mask)

        def of(both):
            part = eqx.combine(both[1], few_fixed)
            return loss(eqx.combine(both[0], fixed), x, y, dead, objective, coefficients, chosen, part)

        value, (grads, some) = jax.value_and_grad(of, has_aux=True)((params, few))
        return value, add_at(grads, some, dead, objective)

    def value_and_grad(params, chosen):
        if not reads_dead(objective):
            return plain(params, chosen, objective)
        # most steps have no dead latent, and then a program without the term
        quiet = dataclasses.replace(objective, auxiliary="none")
        return jax.lax.cond(dead.any(), lambda p: with_dead(p, chosen), lambda p: plain(p, chosen, quiet), params)

    chosen = dictionary.choose(x)
    if chosen is None:
        (total, parts), grads = value_and_grad(params, None)
        fits = jnp.array(True)
    elif getattr(dictionary.activation, "max_active", None) is None:
        (total, parts), grads = value_and_grad(params, chosen)
        fits = chosen.fits
    else:
        # the rare batch with more codes than places is computed densely, to the same numbers
        fits = chosen.fits
        (total, parts), grads = jax.lax.cond(
            fits, lambda p: value_and_grad(p, chosen), lambda p: value_and_grad(p, None), params
        )

    sparsity = coefficients.sparsity
    state, metrics = descended(state, dictionary, grads, total, parts, y, sparsity, fits, train, frozen_decoder)
    if train.resample_every and not frozen_decoder:
        state = resample(state, x, y, objective, train)
    return state, metrics


def descended(
    state: TrainState,
    dictionary: Any,
    grads: Any,
    total: Float[Array, ""],
    parts: Losses,
    y: Float[Array, "token *layer d_out"],
    sparsity: Float[Array, ""],
    fits: Bool[Array, ""],
    train: TrainConfig,
    frozen_decoder: bool = False,
) -> tuple[TrainState, dict[str, Array]]:
    """The state after a step along any gradient of a dictionary or cross-layer transcoder, and its metrics.

    Args:
      state: before the step.
      dictionary: the state's, with this step's number of codes.
      grads: of the arrays that `trainable` names, None for the others.
      total, parts: the loss.
      y: what was predicted; the metric `fvu` compares with its variance.
      sparsity: λ of this step.
      fits: whether the codes had places enough.
      train: the schedule.
      frozen_decoder: leave the decoder as it is.
    """
    params, fixed = eqx.partition(dictionary, trainable(dictionary, frozen_decoder))
    if train.decoder == "unit" and not frozen_decoder:
        across = jax.tree.map(_across, grads.w_dec, dictionary.w_dec)
        grads = eqx.tree_at(lambda d: d.w_dec, grads, across)
    params, moments = _moved(params, grads, state, train)
    dictionary = eqx.combine(params, fixed)
    dictionary = _constrained(dictionary, parts, train, state.step, frozen_decoder)
    # of a cross-layer transcoder: per token and layer
    l0 = parts.fired.sum() / (y.size // y.shape[-1])
    centred = y - y.mean(0)[None]
    dead = state.since_fired >= train.dead_after
    metrics = {
        "loss": total,
        "reconstruction": parts.reconstruction,
        "penalty": parts.penalty,
        "auxiliary": parts.auxiliary,
        "fvu": parts.error / jnp.maximum((centred * centred).sum() / y.shape[0], 1e-30),
        "l0": l0,
        "dead_fraction": dead.mean(dtype=y.dtype),
        "sparsity": sparsity,
        "overflow": 1.0 - fits.astype(y.dtype),
    }
    # no more than is asked for, so that a long training does not overflow
    tokens = jnp.minimum(state.since_fired, train.dead_after) + y.shape[0]
    since_fired = jnp.where(parts.fired > 0, 0, tokens)
    mean_l0 = jnp.where(state.step == 0, l0, L0_DECAY * state.l0 + (1 - L0_DECAY) * l0)
    state = TrainState(
        dictionary=dictionary,
        optimiser=moments,
        step=state.step + 1,
        since_fired=since_fired,
        log_sparsity=_controlled(state, mean_l0, train),
        l0=mean_l0,
        knobs=state.knobs,
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
    frozen_decoder: bool = False,
) -> tuple[TrainState, dict[str, Array]]:
    """One optimiser step. `state` is donated: its buffers are gone after the call.

    Args:
      state: from `init_state`.
      x: activations that are read, normalised.
      y: what is predicted; None for x.
      objective: the loss.
      train: the schedule.
      frozen_decoder: leave the decoder as it is.

    Returns:
      The new state and the scalars that `METRICS` names.
    """
    return update(state, x, x if y is None else y, objective, train, frozen_decoder)


def _moved(params: PyTree, grads: PyTree, state: TrainState, train: TrainConfig) -> tuple[PyTree, PyTree]:
    """Parameters and moments after one update."""
    step_size = state.knobs.learning_rate * jnp.asarray(rate(train)(state.step), jnp.float32)
    if train.optimiser == "adam" and train.clip is None:
        return adam_update(grads, state.optimiser, params, step_size, b1=train.b1, b2=train.b2)
    # optax raises its decay rates to the power of an integer count, which strict dtype promotion would refuse
    with jax.numpy_dtype_promotion("standard"):
        updates, moments = direction(train).update(grads, state.optimiser, params)
    return jax.tree.map(lambda p, u: p - step_size * u, params, updates), moments


def with_k(state: TrainState[Dictionary], train: TrainConfig) -> Dictionary:
    """The dictionary with this step's number of codes."""
    activation = state.dictionary.activation
    if not isinstance(activation, TopK | BatchTopK) or activation.k_now is None:
        return state.dictionary
    k = state.knobs.k.astype(jnp.float32)
    if train.k_start is not None:
        done = jnp.minimum(state.step.astype(jnp.float32) / max(train.k_steps, 1), 1.0)
        k = train.k_start + (k - train.k_start) * done
    return eqx.tree_at(lambda d: d.activation.k_now, state.dictionary, jnp.round(k).astype(jnp.int32))


def scheduled(state: TrainState, objective: Objective, train: TrainConfig) -> Coefficients:
    """The numbers of the loss at the state's step."""
    step = state.step.astype(jnp.float32)
    sparsity = state.knobs.sparsity * jnp.exp(state.log_sparsity)
    if train.sparsity_warmup_steps:
        sparsity = sparsity * jnp.minimum((step + 1) / train.sparsity_warmup_steps, 1.0)
    start = objective.p_start * train.steps
    done = jnp.clip((step - start) / max(train.steps - start, 1.0), 0.0, 1.0)
    return Coefficients(sparsity=sparsity, p=1.0 + (objective.p - 1.0) * done)


def _controlled(state: TrainState, l0: Array, train: TrainConfig) -> Array:
    """Integral control: log λ moves by the gain times the logarithm of L0 / target."""
    if not train.control:
        return state.log_sparsity
    wrong = jnp.log(jnp.maximum(l0, 1e-3) / jnp.maximum(state.knobs.target_l0, 1e-3))
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
