"""The directions of the features that an attribute model carries, and whether they are true.

Two things are measured: how much of the stream's variance the attributes explain on held-out sequences, and whether
adding an attribute's direction changes the prediction as the attribute itself would.
"""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from mi_jax.core.edits import add
from mi_jax.core.errors import InputError
from mi_jax.core.transforms import intervene
from mi_jax.models.decoder import Decoder
from mi_jax.validation.attribute_model import FIRST, LAYER, SITE, AttributeModel
from mi_jax.validation.attribute_task import AttributeTask


@dataclasses.dataclass(frozen=True)
class FeatureDirections:
    """The directions of the features, and how linear the stream is in them; all R² are on held-out sequences.

    The null gives every token the attributes of another one, which keeps frequencies, trees and sequences.

    Attributes:
      directions: by least squares of the stream on all features: what one adds while the others stay.
      offset: the stream where no feature is present.
      frequencies: of the features.
      explained: R² of the stream given the features.
      readout: R² of each feature given the stream.
      mean_difference_cosine: of each direction with the difference of the stream's means with and without the feature,
        which also holds what the other features that come along with it add.
    """

    directions: Float[np.ndarray, "feature d_model"]
    offset: Float[np.ndarray, " d_model"]
    frequencies: Float[np.ndarray, " feature"]
    explained: float
    explained_null: float
    readout: Float[np.ndarray, " feature"]
    readout_null: Float[np.ndarray, " feature"]
    mean_difference_cosine: Float[np.ndarray, " feature"]


@dataclasses.dataclass(frozen=True)
class FeatureEffect:
    """What adding or taking away a feature's direction does to the prediction, beside what the rule says.

    Changes of the logits are written as a sum over attributes, by least squares. The null flips each feature along the
    direction of another one.

    Attributes:
      slope: per feature, of the model's change on the rule's; 1 is as strong as in the rule.
      correlation: of the two, over all examples, features and attributes.
    """

    slope: Float[np.ndarray, " feature"]
    slope_null: Float[np.ndarray, " feature"]
    correlation: float
    correlation_null: float


def true_directions(
    trained: AttributeModel, tokens: Int[Array, "batch pos"], *, key: PRNGKeyArray
) -> FeatureDirections:
    """The direction of every feature, from the first half of the sequences; R² on the second half.

    Example:
      `truth = true_directions(trained, trained.task.sequences(4096, key=k_tokens), key=k_null)`; features that a
      dictionary finds are compared with `truth.directions`, and its codes with the features of `activations`.

    Raises:
      InputError: a feature, or its null, that one half of the sequences lacks.
    """
    x, features = (np.asarray(a, np.float64) for a in trained.activations(tokens))
    permuted = trained.task.attributes[jax.random.permutation(key, trained.task.config.n_tokens)]
    other = eqx.tree_at(lambda task: task.attributes, trained.task, permuted)
    null = np.asarray(other.features(tokens)[:, FIRST:], np.float64)
    half = len(x) // 2
    (x_fit, x_test), (f_fit, f_test), (n_fit, n_test) = (_halves(a, half) for a in (x, features, null))
    rarest = min(part.sum(0).min(initial=np.inf) for part in (f_fit, f_test, n_fit, n_test))
    if rarest < 1:
        raise InputError(f"{len(x)} sequences are too few: in one half of them, some attribute never occurs")
    weights = _least_squares(f_fit, x_fit)
    difference = np.stack([x_fit[f > 0.5].mean(0) - x_fit[f < 0.5].mean(0) for f in f_fit.T])
    lengths = np.linalg.norm(difference, axis=1) * np.linalg.norm(weights[:-1], axis=1)
    return FeatureDirections(
        directions=weights[:-1].astype(np.float32),
        offset=weights[-1].astype(np.float32),
        frequencies=features.mean((0, 1)).astype(np.float32),
        explained=_explained(f_fit, x_fit, f_test, x_test),
        explained_null=_explained(n_fit, x_fit, n_test, x_test),
        readout=_explained_each(x_fit, f_fit, x_test, f_test),
        readout_null=_explained_each(x_fit, n_fit, x_test, n_test),
        mean_difference_cosine=((difference * weights[:-1]).sum(1) / lengths).astype(np.float32),
    )


def causal_effect(
    trained: AttributeModel, directions: Float[np.ndarray, "feature d_model"], tokens: Int[Array, "batch pos"]
) -> FeatureEffect:
    """Flips every feature, one at a time, in the middle of every sequence, by adding or subtracting its direction."""
    task, pos = trained.task, trained.task.config.n_pos // 2
    rows = jnp.asarray(directions)
    # within the attributes of the current token, and within those of the last
    others = jnp.concatenate([jnp.roll(part, 1, axis=0) for part in jnp.split(rows, 2)])
    change, null = (np.asarray(_changes(trained.model, task, d, tokens, pos), np.float64) for d in (rows, others))
    rule = np.asarray(_rule_changes(task, tokens, pos), np.float64)
    scale = (rule**2).sum((1, 2))
    return FeatureEffect(
        slope=((change * rule).sum((1, 2)) / scale).astype(np.float32),
        slope_null=((null * rule).sum((1, 2)) / scale).astype(np.float32),
        correlation=float(np.corrcoef(change.ravel(), rule.ravel())[0, 1]),
        correlation_null=float(np.corrcoef(null.ravel(), rule.ravel())[0, 1]),
    )


@eqx.filter_jit
def _changes(
    model: Decoder,
    task: AttributeTask,
    directions: Float[Array, "feature d_model"],
    tokens: Int[Array, "batch pos"],
    pos: int,
) -> Float[Array, "feature batch attribute"]:
    """What flipping each feature at a position changes in the logits that it matters for, as a sum over attributes."""
    present = task.features(tokens)[:, pos]
    plain = model(tokens)
    centred = task.attributes - task.attributes.mean(0, keepdims=True)
    read = jnp.linalg.pinv(centred)

    def flipped(number: Int[Array, ""]) -> Array:
        sign = 1 - 2 * present[:, number]
        edit = add(SITE, sign[:, None, None] * directions[number][None, None, :], layer=LAYER, pos=pos)
        change = intervene(model, edit)(tokens) - plain
        change = jnp.where(number < task.config.n_attributes, change[:, pos], change[:, pos + 1])
        return (change - change.mean(1, keepdims=True)) @ read.T

    return jax.lax.map(flipped, jnp.arange(task.n_features, dtype=jnp.int32))


def _rule_changes(
    task: AttributeTask, tokens: Int[Array, "batch pos"], pos: int
) -> Float[Array, "feature batch attribute"]:
    """The same by the rule: attributes of the current token matter here, those of the one before at the next token."""
    here, before, after = (task.attributes[tokens[:, p]] for p in (pos, pos - 1, pos + 1))
    flips = jnp.eye(task.config.n_attributes)[:, None, :]
    two_back = task.attributes[tokens[:, pos - 2]]

    def flip(x: Array) -> Array:
        return x[None] + flips * (1 - 2 * x[None])

    def whole(x: Array) -> Array:
        return jnp.broadcast_to(x[None], (len(flips), *x.shape))

    now = task.evidence(flip(here), whole(two_back)) - task.evidence(here, two_back)[None]
    later = task.evidence(whole(after), flip(before)) - task.evidence(after, before)[None]
    return task.config.strength * jnp.concatenate([now, later])


def _halves(x: np.ndarray, half: int) -> tuple[np.ndarray, np.ndarray]:
    return x[:half].reshape(-1, x.shape[-1]), x[half:].reshape(-1, x.shape[-1])


def _least_squares(inputs: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """Weights, with the intercept as the last row."""
    return np.linalg.lstsq(np.c_[inputs, np.ones(len(inputs))], outputs, rcond=None)[0]


def _residual(inputs: np.ndarray, outputs: np.ndarray, new_inputs: np.ndarray, new_outputs: np.ndarray) -> np.ndarray:
    """What a least-squares fit leaves of new outputs."""
    weights = _least_squares(inputs, outputs)
    return new_outputs - np.c_[new_inputs, np.ones(len(new_inputs))] @ weights


def _explained(*data: np.ndarray) -> float:
    """R² of all outputs together, on new data."""
    return float(1 - (_residual(*data) ** 2).sum() / ((data[3] - data[3].mean(0)) ** 2).sum())


def _explained_each(*data: np.ndarray) -> np.ndarray:
    """R² of each output, on new data."""
    return (1 - (_residual(*data) ** 2).sum(0) / ((data[3] - data[3].mean(0)) ** 2).sum(0)).astype(np.float32)
