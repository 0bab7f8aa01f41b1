"""Runs of many circuits in one program: the metric, the KL divergence and the prediction of every prompt in each.

A run of a circuit C keeps the edges of C and gives every other edge its ablation value. What the metrics of circuits
say (faithfulness, completeness, minimality, tests) is arithmetic on these numbers, and so are their intervals: prompts
are resampled without running anything again.
"""

import dataclasses
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mi_jax.circuits.ablation import ablation_values
from mi_jax.circuits.graph import Graph
from mi_jax.circuits.kept import circuit_stream
from mi_jax.circuits.masked import head_logits, masked_stream
from mi_jax.circuits.measures import kl_divergence
from mi_jax.circuits.needed import Needs, needed
from mi_jax.circuits.shared import Shared, has_constant_rest, shared, shared_with_run, splits_by_run
from mi_jax.core.errors import InputError
from mi_jax.data.task import Task
from mi_jax.models.decoder import Decoder

# Room for this many circuits at the least, so that calls with fewer share one compiled program.
_ROOM = 64
# prompts, of however many circuits, whose logits are computed in one product; fewer read the unembedding more often,
# more are empty rows where circuits are few
ROWS_TOGETHER = 80


@dataclasses.dataclass(frozen=True)
class CircuitRuns:
    """What circuits do on the prompts of a task; the first axis is the circuit.

    Attributes:
      metric: of the task.
      kl: `KL(reference ‖ circuit)` in nats, at the position of the answer.
      prediction: the token with the largest logit.
      reference_metric, reference_prediction: of the reference run: the whole model, unless references were given.
    """

    metric: Float[np.ndarray, "circuit batch"]
    kl: Float[np.ndarray, "circuit batch"]
    prediction: Int[np.ndarray, "circuit batch"]
    reference_metric: Float[np.ndarray, "circuit batch"]
    reference_prediction: Int[np.ndarray, "circuit batch"]

    def __len__(self) -> int:
        return len(self.metric)

    def __getitem__(self, rows: slice | np.ndarray) -> "CircuitRuns":
        return CircuitRuns(*(getattr(self, f.name)[rows] for f in dataclasses.fields(self)))

    @property
    def agreement(self) -> Bool[np.ndarray, "circuit batch"]:
        """Whether circuit and reference predict the same token."""
        return self.prediction == self.reference_prediction


def circuit_runs(
    model: Decoder,
    task: Task,
    circuits: Sequence[np.ndarray] | np.ndarray,
    references: Sequence[np.ndarray] | np.ndarray | None = None,
    *,
    ablation: str | Array = "resample",
    reference_task: Task | None = None,
    batch_size: int | None = None,
) -> CircuitRuns:
    """Runs every circuit on every prompt, in one program that no number of circuits up to 64 compiles anew.

    Args:
      circuits: boolean masks `[source reader]`, or `[source reader pos]` for circuits of token edges.
      references: as many circuits, each the one that the KL divergence of its partner is from; None is the whole model.
      ablation: what the other edges carry, see `ablation_values`.
      reference_task: prompts that mean ablations are taken over.
      batch_size: circuits at once, which bounds the memory; None: one on a CPU, eight on an accelerator.

    Raises:
      InputError: masks that do not fit the graph of the model.
    """
    graph = Graph.of(model.config)
    masks = _stacked(graph, circuits, task)
    others = None if references is None else _stacked(graph, references, task)
    if others is not None and others.shape != masks.shape:
        raise InputError(f"{len(masks)} circuits need as many references of the same kind, got {len(others)}")
    resampled = isinstance(ablation, str) and ablation == "resample"
    # the run of the corrupt prompts is then made together with the clean one
    with_run = resampled and has_constant_rest(model) and splits_by_run(model)
    patch = None if with_run else ablation_values(model, task, ablation, reference_task)
    chosen, back = _distinct(masks if others is None else np.stack([masks, others], 1))
    known = np.zeros(len(chosen), bool)
    if others is None:
        # the whole graph is the model, which is run anyway
        known = (masks[chosen] == _everywhere(graph, masks)).reshape(len(chosen), -1).all(1)
    if known.all():
        # one run is needed to learn what the model does
        known[0] = False
    chosen, n = chosen[~known], int((~known).sum())
    if batch_size is None:
        batch_size = 1 if jax.default_backend() == "cpu" else 8
    chunks = -(-n // batch_size)
    room = max(-(-_ROOM // batch_size), 1 << (chunks - 1).bit_length())
    kinds = [m[chosen] for m in (masks, others) if m is not None]
    # circuits that run side by side are computed whole
    needs = [needed(graph, m, from_input=resampled) for m in kinds] if batch_size == 1 else []
    stacked = jax.tree.map(lambda m: _chunked(m, room, batch_size), (tuple(kinds), tuple(needs)))
    out = _run(model, task, patch, jnp.asarray(chunks, jnp.int32), *stacked)
    runs = CircuitRuns(*(np.asarray(x)[:n] for x in out))
    return _with_model(runs, known)[back]


def _with_model(runs: CircuitRuns, known: Bool[np.ndarray, " circuit"]) -> CircuitRuns:
    """The runs, with those of the model itself put in where they were left out."""
    out = runs[np.maximum(np.cumsum(~known) - 1, 0)]
    at = known[:, None]
    return CircuitRuns(
        np.where(at, out.reference_metric, out.metric),
        np.where(at, np.zeros_like(out.kl), out.kl),
        np.where(at, out.reference_prediction, out.prediction),
        out.reference_metric,
        out.reference_prediction,
    )


def _distinct(masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows that differ, and for every row its number among them: pruning leaves many small circuits without an edge."""
    numbers: dict[bytes, int] = {}
    packed = np.packbits(masks.reshape(len(masks), -1), axis=1)
    back = np.array([numbers.setdefault(row.tobytes(), len(numbers)) for row in packed])
    return np.unique(back, return_index=True)[1], back


def _everywhere(graph: Graph, masks: np.ndarray) -> np.ndarray:
    """The edges of the graph against stacked masks, which may have a position axis."""
    return graph.edges if masks.ndim == 3 else graph.edges[:, :, None]


def _stacked(graph: Graph, circuits: Sequence[np.ndarray] | np.ndarray, task: Task) -> np.ndarray:
    if len(circuits) == 0:
        raise InputError("no circuit to run: give at least one boolean mask [source reader]")
    shapes = {np.shape(c) for c in circuits}
    wanted = graph.edges.shape
    if shapes not in ({wanted}, {(*wanted, task.clean.shape[1])}):
        raise InputError(
            f"circuits must all be masks {wanted} (source reader) of this model, or {(*wanted, task.clean.shape[1])} "
            f"with a position axis; got {sorted(shapes)}"
        )
    masks = np.stack([np.asarray(c) for c in circuits])
    if masks.dtype != bool:
        raise InputError(f"circuits are boolean masks, got {masks.dtype}; choose edges of scores with `top_edges`")
    return masks & _everywhere(graph, masks)


def _chunked(masks: np.ndarray, room: int, batch_size: int) -> Array:
    padded = np.zeros((room * batch_size, *masks.shape[1:]), bool)
    padded[: len(masks)] = masks
    return jnp.asarray(padded.reshape(room, batch_size, *masks.shape[1:]))


@eqx.filter_jit
def _run(
    model: Decoder,
    task: Task,
    patch: Array | None,
    chunks: Int[Array, ""],
    masks: tuple[Array, ...],
    needs: tuple[Needs, ...],
) -> tuple[Array, ...]:
    """Numbers of the first `chunks` chunks, and anything after them.

    Args:
      patch: what ablated sources write; None for what they write in the corrupt prompts (`splits_by_run`).
      masks: circuits in chunks, and the circuits that they are compared with, if not with the whole model.
      needs: of each, or empty: then all is computed.
    """
    common = last = None
    if patch is None:
        common, last = shared_with_run(model, task.clean, task.corrupt, task.mask)
    elif has_constant_rest(model):
        common = shared(model, task.clean, patch)
    streams = [
        _streams(model, task, common, patch, chunks, *each)
        for each in zip(masks, needs or (None,) * len(masks), strict=True)
    ]
    whole = None
    if len(masks) == 1:
        if last is None:
            whole = model(task.clean, task.mask, output_pos=task.position)
        else:
            whole = head_logits(model, jnp.take_along_axis(last, task.position[:, None, None], axis=1))

    def logits_of(x):
        rows = head_logits(model, x.reshape(-1, 1, x.shape[-1]))
        return rows.reshape(*x.shape[:3], -1)

    def numbers(logits, reference):
        tops = [jnp.argmax(x[:, 0], -1).astype(jnp.int32) for x in (logits, reference)]
        return task.metric(logits), kl_divergence(logits, reference), tops[0], task.metric(reference), tops[1]

    # the unembedding is large and a circuit has few rows for it: several circuits share one product
    together = max(1, ROWS_TOGETHER // task.clean.shape[0])
    n_circuits = -(-len(streams[0]) // together) * together
    streams = [jnp.pad(x, ((0, n_circuits - len(x)), (0, 0), (0, 0), (0, 0))) for x in streams]

    def some(i):
        logits = [logits_of(jax.lax.dynamic_slice_in_dim(x, i * together, together)) for x in streams]
        if whole is not None:
            return jax.vmap(lambda x: numbers(x, whole))(logits[0])
        return jax.vmap(numbers)(*logits)

    def body(i, out):
        return jax.tree.map(
            lambda full, new: jax.lax.dynamic_update_slice_in_dim(full, new, i * together, 0), out, some(i)
        )

    shapes = jax.eval_shape(some, jnp.zeros((), jnp.int32))
    empty = jax.tree.map(lambda s: jnp.zeros((n_circuits, *s.shape[1:]), s.dtype), shapes)
    done = (chunks * masks[0].shape[1] + together - 1) // together
    return jax.lax.fori_loop(0, done, body, empty)


def _streams(
    model: Decoder,
    task: Task,
    common: Shared | None,
    patch: Array | None,
    chunks: Array,
    masks: Array,
    needs: Needs | None,
) -> Float[Array, "circuit batch 1 d_model"]:
    """What the logits of every circuit are read from."""
    edges = jnp.asarray(Graph.of(model.config).edges)
    edges, dtype = edges if masks.ndim == 4 else edges[:, :, None], model.unembedding.dtype

    def one(mask, needs):
        if common is not None:
            kept = (edges & mask).astype(dtype)
            return circuit_stream(model, common, kept, task.mask, task.position, needs)
        cut = (edges & ~mask).astype(dtype)
        return masked_stream(model, task.clean, cut, patch, task.mask, output_pos=task.position)

    def chunk(i):
        mine = None if needs is None else jax.tree.map(lambda a: a[i, 0], needs)
        # a batch of one is left as it is: vmap would turn its matrix products into batched ones
        return one(masks[i, 0], mine)[None] if masks.shape[1] == 1 else jax.vmap(lambda m: one(m, None))(masks[i])

    batch, d_model = task.clean.shape[0], model.config.d_model
    empty = jnp.zeros((*masks.shape[:2], batch, 1, d_model), dtype)
    found = jax.lax.fori_loop(0, chunks, lambda i, out: out.at[i].set(chunk(i)), empty)
    return found.reshape(-1, batch, 1, d_model)
