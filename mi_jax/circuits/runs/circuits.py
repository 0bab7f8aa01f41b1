"""Runs of many circuits in one program: the metric, the KL divergence and the prediction of every prompt in each.

A run of a circuit C keeps the edges of C and gives every other edge its ablation value. What the metrics of circuits
say (faithfulness, completeness, minimality, tests) is arithmetic on these numbers, and so are their intervals: prompts
are resampled without running anything again.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mi_jax.circuits.ablation.values import ablation_values
from mi_jax.circuits.graph import Graph
from mi_jax.circuits.graph.paths import layers_on_paths
from mi_jax.circuits.runs.program import run_circuits
from mi_jax.core.errors import InputError
from mi_jax.data.task import Task
from mi_jax.models.decoder import Decoder

# Room for this many circuits at the least, so that calls with fewer share one compiled program.
_ROOM = 64


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
      batch_size: circuits at once, which bounds the memory; None: one on a CPU, eight on an accelerator. One at a time,
        layers without a source on a path of kept edges are left out.

    Raises:
      InputError: masks that do not fit the graph of the model, or no circuits at once.
    """
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size is at least 1 circuit at once, or None; got {batch_size}")
    graph = Graph.of(model.config)
    masks = _stacked(graph, circuits, task)
    others = None if references is None else _stacked(graph, references, task)
    if others is not None and others.shape != masks.shape:
        raise InputError(
            f"circuits and references go in pairs of one kind, with a position axis or without; got circuits "
            f"{masks.shape} and references {others.shape}"
        )
    chosen, back = _distinct(masks if others is None else np.stack([masks, others], 1))
    known = np.zeros(len(chosen), bool)
    if others is None:
        # the whole graph is the model, which is run anyway
        known = (masks[chosen] == graph.edges_like(masks[0])).reshape(len(chosen), -1).all(1)
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
    computed = [np.stack([layers_on_paths(graph, m, ablation=ablation) for m in kind]) for kind in kinds]
    rows = jax.tree.map(lambda m: _chunked(m, room, batch_size), (kinds, computed if batch_size == 1 else []))
    patch = ablation_values(model, task, ablation, reference_task)
    out = run_circuits(model, task, patch, jnp.asarray(chunks, jnp.int32), *rows)
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
    return masks & graph.edges_like(masks[0])


def _chunked(masks: np.ndarray, room: int, batch_size: int) -> Array:
    padded = np.zeros((room * batch_size, *masks.shape[1:]), masks.dtype)
    padded[: len(masks)] = masks
    return jnp.asarray(padded.reshape(room, batch_size, *masks.shape[1:]))
