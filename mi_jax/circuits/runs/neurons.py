"""Runs of circuits of neurons: the neurons of the circuit do what they do, all others carry their ablation value.

The input is always clean. So a circuit of all neurons is the model, and one of none reads the clean input and ablated
neurons; faithfulness is 1 for the one and 0 for the other.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mi_jax.circuits.graph.selection import Select
from mi_jax.circuits.metrics.faithfulness import FRACTIONS, Curve, normalized
from mi_jax.circuits.runs.answer import AnswerLayout
from mi_jax.circuits.runs.circuits import CircuitRuns
from mi_jax.circuits.runs.program import compared
from mi_jax.circuits.scores.neurons import NEURON_SITES, Neurons, checked_for_neurons, random_neurons, top_neurons
from mi_jax.core.errors import InputError
from mi_jax.core.precision import widened
from mi_jax.data.task import Task
from mi_jax.models.block import block
from mi_jax.models.decoder import Decoder
from mi_jax.models.layout import Prompts

NeuronAblation = Literal["resample", "zero", "mean"]

# circuits that calls with fewer are filled up to, so that they share one compiled program
_ROOM = 16


def neuron_runs(model: Decoder, task: Task, circuits: Sequence[Neurons], *, ablation: str = "resample") -> CircuitRuns:
    """Runs every circuit on every prompt, beside the whole model.

    Args:
      circuits: True where the circuit has a neuron.
      ablation: what the others carry: their value in the corrupt prompt of the pair, zero, or their mean over the real
        tokens of all corrupt prompts.

    Raises:
      InputError: a mixture of experts, an unknown ablation, or circuits of another model.
    """
    graph = checked_for_neurons(model)
    if ablation not in get_args(NeuronAblation):
        raise InputError(f"ablation is one of {', '.join(get_args(NeuronAblation))}, got {ablation!r}")
    _check_some(circuits)
    c = model.config
    heads, units = (graph.n_layers, c.n_heads, c.d_head), (graph.n_layers, c.d_mlp) if graph.has_mlp else None
    for one in circuits:
        found = one.heads.shape, None if one.mlp is None else one.mlp.shape
        if found != (heads, units) or one.flat.dtype != bool:
            raise InputError(
                f"the neurons of {c.name} are boolean masks of shapes {heads} and {units}; got {one.flat.dtype} of "
                f"shapes {found[0]} and {found[1]}; choose neurons of scores with `top_neurons`"
            )
    n = len(circuits)
    room = max(_ROOM, 1 << (n - 1).bit_length())
    masks = [np.stack([one.heads for one in circuits])]
    if graph.has_mlp:
        masks.append(np.stack([np.asarray(one.mlp) for one in circuits]))
    filled = [jnp.asarray(np.pad(m, ((0, room - n),) + ((0, 0),) * (m.ndim - 1))) for m in masks]
    out = _run(model, task, ablation, jnp.asarray(n, jnp.int32), filled)
    return CircuitRuns(*(np.asarray(x)[:n] for x in out))


def neuron_faithfulness(
    model: Decoder, task: Task, circuits: Sequence[Neurons], *, ablation: str = "resample"
) -> Float[np.ndarray, " circuit"]:
    """f of every circuit: the share of the metric, between no neuron and all neurons, that the circuit keeps.

    Raises:
      InputError: as `neuron_runs`, or ablating every neuron leaves the metric as it is.
    """
    return normalized(_with_ends(model, task, circuits, ablation).metric, task.name)


def neuron_curve(
    model: Decoder,
    task: Task,
    scores: Neurons,
    fractions: Sequence[float] = FRACTIONS,
    *,
    select: str = "absolute",
    ablation: str = "resample",
) -> Curve:
    """Faithfulness of the circuits that keep the best-scored neurons, at each fraction of all neurons.

    What the curve calls edges are neurons here. `Curve.intervals` gives intervals over prompts; `random_neurons` draws
    the control.

    Raises:
      InputError: as `neuron_faithfulness`, or fractions or a way to select that there are not.
    """
    if select not in get_args(Select):
        raise InputError(f"select is one of {', '.join(get_args(Select))}, got {select!r}")
    if len(fractions) == 0 or not all(0 <= f <= 1 for f in fractions):
        raise InputError(f"fractions are shares of all neurons, at least one, each from 0 to 1; got {tuple(fractions)}")
    total = len(scores.flat)
    ns = tuple(max(1, round(f * total)) for f in fractions)
    circuits = [top_neurons(scores, n, absolute=select == "absolute") for n in ns]
    runs = _with_ends(model, task, circuits, ablation)
    return Curve(tuple(fractions), ns, tuple(normalized(runs.metric, task.name).tolist()), ns, total, runs)


def _check_some(circuits: Sequence[Neurons]) -> None:
    if isinstance(circuits, Neurons) or len(circuits) == 0:
        given = "one `Neurons`" if isinstance(circuits, Neurons) else "none"
        raise InputError(f"circuits are a list of at least one `Neurons`, True where it has a neuron; got {given}")


def _with_ends(model: Decoder, task: Task, circuits: Sequence[Neurons], ablation: str) -> CircuitRuns:
    _check_some(circuits)
    none, whole = (random_neurons(circuits[0], n, seed=0) for n in (0, len(circuits[0].flat)))
    return neuron_runs(model, task, [*circuits, none, whole], ablation=ablation)


@eqx.filter_jit
def _run(
    model: Decoder,
    task: Task,
    ablation: str,
    n: Int[Array, ""],
    masks: list[Bool[Array, "circuit layer ..."]],
) -> tuple[Array, ...]:
    sites = NEURON_SITES[: len(masks)]
    _, seen = model(task.corrupt, task.mask, capture=sites, output=False)
    values = [_values(seen[site], task.mask, ablation) for site in sites]
    layers = jnp.arange(model.config.n_layers, dtype=jnp.int32)
    x, _ = model.embedded(task.clean, task.mask)
    answer = AnswerLayout(task.mask, task.position)

    def one(i):
        def layer(x, row):
            number, params, kept, ablated = row
            tap = _NeuronTap(dict(zip(sites, zip(kept, ablated, strict=True), strict=True)))
            return block(model.layer(number, params), x, tap, model.config, Prompts(task.mask)), None

        rows = (layers, model.blocks, [m[i] for m in masks], values)
        return answer.asking(jax.lax.scan(layer, x, rows)[0])

    empty = jnp.zeros((len(masks[0]), x.shape[0], 1, x.shape[-1]), x.dtype)
    streams = jax.lax.fori_loop(0, n, lambda i, out: out.at[i].set(one(i)), empty)
    whole = model(task.clean, task.mask, output_pos=task.position)
    return compared(model, task, [streams], whole, n)


def _values(x: Float[Array, "layer batch pos ..."], mask: Bool[Array, "batch pos"], ablation: str) -> Array:
    """What ablated neurons carry, to be broadcast over prompts and positions."""
    if ablation == "resample":
        return x
    if ablation == "zero":
        return jnp.zeros_like(x[:, :1, :1])
    real = mask.reshape(1, *mask.shape, *(1,) * (x.ndim - 3))
    total = jnp.where(real, widened(x), 0).sum((1, 2), keepdims=True)
    return (total / mask.sum(dtype=total.dtype)).astype(x.dtype)


class _NeuronTap:
    """A tap that leaves the neurons of a circuit as they are and replaces the others."""

    def __init__(self, rows: dict[str, tuple[Bool[Array, "..."], Array]]):
        self._rows = rows

    def touches(self, name: str) -> bool:
        return False

    def __call__(self, name: str, x: Array) -> Array:
        if name not in self._rows:
            return x
        kept, ablated = self._rows[name]
        return jnp.where(kept[None, None], x, ablated)
