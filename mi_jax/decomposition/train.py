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
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int, PyTree

from mi_jax.core import sharding
from mi_jax.decomposition.massive import massive
from mi_jax.decomposition.sae import SAE, SAEConfig, init, logical_axes, loss, unit_rows
from mi_jax.models.training import updated


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Schedule of one training run.

    Attributes:
      steps: optimiser steps in all.
      batch_size: tokens per step.
      learning_rate: peak of the schedule, for activations of unit variance per dimension.
      warmup_steps: steps of linear rise from zero.
      decay_fraction: last part of the run, over which the rate falls linearly to zero.
      b1, b2: decay rates of Adam's moments.
      dead_after: steps without firing after which a latent counts as dead.
      steps_per_call: optimiser steps per compiled call, at most; a call ends with its epoch.
      massive_ratio: `fit` refuses activations with a norm over this many times the median; None lets them pass.
    """

    steps: int = 1200
    batch_size: int = 1024
    learning_rate: float = 2.5e-3
    warmup_steps: int = 50
    decay_fraction: float = 0.5
    b1: float = 0.9
    b2: float = 0.99
    dead_after: int = 20
    steps_per_call: int = 50
    massive_ratio: float | None = 10.0


class TrainState(eqx.Module):
    """Everything that a step changes; saved and restored, training goes on to the same numbers."""

    sae: SAE
    optimiser: PyTree
    step: Int[Array, ""]
    since_fired: Int[Array, " d_sae"]


METRICS = ("loss", "reconstruction", "auxiliary", "l0", "dead_fraction")


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


def _trainable(sae: SAE, frozen_decoder: bool) -> SAE:
    """A tree of booleans: which arrays the optimiser sees."""
    return eqx.tree_at(lambda s: s.w_dec, jax.tree.map(lambda _: True, sae), not frozen_decoder)


def init_state(sae: SAE, config: TrainConfig, *, frozen_decoder: bool = False) -> TrainState:
    """The state before the first step; it shares no buffer with `sae` and is sharded as `sae` is."""
    sae = jax.tree.map(jnp.copy, sae)
    moments = optimiser(config).init(eqx.filter(sae, _trainable(sae, frozen_decoder)))
    return TrainState(sae, moments, jnp.zeros((), jnp.int32), jnp.zeros_like(sae.b_enc, jnp.int32))


def _update(state: TrainState, batch: Array, sae_config: SAEConfig, config: TrainConfig, frozen_decoder: bool):
    params, fixed = eqx.partition(state.sae, _trainable(state.sae, frozen_decoder))
    dead = state.since_fired >= config.dead_after

    def objective(params):
        return loss(eqx.combine(params, fixed), batch, dead, sae_config)

    (total, parts), grads = jax.value_and_grad(objective, has_aux=True)(params)
    params, moments = updated(optimiser(config), grads, state.optimiser, params)
    sae = eqx.combine(params, fixed)
    if not frozen_decoder:
        sae = eqx.tree_at(lambda s: s.w_dec, sae, unit_rows(sae.w_dec))
    metrics = {
        "loss": total,
        "reconstruction": parts.reconstruction,
        "auxiliary": parts.auxiliary,
        "l0": parts.fired.sum() / batch.shape[0],
        "dead_fraction": dead.mean(dtype=batch.dtype),
    }
    since_fired = jnp.where(parts.fired > 0, 0, state.since_fired + 1)
    return TrainState(sae, moments, state.step + 1, since_fired), metrics


@partial(jax.jit, static_argnames=("sae_config", "config", "frozen_decoder"), donate_argnames="state")
def train_step(
    state: TrainState,
    batch: Float[Array, "batch d_model"],
    *,
    sae_config: SAEConfig,
    config: TrainConfig,
    frozen_decoder: bool = False,
) -> tuple[TrainState, dict[str, Array]]:
    """One optimiser step. `state` is donated: its buffers are gone after the call.

    Returns:
      The new state and the scalars that `METRICS` names. Decoder rows keep unit norm.
    """
    return _update(state, batch, sae_config, config, frozen_decoder)


@partial(jax.jit, static_argnames=("sae_config", "config", "frozen_decoder", "mesh"), donate_argnames="state")
def train_steps(
    state: TrainState,
    activations: Float[Array, "n d_model"],
    order: Int[Array, " n"],
    scale: Float[Array, ""],
    n_steps: Int[Array, ""],
    *,
    sae_config: SAEConfig,
    config: TrainConfig,
    frozen_decoder: bool = False,
    mesh: Mesh | None = None,
) -> tuple[TrainState, dict[str, Array]]:
    """`n_steps` steps within the epoch whose `order` is given, and their mean metrics; any number compiles once."""
    per_epoch = activations.shape[0] // config.batch_size

    def body(_, carry):
        state, sums = carry
        start = state.step % per_epoch * config.batch_size
        batch = activations[jax.lax.dynamic_slice_in_dim(order, start, config.batch_size)] * scale
        if mesh is not None:
            batch = jax.lax.with_sharding_constraint(batch, _batch_sharding(batch, mesh))
        state, metrics = _update(state, batch, sae_config, config, frozen_decoder)
        return state, jax.tree.map(jnp.add, sums, metrics)

    sums = dict.fromkeys(METRICS, jnp.zeros((), activations.dtype))
    state, sums = jax.lax.fori_loop(0, n_steps, body, (state, sums))
    return state, jax.tree.map(lambda total: total / n_steps.astype(total.dtype), sums)


def fit(
    activations: Float[Array, "n d_model"],
    sae_config: SAEConfig,
    config: TrainConfig,
    *,
    key: Array,
    progress: Callable[[TrainState, dict[str, float]], None] | None = None,
    frozen_decoder: bool = False,
    state: TrainState | None = None,
    mesh: Mesh | None = None,
) -> tuple[SAE, list[dict[str, float]]]:
    """Trains a dictionary.

    Args:
      activations: one row per token, in any order; scaled to unit variance inside, the result is in their units.
      sae_config: the dictionary's shape.
      config: the schedule.
      key: draws the start and the order of the tokens.
      progress: called after every compiled call with the state (save it before returning: the next call reuses its
        buffers) and the mean metrics of the call.
      frozen_decoder: leave the directions as they were drawn; the null of `baselines.fit_random_decoder`.
      state: where to go on from, as `progress` had it, with the same other arguments.
      mesh: shards the dictionary and the activations by the table of `mi_jax.core.sharding`.

    Returns:
      The dictionary, and for every compiled call the step it ended at and its mean metrics.

    Raises:
      ValueError: activations that do not fit the configs, or that hold massive activations.
    """
    _check(activations, sae_config, config)
    k_init, k_order = jax.random.split(key)
    if mesh is not None:
        activations = jax.device_put(activations, _batch_sharding(activations, mesh))
    mean, scale = _normalisation(activations)
    if state is not None:
        current: TrainState = jax.tree.map(jnp.copy, state)
    else:
        sae = init(sae_config, key=k_init, mean=mean * scale)
        sae = _match_size(sae, activations[: config.batch_size] * scale)
        if mesh is not None:
            sae = sharding.shard(sae, logical_axes(sae), mesh)
        current = init_state(sae, config, frozen_decoder=frozen_decoder)

    n, step, order, history = activations.shape[0], int(current.step), None, []
    per_epoch = n // config.batch_size
    while step < config.steps:
        if order is None or step % per_epoch == 0:
            epoch = step // per_epoch
            order = jax.random.permutation(jax.random.fold_in(k_order, epoch), n)
        n_steps = min(config.steps_per_call, config.steps - step, per_epoch - step % per_epoch)
        current, metrics = train_steps(
            current,
            activations,
            order,
            scale,
            jnp.asarray(n_steps, jnp.int32),
            sae_config=sae_config,
            config=config,
            frozen_decoder=frozen_decoder,
            mesh=mesh,
        )
        step += n_steps
        history.append({"step": step} | {name: float(metrics[name]) for name in METRICS})
        if progress is not None:
            progress(current, history[-1])
    sae = current.sae
    # TopK is positively homogeneous, so undoing the scale of the input changes the biases only
    sae = eqx.tree_at(lambda s: (s.b_enc, s.b_dec), sae, (sae.b_enc / scale, sae.b_dec / scale))
    return sae, history


def _check(activations: Array, sae_config: SAEConfig, config: TrainConfig) -> None:
    n, d_model = activations.shape
    if d_model != sae_config.d_model:
        raise ValueError(f"the config says d_model={sae_config.d_model}, the activations have width {d_model}")
    if n < config.batch_size:
        raise ValueError(f"{n} activations do not fill one batch of batch_size={config.batch_size}")
    if config.massive_ratio is not None and (count := int(massive(activations, config.massive_ratio).sum())):
        raise ValueError(
            f"{count} of {n} activations have a norm over {config.massive_ratio:g} times the median and would own the "
            "variance; train on activations[~massive(activations)], or set massive_ratio=None"
        )


def _batch_sharding(x: Array, mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, sharding.spec(("batch", "d_model"), x.shape, mesh))


@jax.jit
def _normalisation(activations: Array) -> tuple[Array, Array]:
    mean = activations.mean(0)
    return mean, jax.lax.rsqrt(jnp.mean((activations - mean[None, :]) ** 2))


@jax.jit
def _match_size(sae: SAE, x: Array) -> SAE:
    """Scales the encoder so that the first reconstructions have the size that fits `x` best."""
    centred = x - sae.b_dec[None, :]
    guess = sae(x) - sae.b_dec[None, :]
    return eqx.tree_at(lambda s: s.w_enc, sae, sae.w_enc * ((centred * guess).sum() / (guess * guess).sum()))
