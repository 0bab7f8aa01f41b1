"""Subspaces of a site: an orthonormal parametrisation, the soft boundary of boundless DAS, angles between subspaces."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class Boundary:
    """Boundless DAS: how many of the k columns are swapped is learned too.

    Column j is swapped by the share `σ((b·k − j − ½) / T)`: the boundary b in [0, 1] is trained under a penalty
    `weight · b`, and the temperature T falls geometrically over the training, from soft to all-or-nothing.
    Source: Wu et al. 2023, "Interpretability at Scale", arXiv 2305.08809, section 3.

    Attributes:
      start: the boundary before training.
      temperature: first and last temperature, in columns.
      learning_rate: largest change of b in one step.
    """

    start: float = 0.5
    temperature: tuple[float, float] = (50.0, 0.1)
    weight: float = 1.0
    learning_rate: float = 0.02

    def __post_init__(self):
        if not 0 <= self.start <= 1:
            raise ValueError(f"start must be in [0, 1], got {self.start}")
        if min(self.temperature) <= 0 or self.weight < 0 or self.learning_rate <= 0:
            raise ValueError(f"temperatures and learning_rate must be positive, weight not negative; got {self}")

    def temperature_at(self, progress: Float[Array, ""]) -> Float[Array, ""]:
        """The temperature when this part of the training, in [0, 1], is over."""
        first, last = self.temperature
        return first * (last / first) ** progress


def orthonormal(x: Float[Array, "*batch d_model k"]) -> Float[Array, "*batch d_model k"]:
    """The Q of `x = QR` with a positive diagonal of R: unique, so continuous and differentiable where x has full rank.

    An orthonormal x is returned as it is.
    """
    q, r = jnp.linalg.qr(x)
    sign = jnp.where(jnp.diagonal(r, axis1=-2, axis2=-1) < 0, -1, 1).astype(x.dtype)
    return q * jnp.broadcast_to(sign[..., None, :], q.shape)


def root_gates(boundary: Float[Array, ""], temperature: Float[Array, ""], k: int) -> Float[Array, " k"]:
    """Square roots of the shares by which the columns are swapped; the gradient is finite also where a share is 0.

    With `basis * root_gates`, a swap by `B Bᵀ` moves column j by its share.
    """
    column = jnp.arange(k, dtype=boundary.dtype) + 0.5
    return jnp.exp(0.5 * jax.nn.log_sigmoid((boundary * k - column) / temperature))


def kept_columns(boundary: Float[Array, "*cell"], k: int) -> Float[Array, "*cell k"]:
    """1 for the columns inside the boundary, 0 for the others: the gates at temperature zero."""
    column = jnp.arange(k, dtype=boundary.dtype) + 0.5
    inside = boundary[..., None] * k > jnp.broadcast_to(column, (*boundary.shape, k))
    return inside.astype(boundary.dtype)


def principal_angles(a: Float[Array, "d_model k"], b: Float[Array, "d_model m"]) -> Float[Array, " n"]:
    """Angles in radians between the spans of two orthonormal bases, smallest first; 0 where one holds the other.

    From the sines where the cosines are close to 1, since arccos loses half of the digits there.
    """
    if a.shape[1] > b.shape[1]:
        a, b = b, a
    overlap = b.T @ a
    _, cosines, right = jnp.linalg.svd(overlap, full_matrices=False)
    rest = (a - b @ overlap) @ right.T
    sines = jnp.linalg.norm(rest, axis=0)
    return jnp.arctan2(sines, cosines)
