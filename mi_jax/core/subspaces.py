"""Edits of a subspace: taking it out, and interchanging it between runs.

A basis is `[d k]` for every layer or `[layer d k]`, one for each, where `d` is the last axis of the site. Its columns
need not be orthonormal: what counts is the space that they span. A traced basis with dependent columns becomes NaN.
"""

import dataclasses

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpy.typing import ArrayLike

from mi_jax.core.edits import Edit
from mi_jax.core.index import Index
from mi_jax.core.precision import rounding, widened, widened_dtype
from mi_jax.core.sites import SiteError
from mi_jax.core.values import Place, has_layers, value_at, value_of


class ProjectOut(Edit):
    """Takes the part of the value in a subspace away: x − x B Bᵀ; the operand is the basis B."""

    def stacked(self, site):
        return has_layers(self.operand, site, rank=3)

    def prepare(self, operand, x, place):
        return _checked(operand, x, place)

    def new(self, x, operand):
        x = widened(x)
        return x - _within(x, operand)


class SwapSubspace(Edit):
    """Takes the part in a subspace from another run: x + (value − x) B Bᵀ; the operand is (B, value)."""

    def stacked(self, site):
        basis, value = self.operand
        return has_layers(basis, site, rank=3), has_layers(value, site)

    @property
    def value(self):
        return self.operand[1]

    def with_value(self, value):
        return dataclasses.replace(self, operand=(self.operand[0], value))

    def prepare(self, operand, x, place):
        basis, value = operand
        return _checked(basis, x, place), value_at(value, x, place, self.reading)

    def new(self, x, operand):
        basis, value = operand
        x = widened(x)
        return x + _within(value - x, basis)


def project_out(site: str, basis: ArrayLike, *, layer=None, pos=None, head=None, unit=None) -> ProjectOut:
    """Takes the part of a site that lies in the span of `basis` away.

    Args:
      basis: `[d k]`, or `[layer d k]`, one for each layer; d is the last axis of the site.
      layer, pos, head, unit: as in `mi.patch`.

    Example: `mi.project_out("resid_post", probe[:, None], layer=5)` ablates one direction of the stream.
    """
    return ProjectOut(site, Index.of(layer, pos, head, unit), _orthonormal(basis))


def swap_subspace(site: str, basis: ArrayLike, value, *, layer=None, pos=None, head=None, unit=None) -> SwapSubspace:
    """Interchange intervention: the part in the span of `basis` is taken from `value`, the rest stays.

    Args:
      basis: as in `project_out`.
      value: captured activations of the source run, or an array, as in `mi.patch`.

    Source: Geiger et al. 2024 (arXiv 2303.02536), h' = h_base + (h_source − h_base) B Bᵀ.
    """
    value, reading = value_of(site, value)
    return SwapSubspace(site, Index.of(layer, pos, head, unit), (_orthonormal(basis), value), reading)


def _orthonormal(basis: ArrayLike) -> Float[Array, "*layer d k"]:
    basis = jnp.asarray(basis)
    if basis.ndim not in (2, 3) or basis.shape[-1] > basis.shape[-2]:
        raise SiteError(f"a basis has shape [d k] or [layer d k] with k ≤ d; got {basis.shape}")
    if not jnp.issubdtype(basis.dtype, jnp.floating):
        raise SiteError(f"a basis holds floating numbers; got {basis.dtype}")
    # what rounding alone makes of dependent columns of length 1 is smaller
    smallest = max(rounding(basis.dtype) / 2, max(basis.shape[-2:]) * rounding(widened_dtype(basis.dtype)))
    if isinstance(basis, jax.core.Tracer):
        orthonormal, triangle = jnp.linalg.qr(_unit_columns(basis))
        size = jnp.abs(jnp.diagonal(triangle, axis1=-2, axis2=-1))
        dependent = (size <= smallest * size.max(-1, keepdims=True)).any((-2, -1) if basis.ndim == 3 else -1)
        return jnp.where(dependent, jnp.nan, orthonormal)
    # a known basis stays one where the edit is made inside a jitted function
    with jax.ensure_compile_time_eval():
        columns = _unit_columns(basis)
        left, size, _ = np.linalg.svd(np.asarray(columns), full_matrices=False)
        independent = size > smallest * size.max(-1, initial=0.0, keepdims=True)
        if independent.all():
            return jnp.linalg.qr(columns)[0]
        # the directions that a dependent column would add are no part of the span: such columns become 0
        return jnp.asarray(left * independent[..., None, :], columns.dtype)


def _unit_columns(basis: Array) -> Array:
    """The same span, `widened`."""
    basis = widened(basis)
    length = jnp.linalg.norm(basis, axis=-2, keepdims=True)
    return basis / jnp.where(length > 0, length, 1)


def _checked(basis: Array, x: Array, place: Place) -> Array:
    if basis.shape[0] != x.shape[-1] or basis.ndim != 2:
        raise SiteError(
            f"the basis for site {place.site.name!r} has shape {basis.shape}; it spans part of the last axis, "
            f"{place.site.axes[-1]}, so it needs shape ({x.shape[-1]}, k)"
        )
    return basis.astype(widened_dtype(x.dtype))


def _within(x: Array, basis: Array) -> Array:
    return jax.lax.dot_general(x, basis, (((x.ndim - 1,), (0,)), ((), ()))) @ basis.T
