"""Ablation values: what a corrupted edge carries instead of what its source wrote.

Resampled values are those of the task's corrupt prompts. Means are over real tokens only, one vector a source, or one
for every position of a source. Optimal values are in `mi_jax.circuits.ablation.optimal`.
"""

from typing import Literal, get_args

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from mi_jax.circuits.ablation.means import source_means
from mi_jax.circuits.ablation.optimal import held_out_constants
from mi_jax.circuits.ablation.optimal import optimal_ablation as optimal_ablation
from mi_jax.circuits.graph import Graph
from mi_jax.circuits.runs.sources import source_outputs
from mi_jax.core.errors import InputError
from mi_jax.data.task import Task
from mi_jax.models.decoder import Decoder

Ablation = Literal["resample", "zero", "mean", "mean-positional", "optimal"]


def ablation_values(
    model: Decoder,
    task: Task,
    ablation: str | Float[Array, "source batch pos d_model"] = "resample",
    reference: Task | None = None,
) -> Float[Array, "source batch pos d_model"]:
    """The `patch` of masked runs of this task.

    Args:
      ablation: "resample", what the sources write in the corrupt prompt of each pair; "zero"; "mean", one vector a
        source, over all real tokens; "mean-positional", one vector a source and position, over all prompts that have a
        token there (the mean over all tokens where none has); "optimal", `optimal_ablation` of the circuit without
        edges, fitted on the reference, or without one for each half of the prompts on the other half. Values that were
        computed before are returned as they are.
      reference: whose corrupt prompts means are taken over, and which optimal values are fitted on; None is the task
        itself.

    Raises:
      InputError: an unknown ablation, values of another shape, a reference with shorter prompts, or optimal values for
        one prompt without a reference.
    """
    if not isinstance(ablation, str):
        shape = (Graph.of(model.config).n_sources, *task.clean.shape, model.config.d_model)
        if ablation.shape != shape:
            raise InputError(f"ablation values have shape {shape} [source batch pos d_model], got {ablation.shape}")
        return ablation
    if ablation not in get_args(Ablation):
        raise InputError(f"ablation is one of {', '.join(get_args(Ablation))}, or an array; got {ablation!r}")
    if ablation == "optimal":
        return held_out_constants(model, task, reference)
    reference = task if reference is None else reference
    if ablation == "mean-positional" and reference.corrupt.shape[1] < task.clean.shape[1]:
        raise InputError(
            f"means per position need a reference at least as long as the task: its prompts have "
            f"{reference.corrupt.shape[1]} positions, those of the task {task.clean.shape[1]}; use ablation='mean'"
        )
    return _values(model, task, ablation, reference)


@eqx.filter_jit
def _values(model: Decoder, task: Task, ablation: str, reference: Task) -> Array:
    if ablation == "resample":
        return source_outputs(model, task.corrupt, task.mask)
    batch, n_pos = task.clean.shape
    if ablation == "zero":
        graph = Graph.of(model.config)
        dtype = model.unembedding.dtype
        return jnp.zeros((graph.n_sources, batch, n_pos, model.config.d_model), dtype)
    means = source_means(model, reference, positional=ablation == "mean-positional").mean
    shape = (means.shape[0], batch, n_pos, means.shape[-1])
    return jnp.broadcast_to(means[:, None, :n_pos], shape).astype(model.unembedding.dtype)
