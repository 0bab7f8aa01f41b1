"""Training a sparse autoencoder on activations that are held in memory.

Batch t is a function of (key, t) alone: the order of an epoch is a permutation drawn from `fold_in(key, epoch)`. Many
steps run per compiled call, so the host is not asked anything between them.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from mi_jax.decomposition.sae import SAE, SAEConfig, init, loss, unit_rows


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Schedule of one training run.

    Attributes:
      steps: optimiser steps in all.
      batch_size: tokens per step.
      learning_rate: peak of the schedule, for activations of unit mean square.
      warmup_steps: steps of linear rise from zero.
      decay_fraction: last part of the run, over which the rate falls linearly to zero.
      b1, b2: decay rates of Adam's moments.
      dead_after: steps without firing after which a latent counts as dead.
      steps_per_call: optimiser steps per compiled call, at most.
      sample_init: decoder rows start at activations, not at random directions.
    """

    steps: int = 1000
    batch_size: int = 2048
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    decay_fraction: float = 0.5
    b1: float = 0.9
    b2: float = 0.999
    dead_after: int = 100
    steps_per_call: int = 50
    sample_init: bool = True


METRICS = ("loss", "reconstruction", "auxiliary", "l0", "dead_fraction")


class TrainState(eqx.Module):
    """Everything that a step changes; saved and restored, it goes on to the same numbers."""

    sae: SAE
    optimiser: optax.OptState
    step: Int[Array, ""]
    since_fired: Int[Array, " d_sae"]


def optimiser(config: TrainConfig) -> optax.GradientTransformation:
    """Adam with linear warm-up, a constant rate, and linear decay to zero."""
    decay = max(1, round(config.decay_fraction * config.steps))
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps),
            optax.constant_schedule(config.learning_rate),
            optax.linear_schedule(config.learning_rate, 0.0, decay),
        ],
        [config.warmup_steps, max(config.warmup_steps, config.steps - decay)],
    )
    return optax.adam(schedule, b1=config.b1, b2=config.b2)


def trainable(sae: SAE, frozen_decoder: bool) -> SAE:
    """A tree of booleans: which arrays the optimiser sees."""
    return eqx.tree_at(lambda s: s.w_dec, jax.tree.map(lambda _: True, sae), not frozen_decoder)


def init_state(sae: SAE, config: TrainConfig, *, frozen_decoder: bool = False) -> TrainState:
    moments = optimiser(config).init(eqx.filter(sae, trainable(sae, frozen_decoder)))
    zero = jnp.zeros((), jnp.int32)
    # donated buffers must be distinct, and a fresh dictionary's encoder is its decoder
    return jax.tree.map(jnp.copy, TrainState(sae, moments, zero, jnp.zeros(sae.b_enc.shape, jnp.int32)))


def update(state: TrainState, batch: Array, sae_config: SAEConfig, config: TrainConfig, frozen: bool):
    """One step; returns the new state and a dictionary of scalars."""
    params, fixed = eqx.partition(state.sae, trainable(state.sae, frozen))
    dead = state.since_fired >= config.dead_after

    def objective(params):
        return loss(eqx.combine(params, fixed), batch, dead, sae_config)

    (total, parts), grads = jax.value_and_grad(objective, has_aux=True)(params)
    updates, moments = optimiser(config).update(grads, state.optimiser, params)
    sae = eqx.combine(optax.apply_updates(params, updates), fixed)
    if not frozen:
        sae = eqx.tree_at(lambda s: s.w_dec, sae, unit_rows(sae.w_dec))
    since_fired = jnp.where(parts.fired > 0, 0, state.since_fired + 1)
    metrics = {
        "loss": total,
        "reconstruction": parts.reconstruction,
        "auxiliary": parts.auxiliary,
        "l0": parts.fired.sum() / batch.shape[0],
        "dead_fraction": dead.mean(dtype=batch.dtype),
    }
    return TrainState(sae, moments, state.step + 1, since_fired), metrics


train_step = jax.jit(update, static_argnames=("sae_config", "config", "frozen"), donate_argnames="state")


@partial(jax.jit, static_argnames=("sae_config", "config", "frozen"), donate_argnames="state")
def train_steps(
    state: TrainState,
    activations: Float[Array, "n d_model"],
    order: Int[Array, " n"],
    scale: Float[Array, ""],
    n_steps: Int[Array, ""],
    *,
    sae_config: SAEConfig,
    config: TrainConfig,
    frozen: bool = False,
) -> tuple[TrainState, dict[str, Array]]:
    """`n_steps` steps of the epoch whose order is given, and the mean of their metrics. `n_steps` does not recompile."""
    per_epoch = activations.shape[0] // config.batch_size

    def body(_, carry):
        state, sums = carry
        start = state.step % per_epoch * config.batch_size
        batch = activations[jax.lax.dynamic_slice_in_dim(order, start, config.batch_size)] * scale
        state, metrics = update(state, batch, sae_config, config, frozen)
        return state, jax.tree.map(jnp.add, sums, metrics)

    sums = dict.fromkeys(METRICS, jnp.zeros((), activations.dtype))
    state, sums = jax.lax.fori_loop(0, n_steps, body, (state, sums))
    return state, jax.tree.map(lambda total: total / n_steps, sums)


def fit(
    activations: Float[Array, "n d_model"],
    sae_config: SAEConfig,
    config: TrainConfig,
    *,
    key: Array,
    progress: Callable[[int, dict[str, float]], None] | None = None,
    frozen_decoder: bool = False,
) -> tuple[SAE, list[dict[str, float]]]:
    """Trains a dictionary; returns it in the units of `activations`, and the metrics of every compiled call."""
    n, d_model = activations.shape
    k_init, k_order = jax.random.split(key)
    k_direction, k_sample = jax.random.split(k_init)
    mean, scale = normalisation(activations)
    samples = None
    if config.sample_init and not frozen_decoder:
        chosen = jax.random.choice(k_sample, n, (sae_config.d_sae,), replace=n < sae_config.d_sae)
        samples = activations[chosen] * scale
    sae = init(sae_config, key=k_direction, mean=mean * scale, samples=samples)
    sae = match_size(sae, activations[: config.batch_size] * scale)
    state = init_state(sae, config, frozen_decoder=frozen_decoder)

    history, per_epoch, step, order = [], n // config.batch_size, 0, None
    while step < config.steps:
        if order is None or step % per_epoch == 0:
            order = jax.random.permutation(jax.random.fold_in(k_order, step // per_epoch), n)
        n_steps = min(config.steps_per_call, config.steps - step, per_epoch - step % per_epoch)
        state, metrics = train_steps(
            state, activations, order, scale, n_steps, sae_config=sae_config, config=config, frozen=frozen_decoder
        )
        step += n_steps
        history.append({"step": step, **{name: float(value) for name, value in metrics.items()}})
        if progress is not None:
            progress(step, history[-1])
    return rescale(state.sae, scale), history


@jax.jit
def normalisation(activations):
    mean = activations.mean(0)
    variance = jnp.mean((activations - mean[None, :]) ** 2)
    return mean, jax.lax.rsqrt(variance)


def rescale(sae, scale):
    return eqx.tree_at(lambda s: (s.b_enc, s.b_dec), sae, (sae.b_enc / scale, sae.b_dec / scale))


@jax.jit
def match_size(sae, x):
    centred = x - sae.b_dec[None, :]
    guess = sae(x) - sae.b_dec[None, :]
    factor = (centred * guess).sum() / (guess * guess).sum()
    return eqx.tree_at(lambda s: s.w_enc, sae, sae.w_enc * factor)
