"""A linear probe: logistic regression on activations, and the direction along which the two classes differ.

The weights say how to read a concept: they cancel what is common to both classes. They do not say how the activations
change with it (Haufe et al. 2014, "On the interpretation of weight vectors of linear models"). That is the difference
of the class means, which is what to intervene along (Marks and Tegmark 2023, "The geometry of truth", §4).
"""

from functools import partial

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from mi_jax.core.errors import InputError


class Probe(eqx.Module):
    """Log-odds of a concept, `x · weight + bias`, in the precision of the weights, whatever that of `x` is.

    Attributes:
      pattern: difference of the class means, scaled so that a step along it raises the score by one.
    """

    weight: Float[Array, " d_model"]
    bias: Float[Array, ""]
    pattern: Float[Array, " d_model"]

    def __call__(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch"]:
        return x.astype(self.weight.dtype) @ self.weight + self.bias


def fit_probe(
    x: Float[Array, "n d_model"], labels: Bool[Array, " n"], *, ridge: float = 1e-2, iterations: int = 20
) -> Probe:
    """Fits the probe by Newton's method on standardised activations, in float32 where they are of half precision.

    Minimises the mean logistic loss plus `ridge / 2 · ‖w‖²`, `w` in units of one standard deviation; the bias is free.

    Raises:
      InputError: one class only, or activations that are not finite. Inside `jit` neither can be seen, and the probe
        is NaN.
    """
    if not any(isinstance(a, jax.core.Tracer) for a in (x, labels)):
        positives = int(np.asarray(labels).sum())
        if not 0 < positives < len(labels):
            raise InputError(
                f"a probe tells two classes apart; of {len(labels)} labels {positives} are True. Take activations of "
                "both classes"
            )
        if not bool(jnp.isfinite(x).all()):
            raise InputError(
                f"{int((~jnp.isfinite(x)).any(1).sum())} of {len(x)} activations are not finite; leave them out, or "
                "find where the model overflows"
            )
    return _fit(x, labels, ridge=ridge, iterations=iterations)


@partial(jax.jit, static_argnames="iterations")
def _fit(x: Float[Array, "n d_model"], labels: Bool[Array, " n"], *, ridge: float | Array, iterations: int) -> Probe:
    x = x.astype(jnp.float32) if x.dtype.itemsize < 4 else x
    mean, scale = x.mean(0), x.std(0) + 1e-6
    z = jnp.concatenate([(x - mean[None, :]) / scale[None, :], jnp.ones((x.shape[0], 1), x.dtype)], 1)
    y = labels.astype(x.dtype)
    penalty = jnp.full(z.shape[1], ridge, x.dtype).at[-1].set(1e-6)

    def newton(_, w):
        p = jax.nn.sigmoid(z @ w)
        gradient = z.T @ (p - y) / len(y) + penalty * w
        hessian = (z * (p * (1 - p))[:, None]).T @ z / len(y) + jnp.diag(penalty)
        # damped: a full step may overshoot where the classes separate
        step = jnp.linalg.solve(hessian, gradient)
        return w - step / jnp.maximum(1.0, jnp.linalg.norm(step) / 5.0)

    w = jax.lax.fori_loop(0, iterations, newton, jnp.zeros(z.shape[1], x.dtype))
    weight = w[:-1] / scale
    difference = y @ x / y.sum() - (1 - y) @ x / (1 - y).sum()
    return Probe(weight, w[-1] - mean @ weight, difference / (weight @ difference))
