"""Training on activations as they come: several dictionaries from one pass of a language model, resumed exactly.

The stream gives windows, filled buffers that serve some steps; every dictionary trains on each window in one compiled
call per `steps_per_call` steps, so nothing is asked of the host between them.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding
from jaxtyping import Array, Float, Int

from mi_jax.core import sharding
from mi_jax.core.errors import InputError
from mi_jax.data.activations import Activations, Shuffled, Window
from mi_jax.decomposition.config import DictionaryConfig, Objective
from mi_jax.decomposition.dictionary import Dictionary, logical_axes
from mi_jax.decomposition.training.checkpoints import Checkpoints
from mi_jax.decomposition.training.config import Knobs, TrainConfig
from mi_jax.decomposition.training.fit import finished, start_from, train_steps
from mi_jax.decomposition.training.source import normalisation
from mi_jax.decomposition.training.state import TrainState
from mi_jax.decomposition.training.threshold import TOKENS

Curves = dict[str, np.ndarray]
# batches over which mean and scale of the activations are estimated
NORMALISATION_BATCHES = 8


@dataclasses.dataclass(frozen=True)
class Training:
    """One dictionary that is trained on a stream.

    Attributes:
      config: its shape.
      objective: its loss.
      train: its schedule; steps and batch size are the stream's and must be equal for all.
      reads: sites whose rows are its input; several are a crosscoder's, flattened in this order.
      writes: sites that it predicts; None for those that it reads.
      frozen_decoder: leave the directions as they were drawn.
      seed: draws its start.
      knobs: its own numbers; those of the configurations if not given.
    """

    config: DictionaryConfig
    objective: Objective
    train: TrainConfig
    reads: tuple[str, ...]
    writes: tuple[str, ...] | None = None
    frozen_decoder: bool = False
    seed: int = 0
    knobs: Knobs | None = None


class Run(eqx.Module):
    """What is kept of a training: its state, and the factors by which it normalises."""

    state: TrainState
    scale_x: Float[Array, ""]
    scale_y: Float[Array, ""]


class Streamed(eqx.Module):
    """The batches of a window, normalised; a row without weight is replaced by another row of its batch.

    Attributes:
      window: a filled buffer.
      scale_x, scale_y: factors to unit variance per dimension.
      reads, writes: sites.
    """

    window: Window
    scale_x: Float[Array, ""]
    scale_y: Float[Array, ""]
    reads: tuple[str, ...] = eqx.field(static=True)
    writes: tuple[str, ...] | None = eqx.field(static=True)

    def batch(self, step: Int[Array, ""]) -> tuple[Array, Array]:
        rows = with_weight(self.window(step))
        x = columns(rows, self.reads) * self.scale_x
        return x, x if self.writes is None else columns(rows, self.writes) * self.scale_y


def with_weight(batch: Activations) -> Activations:
    """The batch with its invalid rows replaced by its valid ones, in turn."""
    order = jnp.argsort(~batch.valid, stable=True)
    n_valid = jnp.maximum(batch.valid.sum(dtype=jnp.int32), 1)
    places = jnp.arange(len(batch), dtype=jnp.int32)
    turn = (jnp.cumsum(~batch.valid, dtype=jnp.int32) - 1) % n_valid
    source = jnp.where(batch.valid, places, order[turn].astype(jnp.int32))
    return jax.tree.map(lambda x: x[source], batch)


def columns(batch: Activations, sites: Sequence[str]) -> Float[Array, "row width"]:
    """The rows of some sites side by side, in float32; of several layers, layer after layer."""
    parts = [batch.values[site].reshape(len(batch), -1).astype(jnp.float32) for site in sites]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def fit_stream(
    stream: Shuffled,
    trainings: Mapping[str, Training],
    *,
    checkpoints: Checkpoints | None = None,
    checkpoint_every: int = 500,
    progress: Callable[[int, dict[str, float]], None] | None = None,
    mesh: Mesh | None = None,
) -> tuple[dict[str, Dictionary], dict[str, Curves]]:
    """Trains dictionaries on the batches of a stream.

    A run with `checkpoints` goes on from the newest one, to the numbers that it would have had without the stop: bit
    for bit on equal devices, up to rounding on others.

    Args:
      stream: `ActivationStream` or `StoredActivations`; its batch t depends on its key and on t.
      trainings: by name.
      checkpoints: where to write and to go on from; None for neither.
      checkpoint_every: steps between checkpoints.
      progress: called after every compiled call with the step and the mean metrics of the first training.
      mesh: shards the dictionaries; the stream shards its batches by its own.

    Returns:
      The dictionaries in the units of the activations, and by training what every step measured, by metric.

    Raises:
      InputError: trainings that differ in steps or batch size, sites that the stream does not give, widths that do
        not fit, or a checkpoint of another run.
    """
    _check(stream, trainings)
    first = next(iter(trainings.values())).train
    curves: dict[str, Curves] = {name: {} for name in trainings}
    step = 0
    if checkpoints is not None and (step := checkpoints.latest() or 0):
        runs, curves = checkpoints.restore({name: _form(t, mesh) for name, t in trainings.items()})
    else:
        opening = stream.take(min(NORMALISATION_BATCHES, stream.steps_per_epoch))
        runs = {name: _start(opening, training, mesh) for name, training in trainings.items()}
    for span, window in stream.windows(start=step, stop=first.steps):
        while step < span.stop:
            ends = min(span.stop, step + first.steps_per_call, _next(step, checkpoint_every), first.steps)
            for name, training in trainings.items():
                run = runs[name]
                source = Streamed(window, run.scale_x, run.scale_y, training.reads, training.writes)
                state, measured = train_steps(
                    run.state,
                    source,
                    jnp.asarray(ends - step, jnp.int32),
                    objective=training.objective,
                    train=training.train,
                    frozen_decoder=training.frozen_decoder,
                )
                runs[name] = Run(state, run.scale_x, run.scale_y)
                _extend(curves[name], measured, ends - step)
            if progress is not None:
                name = next(iter(trainings))
                progress(ends, {key: float(c[step:ends].mean()) for key, c in curves[name].items()})
            step = ends
            if checkpoints is not None and (step % checkpoint_every == 0 or step == first.steps):
                checkpoints.save(step, runs, curves)
    done = {
        name: finished(
            runs[name].state,
            runs[name].scale_x,
            runs[name].scale_y if training.writes else None,
            _read(stream, training, runs[name].scale_x),
        )
        for name, training in trainings.items()
    }
    return done, curves


def _read(stream: Shuffled, training: Training, scale: Array) -> Iterator[Array]:
    """What a training reads in the stream's first batches, normalised."""
    rows = stream.take(min(-(-TOKENS // stream.batch_size), stream.steps_per_epoch))
    for step in range(rows.valid.shape[0]):
        yield columns(with_weight(jax.tree.map(lambda a: a[step], rows)), training.reads) * scale  # noqa: B023


def _next(step: int, every: int) -> int:
    return (step // every + 1) * every


def _extend(curves: Curves, measured: dict[str, Array], n: int) -> None:
    for name, values in measured.items():
        new = np.asarray(values)[:n]
        curves[name] = np.concatenate([curves[name], new]) if name in curves else new


def _start(opening: Activations, training: Training, mesh: Mesh | None) -> Run:
    """The run before its first step; `opening` are the first batches, stacked."""
    x, y, scale_x, scale_y = _opened(opening, training.reads, training.writes)
    run = _run(x, y, scale_x, scale_y, training)
    return run if mesh is None else sharding.shard(run, logical_axes(run), mesh)


@partial(jax.jit, static_argnames=("reads", "writes"))
def _opened(
    opening: Activations, reads: tuple[str, ...], writes: tuple[str, ...] | None
) -> tuple[Array, Array, Array, Array]:
    """The first batch, normalised, and the scales of the first batches."""
    batch_size = opening.valid.shape[1]
    rows = with_weight(jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), opening))
    x = columns(rows, reads)
    y = x if writes is None else columns(rows, writes)
    scale_x, scale_y = normalisation(x)[1], normalisation(y)[1]
    return x[:batch_size] * scale_x, y[:batch_size] * scale_y, scale_x, scale_y


def _run(x: Array, y: Array, scale_x: Array, scale_y: Array, training: Training) -> Run:
    key, options = jax.random.key(training.seed), {"knobs": training.knobs, "frozen_decoder": training.frozen_decoder}
    state = start_from(x, y, training.config, training.objective, training.train, key=key, **options)
    return Run(state, scale_x, scale_y)


def _form(training: Training, mesh: Mesh | None) -> Run:
    """The shapes and places of a run, computed without any activations."""
    config, n = training.config, training.train.batch_size
    rows = [jnp.zeros((n, width)) for width in (config.d_in, config.width_out)]
    form = eqx.filter_eval_shape(_run, *rows, jnp.ones(()), jnp.ones(()), training)
    if mesh is None:
        places = jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), form)
    else:
        places = sharding.shardings(form, logical_axes(form), mesh)
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), form, places)


def _check(stream: Shuffled, trainings: Mapping[str, Training]) -> None:
    if not trainings:
        raise InputError("name at least one training")
    first = next(iter(trainings.values())).train
    for name, training in trainings.items():
        train = training.train
        if (train.steps, train.steps_per_call) != (first.steps, first.steps_per_call):
            raise InputError(f"training {name!r} differs in steps or steps_per_call from the first; one stream has one")
        if train.batch_size != stream.batch_size:
            raise InputError(f"training {name!r} has batch_size={train.batch_size}, the stream {stream.batch_size}")
    shapes = stream.source.shapes()
    for name, training in trainings.items():
        for sites, width in ((training.reads, training.config.d_in), (training.writes, training.config.width_out)):
            for site in sites or ():
                if site not in shapes:
                    raise InputError(f"training {name!r} wants site {site!r}; the stream has {', '.join(shapes)}")
            found = sum(math.prod(shapes[site].shape) for site in sites or ())
            if sites and found != width:
                raise InputError(f"training {name!r}: {', '.join(sites)} have width {found}, the config says {width}")
