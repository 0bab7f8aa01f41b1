"""Edge scores: how much the metric changes when one edge carries the corrupt run's value.

`eap`: edge attribution patching (Syed et al. 2023), `score(s→r) = (z'_s − z_s) · ∂m/∂v_r`, gradient on the clean run.
`eap-ig`: the gradient averaged over inputs on the line from the corrupt to the clean embedding, the clean end excluded
(EAP-IG-inputs, Hanna et al. 2024). `exact`: every edge patched on its own, one run each.
"""

from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mi_jax.circuits.graph import Graph
from mi_jax.circuits.masked import embedded, masked_forward, source_outputs
from mi_jax.core.edits import Add, Edit, Patch
from mi_jax.core.index import Index
from mi_jax.data.task import Task
from mi_jax.models.decoder import Decoder

Method = Literal["eap", "eap-ig", "exact"]


@eqx.filter_jit
def _attribution(model: Decoder, task: Task, alphas: Float[Array, " step"]) -> Float[Array, "source reader"]:
    graph, config = Graph.of(model.config), model.config
    clean, corrupt = embedded(model, task.clean), embedded(model, task.corrupt)
    shape = (config.n_layers, *clean.shape)
    sites = {"attn.q_in": config.n_heads, "attn.k_in": config.n_kv_heads, "attn.v_in": config.n_kv_heads}
    zeros = {name: jnp.zeros((*shape[:3], n, shape[3]), clean.dtype) for name, n in sites.items()}
    if graph.has_mlp:
        zeros["mlp.in"] = jnp.zeros(shape, clean.dtype)
    last = jnp.asarray(config.n_layers - 1, jnp.int32)

    def metric(additions, final, alpha):
        taps: dict[str, tuple[Edit, ...]] = {name: (Add(name, Index(), value),) for name, value in additions.items()}
        taps["embed"] = (Patch("embed", Index(), corrupt + alpha * (clean - corrupt)),)
        taps["resid_post"] = (Add("resid_post", Index(layer=last), final),)
        logits = model(task.clean, task.mask, taps=taps, output_pos=task.position)
        return task.logit_difference(logits).mean()

    def one(total, alpha):
        gradients = jax.grad(metric, argnums=(0, 1))(zeros, jnp.zeros_like(clean), alpha)
        return jax.tree.map(jnp.add, total, gradients), None

    total, _ = jax.lax.scan(one, (zeros, jnp.zeros_like(clean)), alphas)
    by_reader, final = jax.tree.map(lambda g: g / alphas.shape[0], total)
    parts = [jnp.moveaxis(by_reader[name], 3, 1) for name in sites]
    if graph.has_mlp:
        parts.append(by_reader["mlp.in"][:, None])
    readers = jnp.concatenate(parts, 1)
    readers = jnp.concatenate([readers.reshape(-1, *readers.shape[2:]), final[None]])
    difference = source_outputs(model, task.corrupt, task.mask) - source_outputs(model, task.clean, task.mask)
    scores = jnp.einsum("sbpd,rbpd->sr", difference, readers)
    return jnp.where(jnp.asarray(graph.edges), scores, 0.0)


@eqx.filter_jit
def _exact(model: Decoder, task: Task, batch_size: int) -> Float[Array, "source reader"]:
    graph = Graph.of(model.config)
    patch = source_outputs(model, task.corrupt, task.mask)
    none = jnp.zeros(graph.edges.shape, patch.dtype)

    def metric(edges):
        logits = masked_forward(model, task.clean, edges, patch, task.mask, output_pos=task.position)
        return task.logit_difference(logits).mean()

    places = jnp.asarray(np.argwhere(graph.edges), jnp.int32)
    effects = jax.lax.map(lambda e: metric(none.at[e[0], e[1]].set(1.0)), places, batch_size=batch_size)
    return none.at[places[:, 0], places[:, 1]].set(effects - metric(none))


def edge_scores(
    model: Decoder, task: Task, *, method: Method = "eap-ig", steps: int = 5, batch_size: int = 16
) -> np.ndarray:
    """Scores of all edges, `[source reader]`: the change of the mean metric when the edge is corrupted.

    Args:
      steps: points of the integral, for "eap-ig".
      batch_size: edges at once, for "exact"; bounds the memory.

    Raises:
      ValueError: an unknown method.
    """
    if method == "exact":
        return np.asarray(_exact(model, task, batch_size))
    if method not in ("eap", "eap-ig"):
        raise ValueError(f"method must be 'eap', 'eap-ig' or 'exact', got {method!r}")
    alphas = np.ones(1) if method == "eap" else np.arange(steps) / steps
    return np.asarray(_attribution(model, task, jnp.asarray(alphas, model.blocks.attn.q.dtype)))
