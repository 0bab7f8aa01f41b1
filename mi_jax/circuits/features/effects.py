"""Effects of single features and errors on a metric: exact, by their gradient, or by integrated gradients."""

import dataclasses
from typing import Literal, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mi_jax.circuits.features.spliced import (
    Place,
    SplicedModel,
    States,
    ablated_states,
    activations,
    at_position,
    check_ablation,
    states,
)
from mi_jax.core.edits import Patch, add
from mi_jax.core.effects import mean_metric
from mi_jax.core.errors import InputError
from mi_jax.core.gradients import site_gradients
from mi_jax.core.index import Index
from mi_jax.core.precision import widened_dtype
from mi_jax.core.transforms import intervene
from mi_jax.data.task import Task

Method = Literal["attribution", "ig", "exact"]


@dataclasses.dataclass(frozen=True)
class FeatureEffects:
    """How much the mean metric falls when one node is ablated, at one position of all prompts.

    Attributes:
      features: at every place, of each position and latent.
      errors: at every place, of the error at each position.
      metric: of the clean prompts.
      method: how they were got.
    """

    features: dict[Place, Float[np.ndarray, "pos _"]]
    errors: dict[Place, Float[np.ndarray, " pos"]]
    metric: float
    method: str

    def over_positions(self) -> "FeatureEffects":
        """The sums over positions, for prompts whose positions do not correspond."""
        features = {place: x.sum(0, keepdims=True) for place, x in self.features.items()}
        errors = {place: x.sum(0, keepdims=True) for place, x in self.errors.items()}
        return dataclasses.replace(self, features=features, errors=errors)


def feature_effects(
    spliced: SplicedModel,
    task: Task,
    *,
    method: Method = "attribution",
    ablation: str = "resample",
    steps: int = 10,
    batch_size: int = 16,
) -> FeatureEffects:
    """Effects of all features and errors.

    With a the clean and a' the ablated value of a node: "exact" is m(a) − m(a'), one run per node that differs;
    "attribution" is (a − a') ∂m/∂a at the clean run, one backward pass for all; "ig" averages the gradient over
    `steps` midpoints of the way from a' to a, all nodes of a place moved together, `steps` backward passes per place.

    Args:
      ablation: "resample", the values of the corrupt prompts; "zero"; "mean", over all real tokens of the corrupt
        prompts; "mean-positional", over the prompts at each position.
      batch_size: runs at a time.

    Raises:
      InputError: an unknown method or ablation, or no step.
    """
    check_ablation(ablation)
    if method not in get_args(Method) or steps < 1:
        raise InputError(
            f"method is one of {', '.join(get_args(Method))}, with 1 step or more; got {method!r}, {steps}"
        )
    clean, moved, gradients, value = _gradients(spliced, task, ablation)
    features, errors = {}, {}
    for place, one in spliced.dictionaries.items():
        dz, error = moved.codes[place], moved.errors[place]
        if method == "exact":
            features[place], errors[place] = _exact(spliced, task, place, dz, error, value, batch_size)
            continue
        gradient = gradients[place]
        if method == "ig":
            change = one.w_dec, dz, error
            gradient = _mean_gradient(spliced.model, task, place[0], jnp.int32(place[1]), clean[place], *change, steps)
        found = _products(gradient, one.w_dec, dz, error)
        features[place], errors[place] = (np.asarray(x) for x in found)
    return FeatureEffects(features, errors, float(value), method)


@eqx.filter_jit
def _gradients(
    spliced: SplicedModel, task: Task, ablation: str
) -> tuple[dict[Place, Array], States, dict[Place, Array], Float[Array, ""]]:
    """Clean activations, clean minus ablated nodes, gradients of the mean metric, and the metric."""
    clean = activations(spliced, task.clean, task.mask)
    moved = difference(spliced, task, clean, ablation)
    options = {"mask": task.mask, "output_pos": task.position}
    value, _, found = site_gradients(spliced.model, task.metric, spliced.sites, task.clean, options)
    return clean, moved, {(site, n): found[site][n] for site, n in spliced.places}, value


def difference(spliced: SplicedModel, task: Task, clean: dict[Place, Array], ablation: str) -> States:
    """Clean minus ablated values of all nodes; 0 at padding."""
    real = task.mask[:, :, None]
    return jax.tree.map(
        lambda a, b: jnp.where(jnp.broadcast_to(real, a.shape), a - b, 0),
        states(spliced, clean),
        ablated_states(spliced, task, ablation),
    )


@eqx.filter_jit
def _products(gradient: Array, w_dec: Array, dz: Array, error: Array) -> tuple[Array, Array]:
    return ((gradient @ w_dec.T) * dz).sum(0), (gradient * error).sum((0, 2))


@eqx.filter_jit
def _mean_gradient(
    model, task: Task, site: str, layer: Array, clean: Array, w_dec: Array, dz: Array, error: Array, steps: int
) -> Float[Array, "batch pos d_model"]:
    """The mean gradient at a place on the way from the ablated to the clean values of all its nodes."""
    change = dz @ w_dec + error
    options = {"mask": task.mask, "output_pos": task.position}

    def add_one(total, alpha):
        point = Patch(site, Index.of(layer=layer), clean - (1 - alpha) * change)
        before = {site: (point,)}
        _, _, found = site_gradients(model, task.metric, (site,), task.clean, options, before=before)
        return total + found[site][layer], None

    midpoints = (jnp.arange(steps, dtype=clean.dtype) + 0.5) / steps
    return jax.lax.scan(add_one, jnp.zeros(clean.shape, widened_dtype(clean.dtype)), midpoints)[0] / steps


def _exact(
    spliced: SplicedModel, task: Task, place: Place, dz: Array, error: Array, value: Array, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    one = spliced.dictionaries[place]
    n_pos, d_sae = dz.shape[1:]
    # the error is the node after the last latent
    pos, latent = np.nonzero(np.c_[np.asarray(dz != 0).any(0), np.ones((n_pos, 1), bool)])
    padding = (0, (1 << (len(pos) - 1).bit_length()) - len(pos))
    nodes = tuple(jnp.asarray(np.pad(a, padding), jnp.int32) for a in (pos, latent))
    site, layer = place
    found = _exact_runs(spliced.model, task, site, jnp.int32(layer), one.w_dec, dz, error, nodes, batch_size)
    out = np.zeros((n_pos, d_sae + 1), np.float32)
    out[pos, latent] = (np.asarray(value) - np.asarray(found))[: len(pos)]
    return out[:, :-1], out[:, -1]


@eqx.filter_jit
def _exact_runs(
    model, task: Task, site: str, layer: Array, w_dec: Array, dz: Array, error: Array, nodes: tuple, batch_size: int
) -> Float[Array, " node"]:
    """The metric with each of the nodes ablated."""

    def run(node):
        pos, latent = node
        code = jnp.take(dz[:, pos], latent, axis=1, mode="clip")
        change = code[:, None] * jnp.take(w_dec, latent, axis=0, mode="clip")[None, :]
        change = jnp.where(latent == w_dec.shape[0], error[:, pos], change)
        here = at_position(pos, dz.shape[1]).astype(dz.dtype)
        edit = add(site, -change[:, None, :] * here[None, :, None], layer=layer)
        logits = intervene(model, edit)(task.clean, task.mask, output_pos=task.position)
        return mean_metric(task.metric(logits))

    return jax.lax.map(run, nodes, batch_size=batch_size)
