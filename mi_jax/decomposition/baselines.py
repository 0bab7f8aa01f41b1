"""Nulls that a dictionary must beat: principal components, and directions that were never trained.

Source for the frozen decoder: Korznikov et al. 2026, "Sanity Checks for Sparse Autoencoders" (arXiv 2602.14111).
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mi_jax.decomposition.sae import SAE, SAEConfig
from mi_jax.decomposition.train import TrainConfig, TrainState, fit


class PCA(eqx.Module):
    """Projection onto leading principal components, with the calls of an `SAE`; its codes are dense and signed."""

    mean: Float[Array, " d_model"]
    basis: Float[Array, "component d_model"]

    def encode(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch component"]:
        """Coordinates in the basis of components."""
        return (x - jnp.broadcast_to(self.mean, x.shape)) @ self.basis.T

    def decode(self, codes: Float[Array, "*batch component"]) -> Float[Array, "*batch d_model"]:
        """The point of the affine subspace that has these coordinates."""
        return codes @ self.basis + jnp.broadcast_to(self.mean, (*codes.shape[:-1], self.mean.shape[0]))

    def __call__(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch d_model"]:
        return self.decode(self.encode(x))


def fit_pca(activations: Float[Array, "n d_model"], n_components: int) -> PCA:
    """The affine subspace of `n_components` dimensions that keeps the most variance.

    With as many components as a dictionary has codes per token, it is the best that a *fixed* set of directions can do.

    Raises:
      ValueError: more components than `d_model`, or fewer than one.
    """
    n, d_model = activations.shape
    if not 1 <= n_components <= d_model:
        raise ValueError(f"n_components must be from 1 to d_model={d_model}, got {n_components}")
    mean = activations.mean(0)
    centred = activations - mean[None, :]
    _, vectors = jnp.linalg.eigh(centred.T @ centred / n)
    return PCA(mean=mean, basis=vectors.T[::-1][:n_components])


def fit_random_decoder(
    activations: Float[Array, "n d_model"],
    sae_config: SAEConfig,
    config: TrainConfig,
    *,
    key: Array,
    progress: Callable[[TrainState, dict[str, float]], None] | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[SAE, list[dict[str, float]]]:
    """A dictionary of the same size whose random unit directions are never trained; the encoder and biases are.

    What it reconstructs is owed to the number of directions and to the encoder, not to directions found in the data.
    """
    return fit(activations, sae_config, config, key=key, progress=progress, frozen_decoder=True, mesh=mesh)
