"""L2-regularised logistic regression by Newton's method; many of one size under `jax.vmap` are one program."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mi_jax.decomposition.evaluation.batches import widened


class LogisticProbe(eqx.Module):
    """Log-odds of a concept, `x · weight + bias`; leaves may have a leading axis of concepts."""

    weight: Float[Array, "*concept d_in"]
    bias: Float[Array, "*concept"]


def balanced(labels: Bool[Array, " n"]) -> Float[Array, " n"]:
    """Weights by which both classes count alike, n / (2 n_class); the class that is absent has none."""
    n, positive = labels.shape[0], labels.sum()
    size = jnp.where(labels, positive, n - positive)
    return n / (2 * jnp.maximum(size, 1)).astype(jnp.float32)


@partial(jax.jit, static_argnames="iterations")
def fit_logistic(
    x: Float[Array, "n d_in"],
    labels: Bool[Array, " n"],
    weights: Float[Array, " n"] | None = None,
    *,
    inverse_penalty: float | Float[Array, ""] = 1.0,
    iterations: int = 30,
) -> LogisticProbe:
    """Minimises `inverse_penalty · Σ_i weight_i · loss_i + ‖w‖² / 2`; the bias is free.

    The scale is that of scikit-learn's `LogisticRegression(C=inverse_penalty)`.

    Args:
      weights: of the examples; None means 1 each, `balanced(labels)` makes both classes count alike.
      iterations: Newton steps at most, each cut in halves until it does not raise the objective; none that moves
        nothing in float32 is followed by another.
    """
    x = widened(x)
    weights = jnp.ones(x.shape[0], x.dtype) if weights is None else widened(weights)
    rows = jnp.concatenate([x, jnp.ones((x.shape[0], 1), x.dtype)], 1)
    y = labels.astype(x.dtype)
    # without a little of it the bias of a single class would run away
    penalty = jnp.ones(rows.shape[1], x.dtype).at[-1].set(1e-6)

    def objective(w):
        z = rows @ w
        losses = jax.nn.softplus(z) - y * z
        return inverse_penalty * (weights * losses).sum() + 0.5 * (penalty * w * w).sum()

    def newton(state):
        i, w, _ = state
        p = jax.nn.sigmoid(rows @ w)
        gradient = inverse_penalty * rows.T @ (weights * (p - y)) + penalty * w
        curvature = inverse_penalty * weights * p * (1 - p)
        hessian = (rows * curvature[:, None]).T @ rows + jnp.diag(penalty)
        step = jax.scipy.linalg.solve(hessian, gradient, assume_a="pos")
        here = objective(w)
        scales = 0.5 ** jnp.arange(12, dtype=x.dtype)
        lower = jax.vmap(lambda s: objective(w - s * step))(scales) <= here
        best = jnp.where(lower.any(), scales[jnp.argmax(lower)], 0)
        moved = best * jnp.abs(step).max() > 1e-6 * (1 + jnp.abs(w).max())
        return i + 1, w - best * step, moved

    start = (jnp.zeros((), jnp.int32), jnp.zeros(rows.shape[1], x.dtype), jnp.ones((), bool))
    _, w, _ = jax.lax.while_loop(lambda state: (state[0] < iterations) & state[2], newton, start)
    return LogisticProbe(w[:-1], w[-1])


def fit_probes(
    x: Float[Array, "n d_in"], labels: Bool[Array, "n concept"], *, class_balanced: bool = True
) -> LogisticProbe:
    """One probe per concept, on the same inputs; leaves have a leading axis of concepts."""

    def fit(y):
        return fit_logistic(x, y, balanced(y) if class_balanced else None)

    return jax.vmap(fit, in_axes=1)(labels)
