"""Training on activations as they come: several dictionaries from one pass of a language model, resumed exactly.

The stream gives windows, filled buffers that serve some steps; every dictionary trains on each window in one compiled
call per `steps_per_call` steps, so nothing is asked of the host between them.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding
from jaxtyping import Array, Float, Int

from mi_jax.core import sharding
from mi_jax.core.errors import InputError
from mi_jax.core.sites import At, at
from mi_jax.data.activations import Activations, Shuffled, Window
from mi_jax.decomposition.config import DictionaryConfig, Objective
from mi_jax.decomposition.dictionary import Dictionary, logical_axes
from mi_jax.decomposition.training.checkpoints import Checkpoints
from mi_jax.decomposition.training.config import Knobs, TrainConfig
from mi_jax.decomposition.training.fit import finished, start_from, train_steps
from mi_jax.decomposition.training.source import filled, normalisation
from mi_jax.decomposition.training.state import TrainState, checked_knobs
from mi_jax.decomposition.training.threshold import TOKENS, Read
from mi_jax.run.config import config_to_json

Curves = dict[str, np.ndarray]
# a site, and the places that are wanted of the layers that a row has of it; None for all
Part = tuple[str, tuple[int, ...] | None]
# what no number of a training depends on
WITHOUT_EFFECT = ("steps_per_call", "massive_ratio")
# batches over which mean and scale of the activations are estimated
NORMALISATION_BATCHES = 8


@dataclasses.dataclass(frozen=True)
class Training:
    """One dictionary that is trained on a stream.

    Attributes:
      config: its shape.
      objective: its loss.
      train: its schedule; steps and batch size are the stream's and must be equal for all.
      reads: sites whose rows are its input, such as `"resid_post"` with all layers that the stream has of it, or
        `mi.at("resid_post", layers=7)` with some; several are a crosscoder's, flattened in this order.
      writes: sites that it predicts; None for those that it reads.
      frozen_decoder: leave the directions as they were drawn.
      seed: draws its start.
      knobs: its own numbers; those of the configurations if not given.

    Example:
      `{f"layer {n}": Training(config, objective, train, reads=(mi.at("resid_post", layers=n),)) for n in (3, 7, 11)}`
      are three dictionaries of a stream of `mi.at("resid_post", layers=(3, 7, 11))`.
    """

    config: DictionaryConfig
    objective: Objective
    train: TrainConfig
    reads: tuple[str | At, ...]
    writes: tuple[str | At, ...] | None = None
    frozen_decoder: bool = False
    seed: int = 0
    knobs: Knobs | None = None


class Run(eqx.Module):
    """What is kept of a training: its state, and the factors by which it normalises."""

    state: TrainState
    scale_x: Float[Array, ""]
    scale_y: Float[Array, ""]


class Streamed(eqx.Module):
    """The batches of a window, normalised.

    Attributes:
      window: a filled buffer.
      scale_x, scale_y: factors to unit variance per dimension.
      reads, writes: sites, with the places of their layers.
    """

    window: Window
    scale_x: Float[Array, ""]
    scale_y: Float[Array, ""]
    reads: tuple[Part, ...] = eqx.field(static=True)
    writes: tuple[Part, ...] | None = eqx.field(static=True)

    def batch(self, step: Int[Array, ""]) -> tuple[Array, Array, Array]:
        rows = self.window(step)
        x = filled(columns(rows, self.reads), rows.valid) * self.scale_x
        if self.writes is None:
            return x, x, rows.valid
        return x, filled(columns(rows, self.writes), rows.valid) * self.scale_y, rows.valid


def columns(batch: Activations, wanted: Sequence[Part]) -> Float[Array, "row width"]:
    """The rows of some sites side by side, in float32; of several layers, layer after layer."""
    parts = []
    for site, places in wanted:
        value = batch.values[site] if places is None else batch.values[site][:, np.asarray(places)]
        parts.append(value.reshape(len(batch), -1).astype(jnp.float32))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def fit_stream(
    stream: Shuffled,
    trainings: Mapping[str, Training],
    *,
    checkpoints: Checkpoints | None = None,
    checkpoint_every: int = 500,
    progress: Callable[[int, dict[str, float]], None] | None = None,
    say: Callable[[str], None] = print,
    mesh: Mesh | None = None,
) -> tuple[dict[str, Dictionary], dict[str, Curves]]:
    """Trains dictionaries on the batches of a stream.

    A run with `checkpoints` goes on from the newest one, to the numbers that it would have had without the stop: bit
    for bit on equal devices, up to rounding on others.

    Args:
      stream: `ActivationStream` or `StoredActivations`; its batch t depends on its key and on t.
      trainings: by name.
      checkpoints: where to write and to go on from; None for neither. A folder is of one set of trainings on one
        stream: configurations, seeds, steps, the model's weights, the corpus, the shuffle. Where these are done,
        nothing is trained, and what came out is read.
      checkpoint_every: steps between checkpoints.
      progress: called after every compiled call with the step and the mean metrics of the first training.
      say: hears what is taken over from a folder.
      mesh: shards the dictionaries; the stream shards its batches by its own.

    Returns:
      The dictionaries in the units of the activations, and by training what every step measured, by metric. A step
      whose batch was not full, as the last of an epoch, is the mean over the `rows` that it had.

    Raises:
      InputError: trainings that differ in steps or batch size, sites that the stream does not give, widths that do
        not fit, or checkpoints of another run; says what differs.
    """
    parts = _check(stream, trainings)
    knobs = {name: checked_knobs(t.knobs, t.config, t.objective, t.train) for name, t in trainings.items()}
    first = next(iter(trainings.values())).train
    curves: dict[str, Curves] = {name: {} for name in trainings}
    step = 0
    if checkpoints is not None:
        checkpoints.claim(_identity(stream, trainings, knobs))
        step = checkpoints.latest() or 0
    if checkpoints is not None and step:
        rest = "all are done" if step == first.steps else "the training goes on from there"
        say(f"{checkpoints.folder} has step {step} of {first.steps}: {rest}")
        runs, curves = checkpoints.restore({name: _form(t, mesh) for name, t in trainings.items()})
    else:
        opening = stream.take(min(NORMALISATION_BATCHES, stream.steps_per_epoch))
        runs = {name: _start(opening, training, *parts[name], mesh) for name, training in trainings.items()}
    for span, window in stream.windows(start=step, stop=first.steps):
        while step < span.stop:
            ends = min(span.stop, step + first.steps_per_call, _next(step, checkpoint_every), first.steps)
            for name, training in trainings.items():
                run = runs[name]
                source = Streamed(window, run.scale_x, run.scale_y, *parts[name])
                state, measured = train_steps(
                    run.state,
                    source,
                    jnp.asarray(ends - step, jnp.int32),
                    knobs=knobs[name],
                    objective=training.objective,
                    train=training.train,
                    frozen_decoder=training.frozen_decoder,
                )
                runs[name] = Run(state, run.scale_x, run.scale_y)
                _extend(curves[name], measured, ends - step)
            if progress is not None:
                name = next(iter(trainings))
                # the last step of an epoch has fewer rows than the others
                rows = curves[name]["rows"][step:ends] + 1e-9
                progress(ends, {key: float(np.average(c[step:ends], weights=rows)) for key, c in curves[name].items()})
            step = ends
            if checkpoints is not None and (step % checkpoint_every == 0 or step == first.steps):
                checkpoints.save(step, runs, curves)
    done = {
        name: finished(
            run.state,
            knobs[name],
            run.scale_x,
            run.scale_y if trainings[name].writes else None,
            _read(stream, parts[name][0], run.scale_x),
        )
        for name, run in runs.items()
    }
    return done, curves


def _read(stream: Shuffled, reads: tuple[Part, ...], scale: Array) -> Iterator[Read]:
    """What a training reads in the stream's first batches, normalised, and which rows are valid."""
    rows = stream.take(min(-(-TOKENS // stream.batch_size), stream.steps_per_epoch))
    for step in range(rows.valid.shape[0]):
        batch = jax.tree.map(lambda a: a[step], rows)  # noqa: B023
        yield filled(columns(batch, reads), batch.valid) * scale, batch.valid


def _next(step: int, every: int) -> int:
    return (step // every + 1) * every


def _extend(curves: Curves, measured: dict[str, Array], n: int) -> None:
    for name, values in measured.items():
        new = np.asarray(values)[:n]
        curves[name] = np.concatenate([curves[name], new]) if name in curves else new


def _identity(stream: Shuffled, trainings: Mapping[str, Training], knobs: Mapping[str, Knobs]) -> dict[str, Any]:
    """All that the numbers of these trainings depend on, as JSON."""

    def of(name: str, training: Training) -> dict[str, Any]:
        sites = {
            side: None if given is None else tuple(_spec(site) for site in given)
            for side, given in (("reads", training.reads), ("writes", training.writes))
        }
        fields = config_to_json(dataclasses.replace(training, knobs=None, **sites))
        fields["train"] = {name: value for name, value in fields["train"].items() if name not in WITHOUT_EFFECT}
        own = knobs[name]
        if training.knobs is not None:
            fields["knobs"] = {field.name: float(getattr(own, field.name)) for field in dataclasses.fields(own)}
        return fields

    return {"trainings": {name: of(name, t) for name, t in trainings.items()}, "stream": stream.identity()}


def _start(
    opening: Activations,
    training: Training,
    reads: tuple[Part, ...],
    writes: tuple[Part, ...] | None,
    mesh: Mesh | None,
) -> Run:
    """The run before its first step; `opening` are the first batches, stacked."""
    if not bool(opening.valid.any()):
        raise InputError("no activation of the first batches is valid; is outlier_ratio of the stream too small?")
    x, y, scale_x, scale_y = _opened(opening, reads, writes)
    run = _run(x, y, scale_x, scale_y, training)
    return run if mesh is None else sharding.shard(run, logical_axes(run), mesh)


@partial(jax.jit, static_argnames=("reads", "writes"))
def _opened(
    opening: Activations, reads: tuple[Part, ...], writes: tuple[Part, ...] | None
) -> tuple[Array, Array, Array, Array]:
    """As many valid rows as make a batch, normalised, and the scales of the first batches."""
    batch_size = opening.valid.shape[1]
    rows = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), opening)
    x = filled(columns(rows, reads), rows.valid)
    y = x if writes is None else filled(columns(rows, writes), rows.valid)
    scale_x, scale_y = normalisation(x, rows.valid)[1], normalisation(y, rows.valid)[1]
    first = jnp.argsort(~rows.valid, stable=True)[:batch_size]
    return x[first] * scale_x, y[first] * scale_y, scale_x, scale_y


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


def _check(
    stream: Shuffled, trainings: Mapping[str, Training]
) -> dict[str, tuple[tuple[Part, ...], tuple[Part, ...] | None]]:
    """What each training reads and writes of a row."""
    if not trainings:
        raise InputError("name at least one training")
    first = next(iter(trainings.values())).train
    for name, training in trainings.items():
        train = training.train
        if (train.steps, train.steps_per_call) != (first.steps, first.steps_per_call):
            raise InputError(f"training {name!r} differs in steps or steps_per_call from the first; one stream has one")
        if train.batch_size != stream.batch_size:
            raise InputError(f"training {name!r} has batch_size={train.batch_size}, the stream {stream.batch_size}")
    found = {}
    for name, training in trainings.items():
        sides = []
        for sites, width in ((training.reads, training.config.d_in), (training.writes, training.config.width_out)):
            wanted = None if sites is None else tuple(_part(stream, site, name) for site in sites)
            sides.append(wanted)
            got = sum(_width(stream, part) for part in wanted or ())
            if wanted and got != width:
                raise InputError(
                    f"training {name!r}: {', '.join(str(site) for site in sites or ())} have width {got}, the config "
                    f"says {width}"
                )
        found[name] = tuple(sides)
    return found


def _part(stream: Shuffled, wanted: str | At, name: str) -> Part:
    """Where a site, at some layers or at all, is in a row of the stream."""
    spec, held = _spec(wanted), stream.source.layers()
    site = spec.site
    if site not in held:
        raise InputError(f"training {name!r} wants site {site!r}; the stream has {', '.join(held)}")
    if spec.layers is None:
        return site, None
    layers = (spec.layers,) if isinstance(spec.layers, int) else spec.layers
    has = held[site]
    if isinstance(has, int) and layers == (has,):
        return site, None
    if not isinstance(has, tuple) or not set(layers) <= set(has):
        there = f"layer {has}" if isinstance(has, int) else f"layers {', '.join(map(str, has))}" if has else "no layers"
        raise InputError(
            f"training {name!r} wants site {site!r} at layer {', '.join(map(str, layers))}; "
            f"the stream has {there} of it"
        )
    return site, tuple(has.index(layer) for layer in layers)


def _spec(wanted: str | At) -> At:
    return at(wanted) if isinstance(wanted, str) else wanted


def _width(stream: Shuffled, part: Part) -> int:
    shape = stream.source.shapes()[part[0]].shape
    return math.prod(shape if part[1] is None else (len(part[1]), *shape[1:]))
