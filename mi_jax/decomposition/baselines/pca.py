"""Principal components."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from mi_jax.core.errors import InputError
from mi_jax.decomposition.baselines.base import Baseline, centred, check_activations, shifted


class PCA(Baseline):
    """Projection onto leading principal components; its codes are dense and signed.

    `KSparse(pca, k)` keeps the k largest coordinates of each activation: of these directions, the best k.

    Attributes:
      basis: orthonormal rows, in descending order of variance.
    """

    mean: Float[Array, " d_model"]
    basis: Float[Array, "component d_model"]

    def encode(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch component"]:
        """Coordinates in the basis of components."""
        return centred(x, self.mean) @ self.basis.T

    def decode(self, codes: Float[Array, "*batch component"]) -> Float[Array, "*batch d_model"]:
        """The point of the affine subspace that has these coordinates."""
        return shifted(codes @ self.basis, self.mean)


def fit_pca(activations: Float[Array, "n d_model"], n_components: int) -> PCA:
    """The affine subspace of `n_components` dimensions that keeps the most variance.

    With as many components as a dictionary has codes per token, it is the best that a *fixed* set of directions can do.

    Raises:
      InputError: more components than `d_model`, or fewer than one; activations that are NaN or infinite.
    """
    n, d_model = activations.shape
    if not 1 <= n_components <= d_model:
        raise InputError(f"n_components must be from 1 to d_model={d_model}, got {n_components}")
    check_activations(activations)
    mean = activations.mean(0)
    rest = centred(activations, mean)
    _, vectors = jnp.linalg.eigh(rest.T @ rest / n)
    return PCA(mean=mean, basis=vectors.T[::-1][:n_components])
