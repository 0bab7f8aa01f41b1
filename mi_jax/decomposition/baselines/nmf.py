"""Non-negative matrix factorisation, of activations that are shifted until they are not negative.

Source: Lee and Seung 1999, "Learning the parts of objects by non-negative matrix factorization".
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from mi_jax.core.errors import InputError
from mi_jax.decomposition.baselines.base import Baseline, centred, check_activations, shifted
from mi_jax.decomposition.baselines.scikit import fitted


class NMF(Baseline):
    """Activations as `offset + z w_dec`, with z ≥ 0 and w_dec ≥ 0.

    Activations have both signs. `offset` is the smallest value of every coordinate in the training data, and what lies
    below it in new data counts as being there. So a direction says how much more there is of something than the least
    ever seen; z = 0 is that corner of the data, not its mean.

    Attributes:
      w_dec: directions of unit length, none of whose coordinates is negative.
      steps: of the solver in `encode`.
      converged: whether the fit did, within its iterations.
    """

    offset: Float[Array, " d_model"]
    w_dec: Float[Array, "component d_model"]
    steps: int = eqx.field(static=True)
    converged: bool = eqx.field(static=True)

    def encode(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch component"]:
        """argmin over z ≥ 0 of ‖x − offset − z w_dec‖², by `steps` steps of an accelerated projected gradient.

        The momentum of an activation starts anew whenever it points uphill (O'Donoghue and Candès 2015).
        """
        wanted = jnp.maximum(centred(x, self.offset), 0.0) @ self.w_dec.T
        gram = self.w_dec @ self.w_dec.T
        rate = 1 / jnp.linalg.eigvalsh(gram)[-1]

        def step(_, state):
            z, ahead, t = state
            new = jnp.maximum(ahead - rate * (ahead @ gram - wanted), 0.0)
            uphill = ((ahead - new) * (new - z)).sum(-1, keepdims=True) > 0
            t = jnp.where(uphill, 1.0, t)
            t_new = (1 + jnp.sqrt(1 + 4 * jnp.square(t))) / 2
            return new, new + jnp.where(uphill, 0.0, (t - 1) / t_new) * (new - z), t_new

        z = jnp.zeros_like(wanted)
        return jax.lax.fori_loop(0, self.steps, step, (z, z, jnp.ones_like(z[..., :1])))[0]

    def decode(self, codes: Float[Array, "*batch component"]) -> Float[Array, "*batch d_model"]:
        """The sum of the directions, weighted by the codes, from the offset on."""
        return shifted(codes @ self.w_dec, self.offset)


def fit_nmf(
    activations: Float[Array, "n d_model"],
    n_components: int,
    *,
    key: PRNGKeyArray,
    batch_size: int | None = None,
    max_iter: int = 200,
    tolerance: float = 1e-4,
    steps: int = 200,
) -> NMF:
    """The factorisation with the least squared error that coordinate descent finds.

    Args:
      n_components: may exceed `d_model`.
      batch_size: activations per update of the online algorithm, for data that is too large for the exact one, which is
        what None takes.
      max_iter: passes over the data.
      tolerance: relative change at which the fit stops.
      steps: of the solver that encodes; 200 give four digits where directions are not nearly parallel.

    Raises:
      InputError: counts below one, or activations that are NaN, infinite or all equal.
      ImportError: scikit-learn is not installed.
    """
    if n_components < 1 or steps < 1 or (batch_size is not None and batch_size < 1):
        raise InputError(
            f"n_components, steps and batch_size are at least 1; got {n_components}, {steps} and {batch_size}"
        )
    check_activations(activations)
    x = np.asarray(activations, np.float64)
    offset = x.min(0)
    if (x == offset).all():
        raise InputError(f"all {len(x)} activations are equal: there is nothing to factorise")
    options = {"n_components": n_components, "max_iter": max_iter, "tol": tolerance}
    if batch_size is None:
        estimator, converged = fitted("NMF", x - offset, key=key, **options)
    else:
        estimator, converged = fitted("MiniBatchNMF", x - offset, key=key, batch_size=batch_size, **options)
    rows = estimator.components_
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    rows = rows / np.where(length > 0, length, 1)
    dtype = activations.dtype
    return NMF(jnp.asarray(offset, dtype), jnp.asarray(rows, dtype), steps=steps, converged=converged)
