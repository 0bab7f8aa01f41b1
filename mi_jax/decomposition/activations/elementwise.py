"""Activations that treat each latent on its own: ReLU, Gated and JumpReLU.

Codes are dense, unless `max_active` says how many places per token, on average over a batch, are enough; a batch that
needs more is computed densely, to the same numbers.

Sources: Bricken et al. 2023; Rajamanoharan et al. 2024a (Gated, arXiv 2404.16014) and 2024b (JumpReLU, 2407.14435).
"""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mi_jax.decomposition.activations.base import Activation, Chosen, at_places, everywhere
from mi_jax.decomposition.codes import Pairs
from mi_jax.decomposition.selection import all_above


class Elementwise(Activation):
    """An activation with codes wherever the pre-activation is over a bound of its latent."""

    def dense(self, h, b_enc, *, training: bool = False):
        return self.value(h, everywhere, b_enc)

    def choose(self, x, w_enc, b_enc, valid=None):
        if self.places is None:
            return None
        products = x @ w_enc.T
        bound = jnp.broadcast_to(self.bound().astype(products.dtype), b_enc.shape)
        tokens, latents, fits = all_above(products, self.places * x.shape[0], b_enc, bound)
        where = Pairs(tokens, latents, x.shape[0])
        h = products.at[tokens, latents].get(mode="fill", fill_value=0.0) + at_places(where)(b_enc)
        return Chosen(h, where, fits)

    @property
    def places(self) -> int | None:
        """Places per token for sparse codes."""
        raise NotImplementedError

    def bound(self) -> Array:
        """What a pre-activation must exceed to have a code or a gradient."""
        return jnp.zeros((), jnp.float32)


class ReLU(Elementwise):
    """z = max(h, 0)."""

    max_active: int | None = eqx.field(static=True, default=None)

    @property
    def places(self) -> int | None:
        return self.max_active

    def value(self, h, at, b_enc):
        return jax.nn.relu(h)


class Gated(Elementwise):
    """z = 1[π > 0] · max(π̃, 0) with π = h, whose bias is the gate's, and π̃ = (π − b_enc) e^r_mag + b_mag.

    Attributes:
      r_mag: log of the ratio between the weights of magnitude and gate.
      b_mag: bias of the magnitude.
    """

    r_mag: Float[Array, " d_sae"]
    b_mag: Float[Array, " d_sae"]
    max_active: int | None = eqx.field(static=True, default=None)

    @property
    def places(self) -> int | None:
        return self.max_active

    def value(self, h, at, b_enc):
        magnitude = (h - at(b_enc)) * jnp.exp(at(self.r_mag)) + at(self.b_mag)
        return jnp.where(h > 0, jax.nn.relu(magnitude), 0.0)

    def scaled(self, factor):
        return eqx.tree_at(lambda a: a.b_mag, self, self.b_mag * factor)


class JumpReLU(Elementwise):
    """z = h · 1[h > θ], with straight-through gradients of θ in a window of width `bandwidth` around it.

    Attributes:
      threshold: θ itself, in float32: its logarithm, or bfloat16, loses steps of the size that training takes.
      bandwidth: ε of ∂z/∂θ = −(θ/ε) · 1[|h − θ| < ε/2] and ∂1[h > θ]/∂θ = −(1/ε) · 1[|h − θ| < ε/2].
    """

    threshold: Float[Array, " d_sae"]
    bandwidth: float = eqx.field(static=True, default=0.05)
    max_active: int | None = eqx.field(static=True, default=None)

    @property
    def places(self) -> int | None:
        return self.max_active

    def bound(self):
        return self.threshold - self.bandwidth / 2

    def value(self, h, at, b_enc):
        return jump(h, jnp.broadcast_to(at(self.threshold), h.shape).astype(h.dtype), self.bandwidth)

    def active(self, h: Array, at) -> Array:
        """1[h > θ] with its straight-through gradient, summed by the L0 penalties."""
        return heaviside(h, jnp.broadcast_to(at(self.threshold), h.shape).astype(h.dtype), self.bandwidth)

    def scaled(self, factor):
        return eqx.tree_at(lambda a: a.threshold, self, self.threshold * factor)


def _window(h: Array, threshold: Array, bandwidth: float) -> Array:
    return (jnp.abs(h - threshold) < bandwidth / 2).astype(h.dtype) / bandwidth


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def jump(h: Array, threshold: Array, bandwidth: float) -> Array:
    """h · 1[h > θ]; its derivative with respect to θ is −θ times a rectangle of width `bandwidth` and area 1."""
    return jnp.where(h > threshold, h, 0.0)


@jump.defjvp
def _jump_jvp(bandwidth, primals, tangents):
    h, threshold = primals
    dh, dthreshold = tangents
    through = jnp.where(h > threshold, dh, 0.0)
    return jump(h, threshold, bandwidth), through - threshold * _window(h, threshold, bandwidth) * dthreshold


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def heaviside(h: Array, threshold: Array, bandwidth: float) -> Array:
    """1[h > θ]; its derivative with respect to θ is minus a rectangle of width `bandwidth` and area 1, to h zero."""
    return (h > threshold).astype(h.dtype)


@heaviside.defjvp
def _heaviside_jvp(bandwidth, primals, tangents):
    h, threshold = primals
    return heaviside(h, threshold, bandwidth), -_window(h, threshold, bandwidth) * tangents[1]
