"""Sparse autoencoders at several sites of one decoder, each with an error node for what it does not reconstruct.

At a site, x = decode(z) + ε. The codes z and the errors ε are the nodes; left alone they change nothing.

Source: Marks et al. 2024, "Sparse Feature Circuits" (arXiv 2403.19647), section 3.
"""

from collections.abc import Mapping
from typing import Literal, get_args

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mi_jax.core.errors import InputError
from mi_jax.core.precision import widened
from mi_jax.core.sites import At
from mi_jax.data.task import Task
from mi_jax.decomposition.dictionary import Dictionary
from mi_jax.models.decoder import Decoder

# a site and a layer
Place = tuple[str, int]
Ablation = Literal["resample", "zero", "mean", "mean-positional"]
_AXES = ("layer", "batch", "pos", "d_model")


class SplicedModel(eqx.Module):
    """See `splice_dictionaries`."""

    model: Decoder
    dictionaries: dict[Place, Dictionary]

    @property
    def places(self) -> tuple[Place, ...]:
        """In the order in which the model computes them."""
        order = self.model.site_table.names
        return tuple(sorted(self.dictionaries, key=lambda place: (place[1], order.index(place[0]))))

    @property
    def sites(self) -> tuple[str, ...]:
        """Sites with a dictionary at some layer."""
        return tuple(dict.fromkeys(site for site, _ in self.places))


class States(eqx.Module):
    """Nodes' values at every place.

    Attributes:
      codes: of the latents.
      errors: what the dictionaries do not reconstruct.
    """

    codes: dict[Place, Float[Array, "batch pos _"]]
    errors: dict[Place, Float[Array, "batch pos d_model"]]


def splice_dictionaries(model: Decoder, dictionaries: Mapping[Place, Dictionary]) -> SplicedModel:
    """A decoder with sparse autoencoders at some places.

    Args:
      dictionaries: by site and layer, such as `{("resid_post", 0): sae}`; sites are those of width d_model: streams,
        `attn_out` and `mlp_out`.

    Raises:
      SiteError: an unknown site or layer.
      InputError: no dictionary, one of another width, or one that is no sum of its codes' directions.
    """
    if not dictionaries:
        raise InputError("there are no dictionaries: give one at least, such as {('resid_post', 0): sae}")
    table, found = model.site_table, {}
    for (name, layer), one in dictionaries.items():
        site, _ = table.resolve(name)
        if site.axes != _AXES:
            raise InputError(f"{site.name!r} has axes {' '.join(site.axes)}; dictionaries go to {' '.join(_AXES)}")
        table.check_index(site, "layer", layer)
        if (one.d_in, one.d_out) != (model.config.d_model,) * 2:
            raise InputError(
                f"the dictionary of {site.name!r} layer {layer} reads width {one.d_in} and writes {one.d_out}; "
                f"{model.config.name} has d_model={model.config.d_model}: is it of another model?"
            )
        if one.w_skip is not None or one.token_norm is not None:
            raise InputError(
                f"the dictionary of {site.name!r} layer {layer} has a skip or a token norm; a sparse feature circuit "
                "needs reconstructions that are sums of the codes' directions"
            )
        found[(site.name, layer)] = one
    return SplicedModel(model, found)


def activations(spliced: SplicedModel, tokens: Array, mask: Array) -> dict[Place, Float[Array, "batch pos d_model"]]:
    """What the places hold in a plain run."""
    layers = {site: tuple(n for name, n in spliced.places if name == site) for site in spliced.sites}
    wanted = tuple(At(site, chosen) for site, chosen in layers.items())
    _, acts = spliced.model(tokens, mask, capture=wanted, output=False)
    return {(site, n): acts[site][i] for site, chosen in layers.items() for i, n in enumerate(chosen)}


def states(spliced: SplicedModel, acts: Mapping[Place, Array]) -> States:
    """Codes and errors of activations."""
    codes = {place: one.encode(acts[place]) for place, one in spliced.dictionaries.items()}
    errors = {place: acts[place] - one.decode(codes[place]) for place, one in spliced.dictionaries.items()}
    return States(codes, errors)


def ablated_states(spliced: SplicedModel, task: Task, ablation: str) -> States:
    """What nodes hold when they are ablated: see `feature_effects`."""
    found = states(spliced, activations(spliced, task.corrupt, task.mask))

    def value(x):
        if ablation == "resample":
            return x
        if ablation == "zero":
            return jnp.zeros_like(x)
        exact = widened(x)
        weights = task.mask[:, :, None].astype(exact.dtype)
        over = 0 if ablation == "mean-positional" else (0, 1)
        total = (exact * jnp.broadcast_to(weights, x.shape)).sum(over, keepdims=True)
        count = jnp.maximum(weights.sum(over, keepdims=True), 1)
        return jnp.broadcast_to(total / jnp.broadcast_to(count, total.shape), x.shape).astype(x.dtype)

    codes = {place: value(x) for place, x in found.codes.items()}
    return States(codes, {place: value(x) for place, x in found.errors.items()})


def check_ablation(ablation: str) -> None:
    """Raises InputError for an unknown ablation."""
    if ablation not in get_args(Ablation):
        raise InputError(f"ablation is one of {', '.join(get_args(Ablation))}; got {ablation!r}")


class NodeSplice(eqx.Module):
    """Puts ablated values in place of the nodes that are not kept; a value for `mi.transform`."""

    dictionary: Dictionary
    keep_codes: Bool[Array, "pos d_sae"]
    keep_errors: Bool[Array, " pos"]
    codes: Float[Array, "batch pos d_sae"]
    errors: Float[Array, "batch pos d_model"]

    def __call__(self, x: Float[Array, "batch pos d_model"]) -> Float[Array, "batch pos d_model"]:
        z = self.dictionary.encode(x)
        error = x - self.dictionary.decode(z)
        z = jnp.where(jnp.broadcast_to(self.keep_codes[None], z.shape), z, self.codes)
        error = jnp.where(jnp.broadcast_to(self.keep_errors[None, :, None], error.shape), error, self.errors)
        return self.dictionary.decode(z) + error


def at_position(pos: Int[Array, ""], n_pos: int) -> Bool[Array, " pos"]:
    """One position; all of them where it is negative."""
    return (jnp.arange(n_pos, dtype=jnp.int32) == pos) | (pos < 0)
