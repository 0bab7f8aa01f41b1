"""A dictionary whose directions are never trained, while its encoder and biases are.

Source: Korznikov et al. 2026, "Sanity Checks for Sparse Autoencoders" (arXiv 2602.14111).
"""

import jax
from jaxtyping import Array, Float

from mi_jax.decomposition.config import DictionaryConfig, Objective
from mi_jax.decomposition.dictionary import Dictionary
from mi_jax.decomposition.training.config import TrainConfig
from mi_jax.decomposition.training.fit import History, Report, fit


def fit_random_decoder(
    activations: Float[Array, "n d_model"],
    config: DictionaryConfig,
    objective: Objective,
    train: TrainConfig,
    *,
    key: Array,
    progress: Report | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[Dictionary, History]:
    """A dictionary of the same size whose random unit directions are never trained; the encoder and biases are.

    What it reconstructs is owed to the number of directions and to the encoder, not to directions found in the data.
    """
    return fit(activations, config, objective, train, key=key, progress=progress, frozen_decoder=True, mesh=mesh)
