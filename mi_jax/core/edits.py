"""Edits: interventions as values. An edit names a site, an index into it, and what to put there.

Edits are pytrees. Their arrays (indices and operands) are traced, so new layers, positions, heads and values never
recompile; the set of edited sites is static.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from mi_jax.core.index import Each, Index
from mi_jax.core.precision import widened, widened_dtype
from mi_jax.core.sites import Site, SiteError
from mi_jax.core.values import Place, Reading, has_layers, value_at, value_of


class Edit(eqx.Module):
    """Base of all edits; `new` gives the value to put at the index."""

    site: str = eqx.field(static=True)
    index: Index
    operand: Any
    reading: Reading = eqx.field(static=True, default=Reading())

    # whether the new value at a position depends on no other position
    pointwise: ClassVar[bool] = True

    def new(self, x: Array, operand: Any) -> Array:
        raise NotImplementedError(type(self).__name__)

    def prepare(self, operand: Any, x: Array, place: Place) -> Any:
        """The operand as `new` takes it; here, an array that broadcasts against the site in one layer."""
        return value_at(operand, x, place, self.reading)

    def stacked(self, site: Site) -> Any:
        """Which leaves of the operand have a leading layer axis: here, those with the rank of the whole site."""
        return jax.tree.map(lambda leaf: has_layers(leaf, site), self.operand)

    @property
    def value(self) -> Any:
        """What of the operand has axes of the site, which is what `reading` is of."""
        return self.operand

    def with_value(self, value: Any) -> "Edit":
        """The same edit with another value."""
        return dataclasses.replace(self, operand=value)

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
        return widened(x) + operand


class Scale(Edit):
    """Multiplies the value."""

    def new(self, x, operand):
        return widened(x) * operand


class Noise(Edit):
    """Adds normal noise; the operand is the standard deviation and a key, another draw per layer and position."""

    def stacked(self, site):
        return (has_layers(self.operand[0], site), False)

    @property
    def value(self):
        return self.operand[0]

    def with_value(self, value):
        return dataclasses.replace(self, operand=(value, self.operand[1]))

    def prepare(self, operand, x, place):
        std, key = operand
        key = key if place.layer is None else jax.random.fold_in(key, place.layer)
        std, dtype = value_at(std, x, place, self.reading), widened_dtype(x.dtype)
        if "pos" not in place.site.slice_axes:
            return std * jax.random.normal(key, x.shape, dtype)
        # a position's draw must not depend on how far the prompts are padded
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(x.shape[1], dtype=jnp.uint32))
        draw = jax.vmap(lambda key: jax.random.normal(key, (x.shape[0], *x.shape[2:]), dtype), out_axes=1)(keys)
        return std * draw

    def new(self, x, operand):
        return widened(x) + operand


class AblateMean(Edit):
    """Replaces the value by its mean over the examples and the real positions of the run."""

    pointwise: ClassVar[bool] = False
    mean_axes: ClassVar[tuple[int, ...]] = (0, 1)

    def prepare(self, operand, x, place):
        axes, x = place.site.slice_axes, widened(x)
        tokens = next((axes.index(axis) for axis in ("pos", "query") if axis in axes), None)
        if place.mask is None or tokens is None:
            weight = jnp.ones((x.shape[0],) + (1,) * (x.ndim - 1), x.dtype)
        else:
            shape = [n if i in (0, tokens) else 1 for i, n in enumerate(x.shape)]
            weight = place.mask.astype(x.dtype).reshape(shape)
        over = self.mean_axes if "pos" in axes else (0,)
        total = (x * jnp.broadcast_to(weight, x.shape)).sum(over, keepdims=True)
        weight = jnp.broadcast_to(weight, [n if i in (0, tokens) else 1 for i, n in enumerate(x.shape)])
        # where no example has a token there is no mean, and nobody reads it
        return jnp.broadcast_to(total / jnp.maximum(weight.sum(over, keepdims=True), 1), x.shape)

    def new(self, x, operand):
        return operand


class AblateMeanPerPosition(AblateMean):
    """Replaces the value by its mean over the examples that have a token at that position."""

    pointwise: ClassVar[bool] = True
    mean_axes: ClassVar[tuple[int, ...]] = (0,)


class AblateResample(Edit):
    """Replaces the value by that of another example of the batch; the operand is a key."""

    def prepare(self, operand, x, place):
        if x.shape[0] < 2:
            raise SiteError(
                f"site {place.site.name!r}: baseline 'resample' takes another example, the batch has {x.shape[0]}"
            )
        # one random cycle through the batch: a plain permutation would leave some examples as they are
        order = jax.random.permutation(operand, x.shape[0])
        donor = jnp.zeros_like(order).at[order].set(jnp.roll(order, 1))
        axes = place.site.slice_axes
        tokens = next((axes.index(axis) for axis in ("pos", "query") if axis in axes), None)
        if place.mask is None or tokens is None:
            return x[donor]
        real = place.mask[donor].reshape([n if i in (0, tokens) else 1 for i, n in enumerate(x.shape)])
        return jnp.where(jnp.broadcast_to(real, x.shape), x[donor], x)

    def new(self, x, operand):
        return operand


class Transform(Edit):
    """Replaces the value by a function of it; the operand is the function."""

    pointwise: ClassVar[bool] = False

    def stacked(self, site):
        return jax.tree.map(lambda leaf: False, self.operand)

    def prepare(self, operand, x, place):
        return operand

    def new(self, x, operand):
        return operand(x)


def patch(site: str, value, *, layer=None, pos=None, head=None, unit=None) -> Patch:
    """Replaces a site by `value`.

    Args:
      site: a site of the model, or a TransformerLens name.
      value: captured activations (the dictionary from `capture`, from which the same places are taken; prompts of the
        same length, or a batch of one), or an array of the site's full shape, or one that broadcasts against the site
        in one layer, such as `[d_model]` or `[pos d_model]`, or `mi.named(array, "batch d_model")`. An array whose
        shape fits several axes of the site is refused unless it is named.
      layer, pos, head, unit: see `Index`; ints, arrays, tuples, `mi.per_example(positions)`, or `mi.each` in a sweep.
        Two sets of one size: `**mi.pairs(layer=(0, 2), head=(1, 3))` or `**mi.product(…)`.
    """
    return Patch(site, Index.of(layer, pos, head, unit), *value_of(site, value))


def add(site: str, value, *, layer=None, pos=None, head=None, unit=None) -> Add:
    """Adds `value`; arguments as in `patch`."""
    return Add(site, Index.of(layer, pos, head, unit), *value_of(site, value))


def scale(site: str, factor, *, layer=None, pos=None, head=None, unit=None) -> Scale:
    """Multiplies by `factor`; arguments as in `patch`."""
    return Scale(site, Index.of(layer, pos, head, unit), *value_of(site, factor))


def noise(site: str, std, *, key, layer=None, pos=None, head=None, unit=None) -> Noise:
    """Adds normal noise of standard deviation `std` (a number, or an array that broadcasts against the site).

    Every layer has its own draw. The source of "corrupt" runs in causal tracing (Meng et al. 2022, section 2.1).
    """
    value, reading = value_of(site, std)
    return Noise(site, Index.of(layer, pos, head, unit), (value, key), reading)


def ablate(site: str, *, baseline: Any = "zero", layer=None, pos=None, head=None, unit=None, key=None) -> Edit:
    """Removes what a site carries.

    Args:
      baseline: `"zero"`; `"mean"`, the mean over the examples and the real positions of the run (over the examples
        only, for attention scores and patterns); `"mean_per_position"`, over the examples that have a token there;
        `"resample"`, the values of another example of the batch, drawn with `key`, the same one at every layer (where
        that one is padded the value stays); or an array, such as a mean over a data set.
      key: for `"resample"` only.

    Raises:
      SiteError: an unknown baseline, or `"resample"` without a key.
    """
    index = Index.of(layer, pos, head, unit)
    if not isinstance(baseline, str):
        return Patch(site, index, *value_of(site, baseline))
    if baseline == "zero":
        return Patch(site, index, jnp.zeros(()))
    if baseline == "mean":
        return AblateMean(site, index, None)
    if baseline == "mean_per_position":
        return AblateMeanPerPosition(site, index, None)
    if baseline == "resample":
        if key is None:
            raise SiteError("ablate(baseline='resample') draws a permutation of the batch: pass key=jax.random.key(…)")
        return AblateResample(site, index, key)
    raise SiteError(f"baseline must be 'zero', 'mean', 'mean_per_position', 'resample' or an array, got {baseline!r}")


def transform(site: str, fn: Callable[[Array], Array], *, layer=None, pos=None, head=None, unit=None) -> Transform:
    """Applies `fn` to the site: an eraser, a dictionary's reconstruction, a rotation. Its arrays are traced.

    Only the selected layers evaluate `fn`. It sees the site in one layer, `[batch pos …]`, and keeps its shape.
    """
    return Transform(site, Index.of(layer, pos, head, unit), fn)
