"""Edits: interventions as values. An edit names a site, an index into it, and what to put there.

Edits are pytrees. Their arrays (indices and operands) are traced, so new layers, positions, heads and values never
recompile; the set of edited sites is static.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from mi_jax.core.index import Each, Index
from mi_jax.core.sites import SiteError


class Edit(eqx.Module):
    """Base of all edits; `new` gives the value to put at the index."""

    site: str = eqx.field(static=True)
    index: Index
    operand: Any

    def new(self, x: Array, operand: Any) -> Array:
        raise NotImplementedError(type(self).__name__)

    def each_axes(self) -> tuple[str, ...]:
        """Index names that are marked with `mi.each`."""
        return tuple(name for name, value in self.index.items() if isinstance(value, Each))

    def placed(self, **index) -> "Edit":
        """The same edit at other indices."""
        return dataclasses.replace(self, index=self.index.replace(**index))


class Patch(Edit):
    """Replaces the value."""

    def new(self, x, operand):
        return operand


class Add(Edit):
    """Adds to the value."""

    def new(self, x, operand):
        return x + operand


class Scale(Edit):
    """Multiplies the value."""

    def new(self, x, operand):
        return x * operand


class AblateMean(Edit):
    """Replaces the value by its mean over the run, which `apply` passes as the operand."""

    def new(self, x, operand):
        return operand


class AblateResample(Edit):
    """Replaces the value by that of another example of the batch; the operand is a key."""

    def new(self, x, operand):
        # one random cycle through the batch: a plain permutation would leave some examples as they are
        order = jax.random.permutation(operand, x.shape[0])
        return jnp.zeros_like(x).at[order].set(x[jnp.roll(order, 1)])


class Transform(Edit):
    """Replaces the value by a function of it; the operand is the function."""

    def new(self, x, operand):
        return operand(x)


def patch(site: str, value, *, layer=None, pos=None, head=None, unit=None) -> Patch:
    """Replaces a site by `value`.

    Args:
      site: a site of the model, or a TransformerLens name.
      value: captured activations (the dictionary from `capture`, or one array of the site's full shape, from which
        the same places are taken), or an array that broadcasts against the site in one layer.
      layer, pos, head, unit: see `Index`; ints, arrays, tuples, or `mi.each` in a sweep.
    """
    return Patch(site, Index.of(layer, pos, head, unit), _operand(site, value))


def add(site: str, value, *, layer=None, pos=None, head=None, unit=None) -> Add:
    """Adds `value`; arguments as in `patch`."""
    return Add(site, Index.of(layer, pos, head, unit), _operand(site, value))


def scale(site: str, factor, *, layer=None, pos=None, head=None, unit=None) -> Scale:
    """Multiplies by `factor`; arguments as in `patch`."""
    return Scale(site, Index.of(layer, pos, head, unit), _operand(site, factor))


def ablate(site: str, *, baseline="zero", layer=None, pos=None, head=None, unit=None, key=None) -> Edit:
    """Removes what a site carries.

    Args:
      baseline: `"zero"`; `"mean"`, the mean over the examples and the real positions of the run (over the examples
        only, for attention scores and patterns); `"resample"`, the values of another example of the batch, drawn with
        `key`, the same one at every layer; or an array, such as a mean over a data set.
      key: for `"resample"` only.

    Raises:
      ValueError: an unknown baseline, or `"resample"` without a key.
    """
    index = Index.of(layer, pos, head, unit)
    if not isinstance(baseline, str):
        return Patch(site, index, _operand(site, baseline))
    if baseline == "zero":
        return Patch(site, index, jnp.zeros(()))
    if baseline == "mean":
        return AblateMean(site, index, None)
    if baseline == "resample":
        if key is None:
            raise ValueError("ablate(baseline='resample') draws a permutation of the batch: pass key=jax.random.key(…)")
        return AblateResample(site, index, key)
    raise ValueError(f"baseline must be 'zero', 'mean', 'resample' or an array, got {baseline!r}")


def transform(site: str, fn: Callable[[Array], Array], *, layer=None, pos=None, head=None, unit=None) -> Transform:
    """Applies `fn` to the site: an eraser, a dictionary's reconstruction, a rotation. Its arrays are traced.

    Only the selected layers evaluate `fn`. It sees the site in one layer, `[batch pos …]`, and keeps its shape.
    """
    return Transform(site, Index.of(layer, pos, head, unit), fn)


def _operand(site: str, value):
    if isinstance(value, Mapping):
        if site not in value:
            raise SiteError(f"the captured activations hold {', '.join(value)}, not {site!r}")
        value = value[site]
    return jnp.asarray(value)
