"""Edges between features: how much of a node's effect on the metric comes through which later node."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mi_jax.circuits.features.effects import difference
from mi_jax.circuits.features.spliced import Place, SplicedModel, States, activations, at_position
from mi_jax.core.gradients import site_gradients
from mi_jax.data.task import Task
from mi_jax.decomposition.dictionary import Dictionary
from mi_jax.models.block import block
from mi_jax.models.decoder import Decoder
from mi_jax.models.layout import Prompts


class _CutTap:
    """Records the sites with dictionaries and, where there is one, holds what follows to a constant plus an addition.

    Attributes:
      seen: the sites' values by name.
    """

    def __init__(self, additions: dict[str, Array], cut: dict[str, Array]):
        self._additions, self._cut = additions, cut
        self.seen: dict[str, Array] = {}

    def touches(self, name: str) -> bool:
        return False

    def __call__(self, name: str, x: Array) -> Array:
        if name not in self._additions:
            return x
        self.seen[name] = x
        return jnp.where(self._cut[name], jax.lax.stop_gradient(x), x) + self._additions[name]


def feature_edges(
    spliced: SplicedModel, task: Task, nodes: Int[np.ndarray, "node 3"], *, ablation: str, batch_size: int = 4
) -> Float[np.ndarray, "target source"]:
    """Edges between nodes, by one backward pass per target.

    With m the metric, d a later node, u an earlier one: ∂m/∂d · ∂d/∂u · (u − u'), summed over the prompts' mean, where
    ∂d/∂u goes around every other node: all places between the two are held. So it is the share of u's effect that
    comes through d directly. At errors, ∂m/∂d · ∂d is a product of vectors.

    Args:
      nodes: rows of place (an index into `spliced.places`), position (−1: all) and latent (−1: the error).
      ablation: what u' is; see `feature_effects`.
    """
    clean, moved, gradients = _at_places(spliced, task, ablation)
    cotangents, written = [], []
    for index, place in enumerate(spliced.places):
        of_place = np.flatnonzero(nodes[:, 0] == index)
        size = 1 << max(0, len(of_place) - 1).bit_length()
        chosen = jnp.asarray(np.pad(nodes[of_place], ((0, size - len(of_place)), (0, 0))), jnp.int32)
        values = clean[place], gradients[place], moved.codes[place], moved.errors[place]
        found = _vectors(spliced.dictionaries[place], *values, chosen)
        for out, vectors in zip((cotangents, written), found, strict=True):
            out.append(np.asarray(vectors)[: len(of_place)])
    order = np.argsort(nodes[:, 0], kind="stable")
    place_of = jnp.asarray(nodes[order, 0], jnp.int32)
    inputs = jnp.concatenate(cotangents), jnp.concatenate(written)
    found = np.asarray(_edges(spliced, task, place_of, *inputs, batch_size))
    back = np.argsort(order)
    return found[np.ix_(back, back)]


@eqx.filter_jit
def _at_places(
    spliced: SplicedModel, task: Task, ablation: str
) -> tuple[dict[Place, Array], States, dict[Place, Array]]:
    clean = activations(spliced, task.clean, task.mask)
    options = {"mask": task.mask, "output_pos": task.position}
    _, _, found = site_gradients(spliced.model, task.metric, spliced.sites, task.clean, options)
    gradients = {(site, n): found[site][n] for site, n in spliced.places}
    return clean, difference(spliced, task, clean, ablation), gradients


@eqx.filter_jit
def _vectors(
    dictionary: Dictionary, x: Array, gradient: Array, dz: Array, error: Array, nodes: Array
) -> tuple[Float[Array, "node batch pos d_model"], Float[Array, "node batch pos d_model"]]:
    """Of each node: the gradient at x of its part of the metric, and what its ablation takes off x."""
    d_sae = dictionary.d_sae

    def parts(x):
        codes = dictionary.encode(x)
        return codes, x - dictionary.decode(codes)

    _, pullback = jax.vjp(parts, x)
    of_codes = gradient @ dictionary.w_dec.T

    def vectors(node):
        here = at_position(node[1], x.shape[1])[None, :, None].astype(x.dtype)
        latent = (jnp.arange(d_sae, dtype=jnp.int32) == node[2])[None, None, :].astype(x.dtype)
        is_error = (node[2] < 0).astype(x.dtype)
        of_latent = jnp.broadcast_to(here * latent, dz.shape)
        of_error = jnp.broadcast_to(here * is_error, x.shape)
        (cotangent,) = pullback((of_codes * of_latent, gradient * of_error))
        return cotangent, (dz * of_latent) @ dictionary.w_dec + error * of_error

    return jax.lax.map(vectors, nodes)


@eqx.filter_jit
def _edges(
    spliced: SplicedModel, task: Task, place_of: Array, cotangents: Array, written: Array, batch_size: int
) -> Float[Array, "target source"]:
    model, places = spliced.model, spliced.places
    shape = (model.config.n_layers, *cotangents.shape[1:])
    zeros = {site: jnp.zeros(shape, cotangents.dtype) for site in spliced.sites}
    layers = jnp.arange(model.config.n_layers)
    cut = {site: jnp.isin(layers, jnp.asarray([n for name, n in places if name == site])) for site in spliced.sites}
    out, pullback = jax.vjp(lambda added: _cut_streams(model, task.clean, task.mask, added, cut), zeros)

    def row(target):
        place, cotangent = target
        at = {}
        for site in spliced.sites:
            hit = jnp.zeros(model.config.n_layers, bool)
            for index, (name, layer) in enumerate(places):
                if name == site:
                    hit = hit.at[layer].set(place == index)
            at[site] = hit[:, None, None, None].astype(cotangent.dtype) * cotangent[None].astype(out[site].dtype)
        (gradient,) = pullback(at)
        by_place = jnp.stack([gradient[site][layer] for site, layer in places])
        return (by_place[place_of] * written).sum((1, 2, 3))

    return jax.lax.map(row, (place_of, cotangents), batch_size=batch_size)


def _cut_streams(
    model: Decoder, tokens: Array, mask: Array, additions: dict[str, Array], cut: dict[str, Bool[Array, " layer"]]
) -> dict[str, Float[Array, "layer batch pos d_model"]]:
    """The sites' values as functions of the additions at the places before, each going around all other places."""
    x, mask = model.embedded(tokens, mask)

    def body(x, row):
        number, params, added, here = row
        tap = _CutTap(added, here)
        x = block(model.layer(number, params), x, tap, model.config, Prompts(mask))
        return x, tap.seen

    numbers = jnp.arange(model.config.n_layers, dtype=jnp.int32)
    return jax.lax.scan(body, x, (numbers, model.blocks, additions, cut))[1]
