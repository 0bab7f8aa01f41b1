"""Nodes: places in the activation pytree, without a value: what is attributed to, sent from and received at."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mi_jax.core.apply import apply, check, split
from mi_jax.core.edits import Edit, Patch
from mi_jax.core.index import Index, index_axis
from mi_jax.core.sites import LAYER, Site, SiteError, SiteTable
from mi_jax.core.values import value_of

INDEX_NAMES = ("layer", "pos", "head", "unit")


class Node(eqx.Module):
    """A place; see `node`."""

    site: str = eqx.field(static=True)
    index: Index

    def patch(self, value: Any) -> Patch:
        """The edit that puts a value there: the site's dictionary or array, from which the same place is taken."""
        return Patch(self.site, self.index, *value_of(self.site, value))

    def checked(self, table: SiteTable) -> "Node":
        """The node with its site's own name, and the layer in the index where the name gave it.

        Raises:
          SiteError: an unknown site, an index on an axis that the site lacks, or one out of range.
        """
        edit = check(self.patch(jnp.zeros(())), table)
        return Node(edit.site, edit.index)


def node(site: str, *, layer=None, pos=None, head=None, unit=None) -> Node:
    """A place in the activation pytree; an index that is left out means everywhere on that axis.

    Args:
      site: a site of the model, or a TransformerLens name.
      layer, pos, head, unit: as in `patch`: ints, arrays, tuples, or `mi.each`.

    Example:
      `mi.node("attn.z", layer=5, head=3)`, or `mi.node("attn.q", layer=mi.each, head=mi.each)`.
    """
    return Node(site, Index.of(layer, pos, head, unit))


def as_node(place: str | Node, table: SiteTable) -> Node:
    """A checked node; a bare site name means all of that site."""
    return (node(place) if isinstance(place, str) else place).checked(table)


def node_axes(site: Site, axes: tuple[str, ...]) -> tuple[str, ...]:
    """Those of `axes` that the site has, in the order layer, pos, head, unit.

    Raises:
      SiteError: an axis that is not one of these four.
    """
    for name in axes:
        if name not in INDEX_NAMES:
            raise SiteError(f"axes are among {', '.join(INDEX_NAMES)}; got {name!r}")
    return tuple(name for name in INDEX_NAMES if name in axes and index_axis(site, name) is not None)


def sum_to_nodes(x: Float[Array, "..."], site: Site, axes: tuple[str, ...]) -> Float[Array, "..."]:
    """Sums an array of the whole site over everything but `axes`; the result has their order."""
    names = [index_axis(site, name) for name in axes]
    x = x.sum([i for i, axis in enumerate(site.axes) if axis not in names])
    left = [axis for axis in site.axes if axis in names]
    return x.transpose([left.index(axis or "") for axis in names])


def edited(
    edit: Edit, values: Float[Array, "..."], table: SiteTable, mask: Bool[Array, "batch pos"] | None = None
) -> Float[Array, "..."]:
    """A whole site's values after an edit, each layer on its own: no layer sees what the edit did to another."""
    site, _ = table.resolve(edit.site)
    if not site.layered:
        return apply(edit, edit.operand, values, site, None, mask)
    layers = jnp.arange(table.size(LAYER), dtype=jnp.int32)
    stacked, rest = split(edit, site)

    def in_layer(row):
        operand, x, layer = row
        return apply(edit, eqx.combine(operand, rest), x, site, layer, mask)

    return jax.lax.map(in_layer, (stacked, values, layers))
