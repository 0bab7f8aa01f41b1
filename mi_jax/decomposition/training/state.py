"""What a training step changes, and where it starts."""

from typing import Any, Generic, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from mi_jax.core.errors import InputError
from mi_jax.decomposition.activations import BatchTopK, TopK
from mi_jax.decomposition.config import DictionaryConfig, Objective, check_combination
from mi_jax.decomposition.dictionary import Dictionary
from mi_jax.decomposition.training.config import Knobs, TrainConfig, direction

# activations whose number of codes can move during training
MOVABLE = ("topk", "abstopk", "batchtopk")
# a Dictionary, or a CrossLayerTranscoder
D = TypeVar("D", bound=eqx.Module)


class TrainState(eqx.Module, Generic[D]):
    """Everything that a step changes; saved and restored, training goes on to the same numbers.

    Attributes:
      dictionary: in the units of normalised activations.
      optimiser: moments.
      step: optimiser steps done.
      since_fired: tokens since each latent last had a code, counted up to `dead_after` and a batch.
      log_sparsity: the controller's, added to the logarithm of λ.
      l0: running mean of codes per token, which the controller reads.
    """

    dictionary: D
    optimiser: PyTree
    step: Int[Array, ""]
    since_fired: Int[Array, "*layer d_sae"]
    log_sparsity: Float[Array, ""]
    l0: Float[Array, ""]

    @property
    def sae(self) -> D:
        """The dictionary, by the name of the commonest kind."""
        return self.dictionary


def default_knobs(config: DictionaryConfig, objective: Objective, train: TrainConfig) -> Knobs:
    """The numbers that the configurations give."""
    return knobs_of(config.k, objective, train)


def knobs_of(k: int, objective: Objective, train: TrainConfig) -> Knobs:
    """The numbers that an objective and a schedule give, with k codes per token."""
    return Knobs(
        sparsity=jnp.float32(objective.sparsity),
        learning_rate=jnp.float32(train.learning_rate),
        k=jnp.int32(k),
        target_l0=jnp.float32(objective.target_l0 or 0.0),
    )


def checked_knobs(knobs: Knobs | None, config: DictionaryConfig, objective: Objective, train: TrainConfig) -> Knobs:
    """The numbers of one run or of several; those of the configurations if not given.

    Raises:
      InputError: a k that the dictionary has no places for.
    """
    if knobs is None:
        return default_knobs(config, objective, train)
    least, most = int(jnp.min(knobs.k)), int(jnp.max(knobs.k))
    if config.activation not in MOVABLE:
        if not least == most == config.k:
            raise InputError(
                f"knobs.k={most if least == config.k else least}, but {config.activation} has the configuration's "
                f"k={config.k}; only {', '.join(MOVABLE)} take another from knobs"
            )
    elif least < 1 or most > config.k:
        raise InputError(
            f"knobs.k goes to {most if most > config.k else least}, the configuration has k={config.k} places: "
            f"knobs.k is from 1 to {config.k}; configure the largest k of all runs"
        )
    return knobs


def trainable(dictionary: Any, frozen_decoder: bool = False) -> Any:
    """A tree of booleans: which arrays the optimiser sees."""
    mask = jax.tree.map(lambda leaf: eqx.is_inexact_array(leaf), dictionary)
    if isinstance(dictionary.activation, BatchTopK):
        mask = eqx.tree_at(lambda d: d.activation.threshold, mask, False)
    return eqx.tree_at(lambda d: d.w_dec, mask, False) if frozen_decoder else mask


def counts_codes(dictionary: Any) -> bool:
    """Whether the number of codes can move during training."""
    return isinstance(dictionary.activation, TopK | BatchTopK)


def with_places(dictionary: Dictionary, places: int | None) -> Dictionary:
    """The dictionary with this many places, whose used number is traced; None: as many as are used, for good."""
    activation = dictionary.activation
    assert isinstance(activation, TopK | BatchTopK)
    if places is None:
        used = activation.k if activation.k_now is None else int(activation.k_now)
        return eqx.tree_at(lambda d: d.activation, dictionary, _replaced(activation, used, None))
    return eqx.tree_at(lambda d: d.activation, dictionary, _replaced(activation, places, jnp.int32(activation.k)))


def _replaced(activation: TopK | BatchTopK, k: int, k_now: Array | None) -> TopK | BatchTopK:
    if isinstance(activation, BatchTopK):
        return BatchTopK(threshold=activation.threshold, k=k, k_now=k_now)
    return type(activation)(k=k, k_now=k_now)


def init_state(
    dictionary: Any,
    config: DictionaryConfig,
    objective: Objective,
    train: TrainConfig,
    *,
    frozen_decoder: bool = False,
) -> TrainState:
    """The state before the first step; it shares no buffer with `dictionary` and is sharded as it is.

    Raises:
      InputError: configurations that do not combine.
    """
    check_combination(config, objective)
    if train.control and objective.target_l0 is None:
        raise InputError("a controller needs the objective's target_l0")
    if train.k_start is not None and not counts_codes(dictionary):
        raise InputError(f"k_start needs topk, abstopk or batchtopk, not {config.activation}")
    dictionary = jax.tree.map(jnp.copy, dictionary)
    moments = direction(train).init(eqx.filter(dictionary, trainable(dictionary, frozen_decoder)))
    return TrainState(
        dictionary=dictionary,
        optimiser=moments,
        step=jnp.zeros((), jnp.int32),
        since_fired=jnp.zeros(dictionary.b_enc.shape, jnp.int32),
        log_sparsity=jnp.zeros(()),
        l0=jnp.zeros(()),
    )
