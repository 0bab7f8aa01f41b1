"""Independent components.

Source: Hyvärinen and Oja 2000, "Independent component analysis: algorithms and applications" (FastICA).
"""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from mi_jax.core.errors import InputError
from mi_jax.decomposition.baselines.base import Baseline, centred, check_activations, shifted
from mi_jax.decomposition.baselines.scikit import fitted


class ICA(Baseline):
    """A linear map to codes that are as independent of each other as a linear map can make them; dense and signed.

    Attributes:
      w_enc: reads the codes.
      w_dec: directions of unit length, so that codes of different components compare; each points to the side where
        its codes have their longer tail.
      converged: whether the fit did, within its iterations.
    """

    mean: Float[Array, " d_model"]
    w_enc: Float[Array, "component d_model"]
    w_dec: Float[Array, "component d_model"]
    converged: bool = eqx.field(static=True)

    def encode(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch component"]:
        """The components of activations."""
        return centred(x, self.mean) @ self.w_enc.T

    def decode(self, codes: Float[Array, "*batch component"]) -> Float[Array, "*batch d_model"]:
        """The sum of the directions, weighted by the codes, and the mean."""
        return shifted(codes @ self.w_dec, self.mean)


def fit_ica(
    activations: Float[Array, "n d_model"],
    n_components: int,
    *,
    key: PRNGKeyArray,
    max_iter: int = 200,
    tolerance: float = 1e-4,
) -> ICA:
    """FastICA within the subspace of the first `n_components` principal components.

    Args:
      tolerance: how much the unmixing matrix may still turn in an iteration when it stops.

    Raises:
      InputError: more components than `d_model` or activations, or fewer than one; NaN or infinite activations.
      ImportError: scikit-learn is not installed.
    """
    n, d_model = activations.shape
    if not 1 <= n_components <= min(n, d_model):
        raise InputError(f"n_components must be from 1 to d_model={d_model} and to n={n}, got {n_components}")
    check_activations(activations)
    x = np.asarray(activations, np.float64)
    options = {"n_components": n_components, "whiten": "unit-variance", "max_iter": max_iter, "tol": tolerance}
    estimator, converged = fitted("FastICA", x, key=key, **options)
    codes, mixing = estimator.transform(x), estimator.mixing_.T
    length = np.linalg.norm(mixing, axis=1) * np.where((codes**3).mean(0) < 0, -1, 1)
    arrays = estimator.mean_, estimator.components_ * length[:, None], mixing / length[:, None]
    return ICA(*(jnp.asarray(a, activations.dtype) for a in arrays), converged=converged)
