"""Values of edits: which axes of a site an array stands for, and the array in the shape of one layer of the site.

An array is read as numpy reads it, from the last axis on: `[d]` is a vector for every place, `[pos d]` one for every
position. Where its shape also fits other axes of the site, as `[batch d]` does when there are as many prompts as
positions, it is refused; `named` says which axes are meant.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array

from mi_jax.core.precision import widened_dtype
from mi_jax.core.sites import LAYER, Site, SiteError, canonical


@dataclasses.dataclass(frozen=True)
class Named:
    """An array with the names of its axes; see `named`."""

    value: Array
    axes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Reading:
    """How the value of an edit is to be read.

    Attributes:
      captured: it came out of a dictionary of captured activations, so that its axes must be those of the site.
      axes: the names of its axes, where they were given.
      n_layers: an axis of it could be that of so many layers; None where it could not. Known once the edit is checked.
    """

    captured: bool = False
    axes: tuple[str, ...] | None = None
    n_layers: int | None = None


@dataclasses.dataclass(frozen=True)
class Place:
    """Where an edit is being applied: one layer of one run.

    Attributes:
      layer: traced; None outside the layers.
      mask: `[batch pos]`, True at real tokens; None means all are.
      selected: where the edit applies, broadcasts against the site; None means everywhere.
    """

    site: Site
    layer: Any = None
    mask: Any = None
    selected: Any = None


def named(value, axes: str | Sequence[str]) -> Named:
    """An array with the names of its axes, for edits: `mi.patch("resid_pre", mi.named(x, "batch d_model"), pos=2)`.

    Args:
      axes: axes of the site, in the order of the array's. Along the other axes the value is the same everywhere.

    Raises:
      SiteError: as many names as the array has axes are needed, each once.
    """
    value = jnp.asarray(value)
    names = tuple(axes.split()) if isinstance(axes, str) else tuple(axes)
    if len(names) != value.ndim or len(set(names)) != len(names):
        raise SiteError(f"an array of shape {value.shape} has {value.ndim} axes to name, each once; got {names}")
    return Named(value, names)


def value_of(site: str, value) -> tuple[Array, Reading]:
    """A value as an array, and how it is to be read; captured activations give that of the site.

    Raises:
      SiteError: captured activations without that site.
    """
    if isinstance(value, Named):
        return value.value, Reading(axes=value.axes)
    if not isinstance(value, Mapping):
        return jnp.asarray(value), Reading()
    name = site if site in value else canonical(site)
    if name not in value:
        raise SiteError(f"the captured activations hold {', '.join(value)}, not {site!r}")
    return jnp.asarray(value[name]), Reading(captured=True)


def has_layers(leaf: Any, site: Site, rank: int | None = None) -> bool:
    """Whether an operand has a leading layer axis, that is, the rank of the whole site (or `rank`)."""
    return site.layered and eqx.is_array(leaf) and leaf.ndim == (len(site.axes) if rank is None else rank)


def by_name(value: Array, axes: tuple[str, ...], site: Site) -> Array:
    """A named array with the axes of the site in one layer, and that of the layers in front where it was named.

    Raises:
      SiteError: a name that is no axis of the site.
    """
    for name in axes:
        if name not in site.axes:
            raise SiteError(f"site {site.name!r} has axes {' '.join(site.axes)}; the value names {name!r}")
    full = site.axes if LAYER in axes else site.slice_axes
    if value.ndim != len(axes):
        return value  # done before
    order = sorted(range(len(axes)), key=lambda i: full.index(axes[i]))
    return jnp.expand_dims(value.transpose(order), [i for i, name in enumerate(full) if name not in axes])


def value_at(operand: Any, x: Array, place: Place, reading: Reading | None = None) -> Array:
    """A value in the shape of the site in one layer, `widened`, and 0 where the edit does not apply.

    So a NaN where the edit does not apply reaches neither the result nor, as 0 · NaN, a gradient; nor does one at
    padding, which counts as 0.

    Raises:
      SiteError: the value does not broadcast against the site, could be read in two ways, or comes from a run of
        another shape.
    """
    reading = reading or Reading()
    operand = jnp.asarray(operand)
    if reading.captured and operand.shape != x.shape and operand.shape != (1, *x.shape[1:]):
        raise SiteError(
            f"the captured value for site {place.site.name!r} has shape {operand.shape} in one layer, the site has "
            f"{x.shape}: capture it on prompts of the same length, or pass the array itself to broadcast it"
        )
    if not reading.captured and reading.axes is None:
        _check_reading(operand, x, place.site, reading.n_layers)
    try:
        value = jnp.broadcast_to(operand, x.shape).astype(widened_dtype(x.dtype))
    except ValueError:
        raise SiteError(
            f"the value for site {place.site.name!r} has shape {operand.shape}, which does not broadcast against "
            f"{x.shape}, the site in one layer; mi.named(value, 'batch {place.site.axes[-1]}') says which axes it has"
        ) from None
    zero = jnp.zeros_like(value)
    if place.mask is not None and "pos" in place.site.slice_axes:
        real = place.mask.reshape(*place.mask.shape, *(1,) * (x.ndim - 2))
        value = jnp.where(jnp.isnan(value) & ~jnp.broadcast_to(real, x.shape), zero, value)
    if place.selected is None:
        return value
    return jnp.where(jnp.broadcast_to(place.selected, x.shape), value, zero)


def _check_reading(operand: Array, x: Array, site: Site, n_layers: int | None) -> None:
    """Raises SiteError where a value of two axes or more fits other axes of the site too; its last axis is the site's.

    A vector is always one of the last axis.
    """
    if not 2 <= operand.ndim <= x.ndim or len(site.slice_axes) != x.ndim:
        return
    sizes = list(zip(site.slice_axes, x.shape, strict=True))[:-1]
    sizes = sizes if n_layers is None else [(LAYER, n_layers), *sizes]
    lead = operand.shape[:-1]
    readings = []
    for axes in itertools.combinations(sizes, len(lead)):
        fits = all(n == size or (n == 1 and name != LAYER) for n, (name, size) in zip(lead, axes, strict=True))
        meant = {i: name for i, (n, (name, _)) in enumerate(zip(lead, axes, strict=True)) if n > 1}
        if fits and meant not in [meant for meant, _ in readings]:
            readings.append((meant, " ".join([*(name for name, _ in axes), site.axes[-1]])))
    if len(readings) > 1:
        found = " or ".join(f"[{axes}]" for _, axes in readings)
        raise SiteError(
            f"the value for site {site.name!r} has shape {operand.shape}, which here can be {found}: say which with "
            f"mi.named(value, {readings[0][1]!r}), or give it all axes of one layer, of {x.shape}"
        )


def has_positions(operand: Array, reading: Reading, site: Site, n_pos: int) -> bool:
    """Whether a value has an axis of positions, so that it is of one prompt and not of the tokens generated after it.

    Args:
      n_pos: of the prompts; where they have one token, an axis of size 1 counts.
    """
    axis = next((axis for axis in ("pos", "query") if axis in site.axes), None)
    if axis is None:
        return False
    if reading.axes is not None:
        return axis in reading.axes
    from_end = len(site.axes) - site.axes.index(axis)
    return operand.ndim >= from_end and (operand.shape[-from_end] > 1 or n_pos == 1)
