"""The program behind `circuit_runs`: the streams of all circuits, one after the other, and their logits together."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mi_jax.circuits.graph import Graph
from mi_jax.circuits.runs.divergence import kl_divergence, prediction
from mi_jax.circuits.runs.masked import embedded, head_logits, masked_stream
from mi_jax.data.task import Task
from mi_jax.models.decoder import Decoder

# prompts, of however many circuits, whose logits are computed in one product; fewer read the unembedding more often,
# more are empty rows where circuits are few
_ROWS_TOGETHER = 80


@eqx.filter_jit
def run_circuits(
    model: Decoder,
    task: Task,
    patch: Float[Array, "source batch pos d_model"],
    chunks: Int[Array, ""],
    masks: list[Bool[Array, "chunk circuit source reader *pos"]],
    computed: list[Bool[Array, "chunk circuit layer"]],
) -> tuple[Array, ...]:
    """Numbers of the first `chunks` chunks, and anything after them.

    Args:
      patch: what ablated sources write.
      masks: circuits in chunks, and the circuits that they are compared with, if not with the whole model.
      computed: of each the layers that are run, or empty: then all are.
    """
    # values that were given may have another dtype than the stream that they go into
    patch = patch.astype(embedded(model, task.clean).dtype)
    rows = zip(masks, computed or (None,) * len(masks), strict=True)
    streams = [_streams(model, task, patch, chunks, *row) for row in rows]
    whole = model(task.clean, task.mask, output_pos=task.position) if len(masks) == 1 else None
    return compared(model, task, streams, whole, chunks * masks[0].shape[1])


def compared(
    model: Decoder,
    task: Task,
    streams: list[Float[Array, "circuit batch 1 d_model"]],
    whole: Float[Array, "batch 1 d_vocab"] | None,
    n: Int[Array, ""],
) -> tuple[Array, ...]:
    """What `CircuitRuns` holds of the first n runs, and anything after them.

    Args:
      streams: what the logits of every run are read from, and of the runs that they are compared with.
      whole: logits that all are compared with, where there is one set of streams.
    """

    def logits_of(x):
        rows = head_logits(model, x.reshape(-1, 1, x.shape[-1]))
        return rows.reshape(*x.shape[:3], -1)

    def numbers(logits, reference):
        divergence = kl_divergence(logits, reference)
        return task.metric(logits), divergence, prediction(logits), task.metric(reference), prediction(reference)

    # the unembedding is large and a circuit has few rows for it: several circuits share one product
    together = max(1, _ROWS_TOGETHER // task.clean.shape[0])
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
    return jax.lax.fori_loop(0, (n + together - 1) // together, body, empty)


def _streams(
    model: Decoder, task: Task, patch: Array, chunks: Array, masks: Array, computed: Array | None
) -> Float[Array, "circuit batch 1 d_model"]:
    """What the logits of every circuit are read from."""
    edges = jnp.asarray(Graph.of(model.config).edges)
    edges = edges if masks.ndim == 4 else edges[:, :, None]

    def one(mask, layers):
        cut = (edges & ~mask).astype(patch.dtype)
        options = {"output_pos": task.position, "computed": layers, "remat": False}
        return masked_stream(model, task.clean, cut, patch, task.mask, **options)

    def chunk(i):
        mine = None if computed is None else computed[i, 0]
        # a batch of one is left as it is: vmap would turn its matrix products into batched ones
        return one(masks[i, 0], mine)[None] if masks.shape[1] == 1 else jax.vmap(lambda m: one(m, None))(masks[i])

    batch, d_model = task.clean.shape[0], model.config.d_model
    empty = jnp.zeros((*masks.shape[:2], batch, 1, d_model), patch.dtype)
    found = jax.lax.fori_loop(0, chunks, lambda i, out: out.at[i].set(chunk(i)), empty)
    return found.reshape(-1, batch, 1, d_model)
