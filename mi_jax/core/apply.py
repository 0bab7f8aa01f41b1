"""Applying edits: what is checked before a model runs, and the value of a site after one edit."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from mi_jax.core.edits import Edit, Transform
from mi_jax.core.index import Each, check_places, index_axis, out_of_range, selection
from mi_jax.core.sites import LAYER, Site, SiteError, SiteTable
from mi_jax.core.values import Place, by_name, has_layers

Taps = Mapping[str, tuple[Edit, ...]]


def taps(edits: Sequence[Edit], table: SiteTable) -> dict[str, tuple[Edit, ...]]:
    """Edits grouped by site, in order: the pytree that a model takes as `taps`."""
    out: dict[str, tuple[Edit, ...]] = {}
    for edit in edits:
        edit = check(edit, table)
        out[edit.site] = (*out.get(edit.site, ()), edit)
    return out


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
    if (axes := edit.reading.axes) is not None:
        edit = edit.with_value(by_name(edit.value, axes, site))
        edit = _read(edit, axes=tuple(sorted(axes, key=site.axes.index)))
    for leaf in jax.tree.leaves(split(edit, site)[0]):
        if leaf.shape[0] != table.size(LAYER):
            raise SiteError(
                f"the value for site {site.name!r} has {leaf.shape[0]} layers, {table.model} has "
                f"{table.size(LAYER)}; capture all layers, or pass one layer's value with layer=…"
            )
    one_layer = isinstance(edit.index.layer, jax.Array) and edit.index.layer.ndim == 0
    # the axis of the layers may be among those of the value where nothing says that it is not
    maybe_layers = site.layered and not one_layer and not has_layers(edit.value, site)
    if edit.reading.captured and maybe_layers:
        raise SiteError(
            f"the captured value for site {site.name!r} is of one layer; say which one it is for with layer=…, or "
            "capture all layers"
        )
    return dataclasses.replace(_read(edit, n_layers=table.size(LAYER) if maybe_layers else None), site=site.name)


def _read(edit: Edit, **how: Any) -> Edit:
    return dataclasses.replace(edit, reading=dataclasses.replace(edit.reading, **how))


def checked(taps: Taps, table: SiteTable) -> Taps:
    """Taps that a model was called with, checked as `intervene` checks edits.

    Raises:
      SiteError: a key that is not a site's own name, or an edit that does not fit.
    """
    for name, edits in taps.items():
        if name not in table.names:
            raise SiteError(
                f"taps are keyed by site; {table.model} has no site {name!r}, it has {', '.join(table.names)}"
            )
        for edit in edits:
            check(edit, table)
    return taps


def check_positions(tree: Any, n_pos: int) -> None:
    """Checks the positions of all edits in a pytree against a prompt length, before tracing hides their values.

    Raises:
      SiteError: a position out of range.
    """
    for edit in jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, Edit)):
        if isinstance(edit, Edit) and eqx.is_array(edit.index.pos):
            check_places(edit.site, "pos", edit.index.pos, n_pos)


def split(edit: Edit, site: Site) -> tuple[Any, Any]:
    """The operand in two trees: the leaves with a leading layer axis, and the others."""
    return eqx.partition(edit.operand, edit.stacked(site))


def apply(
    edit: Edit,
    operand: Any,
    x: Array,
    site: Site,
    layer: Int[Array, ""] | None,
    mask: Bool[Array, "batch pos"] | None = None,
    n_layers: int | None = None,
) -> Array:
    """The site's value after one edit; `operand` and `x` belong to one layer, `mask` is True at real tokens.

    A traced index that is out of range makes it NaN: an edit that does nothing would look like one without effect.
    """
    for name in edit.each_axes():
        raise SiteError(f"site {site.name!r}: mi.each on {name!r} marks an axis of a sweep; use mi.sweep")
    chosen_layer = None if edit.index.layer is None else jnp.any(layer == edit.index.layer)
    selected = selection(edit.index, x, site, layer)
    operand = edit.prepare(operand, x, Place(site, layer, mask, selected))
    if isinstance(edit, Transform) and chosen_layer is not None:
        new = jax.lax.cond(chosen_layer, lambda v: _new_value(edit, operand, v), lambda v: v, x)
    else:
        new = _new_value(edit, operand, x)
    if selected is not None:
        new = jnp.where(jnp.broadcast_to(selected, x.shape), new, x)
    for wrong in _out_of_range(edit, site, x, n_layers):
        new = jnp.where(wrong, jnp.full_like(new, jnp.nan), new)
    return new


def _out_of_range(edit: Edit, site: Site, x: Array, n_layers: int | None) -> list[Bool[Array, ""]]:
    found = []
    for name, value in edit.index.items():
        if name == LAYER:
            wrong = None if n_layers is None else out_of_range(value, n_layers, negative=False)
        else:
            wrong = out_of_range(value, x.shape[site.slice_axes.index(index_axis(site, name) or "")])
        found += [] if wrong is None else [wrong]
    return found


def _new_value(edit: Edit, operand: Any, x: Array) -> Array:
    new = edit.new(x, operand)
    if new.shape != x.shape:
        raise SiteError(f"the edit of site {edit.site!r} gave shape {new.shape} instead of {x.shape}")
    return new.astype(x.dtype)
