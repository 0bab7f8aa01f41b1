"""Training dictionaries on activations that are held in memory: one, or many in one program.

Batch t is a function of (key, t) alone: the order of an epoch is a permutation drawn from `fold_in(key, epoch)`. Many
steps run per compiled call, so the host is not asked anything between them.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from mi_jax.core import sharding
from mi_jax.core.errors import InputError
from mi_jax.decomposition.config import DictionaryConfig, Objective, check_combination
from mi_jax.decomposition.dictionary import Dictionary, fold_scale, logical_axes
from mi_jax.decomposition.initial import init, match_size
from mi_jax.decomposition.massive import massive
from mi_jax.decomposition.training.config import Knobs, TrainConfig
from mi_jax.decomposition.training.source import InMemory, Source, batch_sharding, normalisation
from mi_jax.decomposition.training.state import TrainState, checked_knobs, counts_codes, init_state, with_places
from mi_jax.decomposition.training.step import METRICS, update
from mi_jax.decomposition.training.threshold import Read, settled

History = list[dict[str, float]]
Report = Callable[[TrainState, dict[str, float]], None]
# trainings one after the other in one program, which has as many copies of the step
MOST_IN_TURN = 8
OneStep = Callable[[Any, Knobs, Any, Any, TrainConfig, bool], tuple[Any, dict[str, Array]]]


def _on_batch(
    state: TrainState, knobs: Knobs, source: Source, objective: Objective, train: TrainConfig, frozen_decoder: bool
) -> tuple[TrainState, dict[str, Array]]:
    x, y, valid = source.batch(state.step)
    return update(state, knobs, x, y, objective, train, frozen_decoder, valid)


@partial(
    jax.jit,
    static_argnames=("objective", "train", "frozen_decoder", "together", "one_step", "names"),
    donate_argnames="state",
)
def train_steps(
    state: Any,
    source: Any,
    n_steps: Int[Array, ""],
    *,
    knobs: Any,
    objective: Any,
    train: TrainConfig,
    frozen_decoder: bool = False,
    together: bool = False,
    one_step: OneStep = _on_batch,
    names: tuple[str, ...] = METRICS,
) -> tuple[Any, dict[str, Array]]:
    """`n_steps` steps on the source's batches, at most `train.steps_per_call`; any number compiles once.

    Args:
      state: donated; its step says which batches are next. A tuple of states for several trainings one after the other
        in the same program; one state whose leaves have a leading axis for several side by side.
      source: gives the batch of a step.
      n_steps: how many.
      knobs: the run's own numbers; of several trainings, as the states are.
      objective: the loss.
      train: the schedule.
      frozen_decoder: leave the decoder as it is.
      together: the state is of several trainings, side by side: `jax.vmap`.
      one_step: from the state, its knobs, the source, the objective, the schedule and `frozen_decoder` to the next
        state and its metrics; that of `objective`'s losses if not given.
      names: of the metrics.

    Returns:
      The new state or states, and the metrics of every step, `[… step]`, of which the first `n_steps` are meant.
    """

    def run(state, knobs, n_steps):
        def body(i, carry):
            state, curves = carry
            state, metrics = one_step(state, knobs, source, objective, train, frozen_decoder)
            return state, {name: curve.at[i].set(metrics[name]) for name, curve in curves.items()}

        curves = dict.fromkeys(names, jnp.zeros(train.steps_per_call, jnp.float32))
        return jax.lax.fori_loop(0, n_steps, body, (state, curves))

    if together:
        return jax.vmap(run, in_axes=(0, 0, None))(state, knobs, n_steps)
    return _in_turn(run, state, knobs, n_steps) if isinstance(state, tuple) else run(state, knobs, n_steps)


def _in_turn(
    run: Callable[[Any, Any, Array], tuple[Any, dict[str, Array]]],
    states: tuple[Any, ...],
    knobs: tuple[Any, ...],
    n_steps: Int[Array, ""],
) -> tuple[tuple[Any, ...], dict[str, Array]]:
    """`run` on every state, each updated in its own memory: a loop over stacked ones would copy them in and out."""
    done, curves = [], []
    for state, own in zip(states, knobs, strict=True):
        first = state.step
        state, found = run(state, own, n_steps)
        # how many steps this one did is how many the next one does: so they cannot run, and need memory, at once
        n_steps = state.step - first
        done.append(state)
        curves.append(found)
    return tuple(done), jax.tree.map(lambda *leaves: jnp.stack(leaves), *curves)


def fit(
    activations: Float[Array, "n d_in"],
    config: DictionaryConfig,
    objective: Objective,
    train: TrainConfig,
    *,
    key: Array,
    targets: Float[Array, "n d_out"] | None = None,
    knobs: Knobs | None = None,
    progress: Report | None = None,
    frozen_decoder: bool = False,
    state: TrainState | None = None,
    mesh: Mesh | None = None,
) -> tuple[Dictionary, History]:
    """Trains a dictionary.

    Args:
      activations: one row per token, in any order, of any precision; scaled to unit variance inside. The result is in
        their units, and in float32 where they are of half precision.
      config: the dictionary's shape.
      objective: the loss.
      train: the schedule.
      key: draws the start and the order of the tokens.
      targets: what a transcoder predicts, row by row; None for the activations themselves.
      knobs: the run's own numbers; those of the configurations if not given.
      progress: called after every compiled call with the state (save it before returning: the next call reuses its
        buffers) and the mean metrics of the call.
      frozen_decoder: leave the directions as they were drawn; the null of `baselines.fit_random_decoder`.
      state: where to go on from, as `progress` had it, with the same other arguments.
      mesh: shards the dictionary and the activations by the table of `mi_jax.core.sharding`.

    Returns:
      The dictionary, and for every compiled call the step it ended at and its mean metrics.

    Raises:
      InputError: activations that do not fit the configurations, that are not finite, or that hold massive ones; a
        `knobs.k` over the configuration's.
    """
    own = checked_knobs(knobs, config, objective, train)
    source, (k_init, k_order) = _prepare(activations, targets, config, objective, train, key, mesh)
    if state is not None:
        current: TrainState = jax.tree.map(jnp.copy, state)
    else:
        current = start(source, config, objective, train, key=k_init, knobs=knobs, frozen_decoder=frozen_decoder)
    current, history = run_steps(current, source, k_order, own, objective, train, frozen_decoder, progress)
    scale_y = source.scale_y if targets is not None else None
    return finished(current, own, source.scale_x, scale_y, last_pass(source, k_order, train)), history_of(history)


def fit_many(
    activations: Float[Array, "n d_in"],
    config: DictionaryConfig,
    objective: Objective,
    train: TrainConfig,
    *,
    keys: Sequence[Array] | Array,
    knobs: Knobs | None = None,
    targets: Float[Array, "n d_out"] | None = None,
    progress: Report | None = None,
    together: bool = False,
) -> tuple[list[Dictionary], list[History]]:
    """Trains several dictionaries on the same batches in one compiled program: seeds, λ, k, rates, targets of L0.

    Args:
      activations: one row per token.
      config: the shape that they share; k is the number of places, the largest of `knobs.k` where that varies.
      objective: the loss.
      train: the schedule.
      keys: one per dictionary, for its start; the first also draws the order of the tokens.
      knobs: one entry per dictionary in every leaf; those of the configurations, for all, if not given.
      targets: what transcoders predict.
      progress: as in `fit`, with a tuple of states (one stacked state with `together`) and metrics averaged over the
        dictionaries.
      together: `jax.vmap` over the dictionaries, for ones so small that they do not fill an accelerator; otherwise
        one after the other, which is faster (`experiments.bench.sae_step` measures both).

    Returns:
      The dictionaries, and a history for each.
    """
    n = len(keys)
    source, (_, k_order) = _prepare(activations, targets, config, objective, train, keys[0], None)
    many = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (n,)), checked_knobs(knobs, config, objective, train))
    each = tuple(jax.tree.map(lambda leaf: leaf[i], many) for i in range(n))  # noqa: B023
    states = [
        start(source, config, objective, train, key=jax.random.split(keys[i])[0], knobs=each[i]) for i in range(n)
    ]
    scale_y = source.scale_y if targets is not None else None
    state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states) if together else tuple(states)
    numbers = many if together else each
    state, histories = run_steps(
        state, source, k_order, numbers, objective, train, progress=progress, together=together
    )
    if together:
        state = tuple(jax.tree.map(lambda leaf: leaf[i], state) for i in range(n))  # noqa: B023
    done = [
        finished(one, own, source.scale_x, scale_y, last_pass(source, k_order, train))
        for one, own in zip(state, each, strict=True)
    ]
    return done, [history_of(histories, i) for i in range(n)]


def start(
    source: InMemory,
    config: DictionaryConfig,
    objective: Objective,
    train: TrainConfig,
    *,
    key: Array,
    knobs: Knobs | None = None,
    frozen_decoder: bool = False,
) -> TrainState:
    """The state before the first step on a source; see `start_from`."""
    x, y, _ = source.batch(jnp.int32(0))
    options = {"key": key, "knobs": knobs, "frozen_decoder": frozen_decoder, "mesh": source.mesh}
    return start_from(x, y, config, objective, train, **options)


def start_from(
    x: Float[Array, "token d_in"],
    y: Float[Array, "token d_out"],
    config: DictionaryConfig,
    objective: Objective,
    train: TrainConfig,
    *,
    key: Array,
    knobs: Knobs | None = None,
    frozen_decoder: bool = False,
    mesh: Mesh | None = None,
) -> TrainState:
    """The state before the first step, fitted to the size of a first batch and sharded over a mesh.

    With `knobs`, or a schedule of k, the number of codes is traced.
    """
    dictionary = init(config, key=key, mean=y.mean(0))
    dictionary = match_size(dictionary, x, y)
    if counts_codes(dictionary) and (knobs is not None or train.k_start is not None):
        dictionary = with_places(dictionary, max(config.k, train.k_start or 0))
    state = init_state(dictionary, config, objective, train, frozen_decoder=frozen_decoder)
    return state if mesh is None else sharding.shard(state, logical_axes(state), mesh)


def finished(
    state: TrainState, knobs: Knobs, scale_x: Array, scale_y: Array | None, batches: Iterable[Read] = ()
) -> Dictionary:
    """The trained dictionary in the units of the activations.

    `batches` of what it reads, normalised, settle BatchTopK's threshold.
    """
    dictionary = state.dictionary
    if counts_codes(dictionary) and getattr(dictionary.activation, "k_now", None) is not None:
        dictionary = eqx.tree_at(lambda d: d.activation.k_now, dictionary, knobs.k)
        dictionary = with_places(dictionary, None)
    return fold_scale(settled(dictionary, batches), scale_x, scale_y)


def _read(source: Source, step: Array) -> Read:
    x, _, valid = source.batch(step)
    return x, valid


def last_pass(
    source: Any, k_order: Array, train: TrainConfig, read: Callable[[Any, Array], Read] = _read
) -> Iterator[Read]:
    """What is read in some batches, drawn as those of an epoch after the last."""
    n = source.order.shape[0]
    order = jax.random.permutation(jax.random.fold_in(k_order, train.steps), n)
    source = eqx.tree_at(lambda s: s.order, source, order)
    for step in range(n // train.batch_size):
        yield read(source, jnp.int32(step))


def run_steps(
    state: Any,
    source: Any,
    k_order: Array,
    knobs: Any,
    objective: Any,
    train: TrainConfig,
    frozen_decoder: bool = False,
    progress: Report | None = None,
    **how: Any,
) -> tuple[Any, list[dict[str, Any]]]:
    """All steps that are left; `source.order` is drawn anew for every epoch. `how` goes to `train_steps`."""
    first = state[0] if isinstance(state, tuple) else state
    n, step, order, history = source.order.shape[0], int(jnp.ravel(first.step)[0]), None, []
    per_epoch = n // train.batch_size
    while step < train.steps:
        if order is None or step % per_epoch == 0:
            order = jax.random.permutation(jax.random.fold_in(k_order, step // per_epoch), n)
            source = eqx.tree_at(lambda s: s.order, source, order)
        n_steps = min(train.steps_per_call, train.steps - step, per_epoch - step % per_epoch)
        how |= {"objective": objective, "train": train, "frozen_decoder": frozen_decoder}
        state, metrics = _advance(state, knobs, source, jnp.asarray(n_steps, jnp.int32), **how)
        step += n_steps
        read = {name: np.asarray(curve)[..., :n_steps].mean(-1) for name, curve in metrics.items()}
        history.append({"step": step} | read)
        if progress is not None:
            progress(state, {name: float(np.mean(value)) for name, value in history[-1].items()})
    return state, history


def _advance(state: Any, knobs: Any, source: Any, n_steps: Array, **how: Any) -> tuple[Any, dict[str, Any]]:
    """`train_steps`, for so many trainings at a time as make a program of a reasonable size."""
    if not isinstance(state, tuple):
        return train_steps(state, source, n_steps, knobs=knobs, **how)
    # of one size where possible, so that one program serves all
    size = -(-len(state) // -(-len(state) // MOST_IN_TURN))
    groups = [slice(i, i + size) for i in range(0, len(state), size)]
    done, metrics = zip(
        *(train_steps(state[group], source, n_steps, knobs=knobs[group], **how) for group in groups), strict=True
    )
    return sum(done, ()), jax.tree.map(lambda *curves: np.concatenate(curves), *metrics)


def history_of(history: list[dict], i: int | None = None) -> History:
    """The history of one training, the i-th of several."""

    def entry(value) -> float:
        return float(value if i is None or not np.ndim(value) else value[i])

    return [{name: entry(value) for name, value in row.items()} for row in history]


def _prepare(activations, targets, config, objective, train, key, mesh) -> tuple[InMemory, Array]:
    check_combination(config, objective)
    _check(activations, targets, config, train)
    if mesh is not None:
        activations = jax.device_put(activations, batch_sharding(activations, mesh))
        targets = None if targets is None else jax.device_put(targets, batch_sharding(targets, mesh))
    _, scale_x = normalisation(activations)
    scale_y = scale_x if targets is None else normalisation(targets)[1]
    order = jnp.arange(activations.shape[0])
    return InMemory(activations, targets, order, scale_x, scale_y, train.batch_size, mesh), jax.random.split(key)


def _check(activations: Array, targets: Array | None, config: DictionaryConfig, train: TrainConfig) -> None:
    n, width = activations.shape
    if width != config.d_in:
        raise InputError(f"the config says d_in={config.d_in}, the activations have width {width}")
    if config.transcoder != (targets is not None):
        raise InputError("a transcoder needs targets, an autoencoder has none")
    if targets is not None and targets.shape != (n, config.width_out):
        raise InputError(f"targets must have shape {(n, config.width_out)}, got {targets.shape}")
    if n < train.batch_size:
        raise InputError(f"{n} activations do not fill one batch of batch_size={train.batch_size}")
    for name, array in (("activations", activations), ("targets", targets)):
        if array is not None and (wrong := int((~jnp.isfinite(array).all(1)).sum())):
            raise InputError(f"{wrong} of {n} {name} are not finite (NaN or infinity)")
    if train.massive_ratio is not None and (count := int(massive(activations, train.massive_ratio).sum())):
        raise InputError(
            f"{count} of {n} activations have a norm over {train.massive_ratio:g} times the median and would own the "
            "variance; train on activations[~massive(activations)], or set massive_ratio=None"
        )
