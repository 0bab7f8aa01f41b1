"""Edits: interventions as values. An edit names a site, an index into it, and what to put there.

Edits are pytrees. Their arrays (indices and operands) are traced, so new layers, positions, heads and values never
recompile; the set of edited sites is static.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from mi_jax.core.sites import LAYER, Site, SiteError, SiteTable


class Each:
    """Marks an axis of a sweep: `mi.patch(site, acts, layer=mi.each, pos=mi.each)`."""

    def __repr__(self) -> str:
        return "mi.each"


each = Each()

# Which axis of a site an index means: the first of these that the site has.
_INDEX_AXES = {
    "layer": (LAYER,),
    "pos": ("pos", "query"),
    "head": ("head", "kv_head"),
    "unit": ("d_head", "d_mlp", "d_model", "d_vocab"),
}


class Index(eqx.Module):
    """Where an edit applies. None: everywhere on that axis.

    An int or a scalar array is one place, a list or tuple of ints a set of places. For `pos`, an array of shape
    `[batch]` gives every example its own position. Negative positions, heads and units count from the end; layers do
    not. Edits with stacked indices can be mapped over with `jax.vmap`.
    """

    layer: Any = None
    pos: Any = None
    head: Any = None
    unit: Any = None
    per_example: bool = eqx.field(static=True, default=False)

    @classmethod
    def of(cls, layer=None, pos=None, head=None, unit=None) -> "Index":
        """Indices as int32 arrays.

        Raises:
          SiteError: an index that is not an integer, or an empty set, which would edit nothing.
        """
        per_example = hasattr(pos, "ndim") and pos.ndim >= 1
        values = {"layer": layer, "pos": pos, "head": head, "unit": unit}
        return cls(**{name: _places(name, value) for name, value in values.items()}, per_example=per_example)

    def items(self) -> list[tuple[str, Any]]:
        return [(name, value) for name in _INDEX_AXES if (value := getattr(self, name)) is not None]

    def replace(self, **values) -> "Index":
        merged = {name: getattr(self, name) for name in _INDEX_AXES} | values
        return Index(**merged, per_example=self.per_example and "pos" not in values)


def _places(name: str, value) -> Any:
    if value is None or isinstance(value, Each):
        return value
    if isinstance(value, jax.core.Tracer):
        dtype, size = value.dtype, value.size
    else:
        value = np.asarray(value)
        dtype, size = value.dtype, value.size
    if not size:
        raise SiteError(
            f"an edit with an empty set for {name!r} touches nothing; leave {name!r} out to edit everywhere"
        )
    if not jnp.issubdtype(dtype, jnp.integer):
        raise SiteError(f"{name!r} takes ints, an array of ints or mi.each, got {dtype} {value}")
    if isinstance(value, jax.core.Tracer):
        return value.astype(jnp.int32)
    # stays a known number where the edit is made inside a jitted function, so that its range can be checked
    with jax.ensure_compile_time_eval():
        return jnp.asarray(value, jnp.int32)


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


def check(edit: Edit, table: SiteTable) -> Edit:
    """Resolves the site name and checks what is known before the input is: axes, ranges, layers of the operand.

    Raises:
      SiteError: unknown site, an index on an axis that the site lacks, an index out of range, a value of a wrong shape.
    """
    site, layer = table.resolve(edit.site)
    if layer is not None:
        if edit.index.layer is not None:
            raise SiteError(f"{edit.site!r} names its layer; leave layer=… out, or use {site.name!r}")
        edit = edit.placed(layer=jnp.asarray(layer, jnp.int32))
    for name, value in edit.index.items():
        axis = index_axis(site, name)
        if axis is None:
            raise SiteError(f"site {site.name!r} has axes {' '.join(site.axes)}; it takes no index {name!r}")
        sized = axis in dict(table.sizes)
        if sized and not isinstance(value, Each | jax.core.Tracer):
            for one in np.asarray(value).reshape(-1).tolist():
                table.check_index(site, axis, one)
    if is_stacked(edit, site) and edit.operand.shape[0] != table.size(LAYER):
        raise SiteError(
            f"the value for site {site.name!r} has {edit.operand.shape[0]} layers, {table.model} has "
            f"{table.size(LAYER)}; capture all layers, or pass one layer's value with layer=…"
        )
    return dataclasses.replace(edit, site=site.name)


def is_stacked(edit: Edit, site: Site) -> bool:
    """Whether the operand has a leading layer axis, that is, the rank of the whole site."""
    return site.layered and eqx.is_array(edit.operand) and edit.operand.ndim == len(site.axes)


def apply(
    edit: Edit,
    operand: Any,
    x: Array,
    site: Site,
    layer: Int[Array, ""] | None,
    mask: Bool[Array, "batch pos"] | None = None,
) -> Array:
    """The site's value after one edit; `operand` and `x` belong to one layer, `mask` is True at real tokens."""
    for name in edit.each_axes():
        raise SiteError(f"site {site.name!r}: mi.each on {name!r} marks an axis of a sweep; use mi.sweep")
    if isinstance(edit, AblateMean):
        operand = _mean(x, site, mask)
    if isinstance(edit, AblateResample) and x.shape[0] < 2:
        raise SiteError(f"site {site.name!r}: baseline 'resample' takes another example, the batch has {x.shape[0]}")
    chosen_layer = None if edit.index.layer is None else jnp.any(layer == edit.index.layer)
    if isinstance(edit, Transform) and chosen_layer is not None:
        new = jax.lax.cond(chosen_layer, lambda v: _new_value(edit, operand, v), lambda v: v, x)
    else:
        new = _new_value(edit, operand, x)
    selected = _selection(edit.index, x, site)
    if chosen_layer is not None:
        selected = chosen_layer if selected is None else selected & chosen_layer
    if selected is None:
        return new
    return jnp.where(jnp.broadcast_to(selected, x.shape), new, x)


def _mean(x: Array, site: Site, mask: Array | None) -> Array:
    """Mean over the examples, and over the real positions where the site has one value a position."""
    if "pos" not in site.slice_axes:
        return x.mean(0, keepdims=True)
    weight = jnp.ones(x.shape[:2], x.dtype) if mask is None else mask.astype(x.dtype)
    total = (x * weight.reshape(*x.shape[:2], *(1,) * (x.ndim - 2))).sum((0, 1), keepdims=True)
    return total / weight.sum()


def _new_value(edit: Edit, operand: Any, x: Array) -> Array:
    if eqx.is_array(operand) and not jnp.issubdtype(operand.dtype, jax.dtypes.prng_key):
        try:
            operand = jnp.broadcast_to(operand, x.shape).astype(x.dtype)
        except ValueError:
            raise SiteError(
                f"the value for site {edit.site!r} has shape {operand.shape}, which does not broadcast against "
                f"{x.shape}, the site in one layer"
            ) from None
    new = edit.new(x, operand)
    if new.shape != x.shape:
        raise SiteError(f"the edit of site {edit.site!r} gave shape {new.shape} instead of {x.shape}")
    return new.astype(x.dtype)


def index_axis(site: Site, index_name: str) -> str | None:
    """The axis of a site that an index such as `head` means, None if the site has none."""
    return next((axis for axis in _INDEX_AXES[index_name] if axis in site.axes), None)


def _selection(index: Index, x: Array, site: Site) -> Bool[Array, "..."] | None:
    """Mask that broadcasts against x, from the indices other than the layer."""
    mask = None
    for name, value in index.items():
        if name == "layer":
            continue
        axis = site.slice_axes.index(index_axis(site, name) or "")
        n = x.shape[axis]
        _check_places(site.name, name, value, n)
        places = jnp.where(value < 0, value + n, value)
        if name == "pos" and index.per_example and places.ndim:
            if places.shape[0] != x.shape[0]:
                raise SiteError(f"site {site.name!r}: {places.shape[0]} positions for a batch of {x.shape[0]}")
            hit, axes = jnp.arange(n, dtype=jnp.int32)[None, :] == places[:, None], (0, axis)
        else:
            hit, axes = (jnp.arange(n, dtype=jnp.int32)[:, None] == places.reshape(1, -1)).any(1), (axis,)
        hit = jnp.expand_dims(hit, [i for i in range(x.ndim) if i not in axes])
        mask = hit if mask is None else mask & hit
    return mask


def _check_places(site: str, name: str, value: Array, n: int) -> None:
    if isinstance(value, jax.core.Tracer):
        return
    for one in np.asarray(value).reshape(-1).tolist():
        if not -n <= one < n:
            raise SiteError(f"site {site!r} has {n} places on {name!r} (0–{n - 1}); got {name}={one}")


def check_positions(tree: Any, n_pos: int) -> None:
    """Checks the positions of all edits in a pytree against a prompt length, before tracing hides their values.

    Raises:
      SiteError: a position out of range.
    """
    for edit in jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, Edit)):
        if isinstance(edit, Edit) and eqx.is_array(edit.index.pos):
            _check_places(edit.site, "pos", edit.index.pos, n_pos)


Taps = Mapping[str, tuple[Edit, ...]]


def taps(edits: Sequence[Edit], table: SiteTable) -> dict[str, tuple[Edit, ...]]:
    """Edits grouped by site, in order: the pytree that a model takes as `taps`."""
    out: dict[str, tuple[Edit, ...]] = {}
    for edit in edits:
        edit = check(edit, table)
        out[edit.site] = (*out.get(edit.site, ()), edit)
    return out
