"""The loop: many steps per compiled call, a check that the numbers are finite, a checkpoint now and then.

Batch t is a function of t alone and everything else that changes is in the state, so a run that was killed goes on
from its checkpoint to the same numbers.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PyTree

from mi_jax.core import sharding
from mi_jax.core.errors import InputError
from mi_jax.models.decoder import Decoder
from mi_jax.models.parameters import logical_axes
from mi_jax.models.training.batches import Batches
from mi_jax.models.training.state import (
    TrainState,
    init_state,
    layout,
    over_batch,
    state_arrays,
    state_from_arrays,
    updated,
)
from mi_jax.run.stages import Progress
from mi_jax.run.workdir import Workdir

Model = TypeVar("Model")
Loss = Callable[[Any, Any], Any]


class TrainingError(InputError):
    """Training cannot go on; the message says at which step, and what to try."""


@dataclasses.dataclass(frozen=True)
class TrainResult(Generic[Model]):
    """What training gave.

    Attributes:
      model: after the last step.
      losses: of every step, before its update.
      metrics: of every step, what the loss function returned beside the loss.
    """

    model: Model
    losses: Float[np.ndarray, " step"]
    metrics: dict[str, Float[np.ndarray, " step"]]


def train(
    model: Model,
    loss: Loss,
    batches: Batches,
    *,
    optimizer: optax.GradientTransformation,
    steps: int,
    mesh: Mesh | None = None,
    axes: PyTree = None,
    steps_per_call: int = 50,
    workdir: Workdir | None = None,
    name: str = "training",
    checkpoint_every: int = 1000,
    progress: Progress | None = None,
) -> TrainResult[Model]:
    """Trains the floating-point arrays of a model.

    Args:
      model: a pytree; it is left as it is.
      loss: `loss(model, batch)` gives what is minimised, or that and a dict of other scalars to record.
      batches: `batches(step)` gives a batch. An equinox Module, such as `Sampled`, takes its arrays into the compiled
        step as arguments; those that a plain function refers to become constants of the program.
      optimizer: an optax optimizer, with its schedule and weight decay; gradients are accumulated over n batches by
        `optax.MultiSteps(optimizer, n).gradient_transformation()`. The same object again compiles nothing anew.
      steps: batches in all.
      mesh: devices with the axes of `mi_jax.core.sharding`. Batches are sharded over "data" and "fsdp".
      axes: axis names of every trained array, as `logical_axes` gives them for a Decoder, where they are the default;
        None leaves the arrays of other models whole on every device.
      steps_per_call: steps per compiled call, at most; the host waits for nothing between them.
      workdir: where the checkpoint is kept, and the mean of every call is added to metrics.jsonl. Where it has a
        checkpoint, training goes on from it.
      name: of the checkpoint, and what the lines in metrics.jsonl begin with.
      checkpoint_every: steps between checkpoints; the last step has one in any case.
      progress: called after every compiled call.

    Returns:
      The trained model and its losses, those before a resumption included.

    Raises:
      TrainingError: a loss or a parameter that is NaN or infinite. What has become so is never saved.
      InputError: counts that are not positive, or a checkpoint of another model, optimizer or longer run.

    Example:
      >>> data = {"x": jnp.ones((4, 1)), "y": 3 * jnp.ones((4, 1))}
      >>> squared = lambda w, batch: jnp.mean((batch["x"] * w - batch["y"]) ** 2)
      >>> float(train(jnp.zeros((1, 1)), squared, lambda step: data, optimizer=optax.sgd(0.5), steps=9).model[0, 0])
      3.0
    """
    for count, value in (("steps", steps), ("steps_per_call", steps_per_call), ("checkpoint_every", checkpoint_every)):
        if value < 1:
            raise InputError(f"{count} must be at least 1, got {value}")
    params, rest = eqx.partition(model, eqx.is_inexact_array)
    if axes is None and isinstance(model, Decoder):
        axes = logical_axes(model)
    state = init_state(params, optimizer, mesh=mesh, axes=axes)
    places = None
    if mesh is not None:
        places = layout(state, mesh)
        rest, batches = (_on_every_device(tree, mesh) for tree in (rest, batches))
    history: dict[str, np.ndarray] = {}
    if workdir is not None and workdir.has_arrays(name):
        arrays = workdir.load_arrays(name)
        state = state_from_arrays(arrays, state, name=name)
        history = {key.removeprefix("history."): x for key, x in arrays.items() if key.startswith("history.")}
    step = int(state.step)
    if step > steps:
        raise InputError(f"checkpoint {name!r} is at step {step}, {steps} steps were asked for; use another workdir")

    fixed = (rest, batches, loss, optimizer, mesh, places, steps_per_call)
    while step < steps:
        n = min(steps_per_call, steps - step, checkpoint_every - step % checkpoint_every)
        state, records, finite = _steps(fixed, (state, jnp.asarray(n, jnp.int32)))
        new = {key: np.asarray(x)[:n] for key, x in records.items()}
        _check(new["loss"], bool(finite), step, steps)
        history = {key: np.concatenate([history[key], x]) if key in history else x for key, x in new.items()}
        step += n
        if workdir is not None:
            workdir.log(step, **{f"{name}.{key}": x.mean() for key, x in new.items()})
            if step == steps or step % checkpoint_every == 0:
                saved = {f"history.{key}": x for key, x in history.items()}
                workdir.save_arrays(name, state_arrays(state) | saved)
        if progress is not None:
            progress(step / steps, f"step {step} of {steps}, loss {new['loss'].mean():.4g}")
    losses = history["loss"]
    return TrainResult(eqx.combine(state.params, rest), losses, {k: x for k, x in history.items() if k != "loss"})


@eqx.filter_jit(donate="all-except-first")
def _steps(fixed: tuple, changed: tuple) -> tuple[TrainState, dict[str, Float[Array, " step"]], Bool[Array, ""]]:
    """`n` steps, the scalars of each, and whether all parameters are finite; any number compiles once."""
    rest, batches, loss, optimizer, mesh, places, steps_per_call = fixed
    state, n = changed

    def objective(params: PyTree, step: Int[Array, ""]) -> tuple[Array, dict[str, Array]]:
        batch = batches(step) if mesh is None else over_batch(batches(step), mesh)
        value = loss(eqx.combine(params, rest), batch)
        value, metrics = value if isinstance(value, tuple) else (value, {})
        return value, metrics | {"loss": value}

    def body(i: Int[Array, ""], carry: tuple) -> tuple:
        state, records = carry
        gradient, scalars = jax.grad(objective, has_aux=True)(state.params, state.step)
        params, moments = updated(optimizer, gradient, state.optimizer, state.params)
        state = TrainState(params, moments, state.step + 1)
        if places is not None:
            state = jax.lax.with_sharding_constraint(state, places)
        return state, {key: x.at[i].set(scalars[key].astype(x.dtype)) for key, x in records.items()}

    _, scalars = jax.eval_shape(objective, state.params, state.step)
    records = {key: jnp.zeros((steps_per_call,), jnp.float32) for key in scalars}
    state, records = jax.lax.fori_loop(0, n, body, (state, records))
    finite = jnp.array([jnp.isfinite(x).all() for x in jax.tree.leaves(state.params)]).all()
    return state, records, finite


def _on_every_device(tree: PyTree, mesh: Mesh) -> PyTree:
    arrays, other = eqx.partition(tree, eqx.is_array)
    return eqx.combine(jax.device_put(arrays, sharding.replicated(mesh)), other)


def _check(losses: Float[np.ndarray, " step"], finite: bool, step: int, steps: int) -> None:
    """Raises TrainingError if a loss of the call that began at `step`, or a parameter after it, is not finite."""
    wrong = np.flatnonzero(~np.isfinite(losses))
    if not len(wrong) and finite:
        return
    what, at = (
        (f"the loss is {losses[wrong[0]]}", wrong[0]) if len(wrong) else ("a parameter is not finite", len(losses))
    )
    before = f", after a loss of {losses[at - 1]:.4g}" if at else ""
    raise TrainingError(
        f"{what} at step {step + at} of {steps}{before}. Lower the learning rate, clip the gradients "
        "(optax.clip_by_global_norm), or look for NaN or infinity in the model and the batches"
    )
