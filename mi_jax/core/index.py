"""Indices: where an edit applies, and the mask of those places."""

from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from mi_jax.core.sites import LAYER, Site, SiteError


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
    "unit": ("d_head", "d_mlp", "d_model", "d_vocab", "unit", "expert"),
}


class Index(eqx.Module):
    """Where an edit applies. None: everywhere on that axis.

    An int or a scalar array is one place, a list or tuple of ints a set of places. For `pos`, an array of shape
    `[batch]` gives every example its own position. Negative positions, heads and units count from the end of the axis,
    which at right-padded prompts is padding: give such prompts their own positions. Layers do not count from the end.
    A place that is out of range is an error where its value is known, and makes the site NaN where it is traced.
    Edits with stacked indices can be mapped over with `jax.vmap`.
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
        for name, value in (("layer", layer), ("pos", pos), ("head", head), ("unit", unit)):
            shape = () if value is None else np.shape(value)
            if len(shape) > 1:
                raise SiteError(f"{name!r} takes one place or a flat set of them; got shape {shape}")
        per_example = getattr(pos, "ndim", 0) >= 1
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


def index_axis(site: Site, index_name: str) -> str | None:
    """The axis of a site that an index such as `head` means, None if the site has none."""
    return next((axis for axis in _INDEX_AXES[index_name] if axis in site.axes), None)


def selection(index: Index, x: Array, site: Site) -> Bool[Array, "..."] | None:
    """Mask that broadcasts against x, from the indices other than the layer."""
    mask = None
    for name, value in index.items():
        if name == "layer":
            continue
        axis = site.slice_axes.index(index_axis(site, name) or "")
        n = x.shape[axis]
        check_places(site.name, name, value, n)
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


def check_places(site: str, name: str, value: Array, n: int) -> None:
    """Raises SiteError for an index out of range, where its value is known."""
    if isinstance(value, jax.core.Tracer):
        return
    for one in np.asarray(value).reshape(-1).tolist():
        if not -n <= one < n:
            raise SiteError(f"site {site!r} has {n} places on {name!r} (0–{n - 1}); got {name}={one}")


def out_of_range(value: Array, n: int, *, negative: bool = True) -> Bool[Array, ""] | None:
    """Whether any of some traced places is out of range; None where the values are known, which were checked."""
    if not isinstance(value, jax.core.Tracer):
        return None
    return ((value >= n) | (value < (-n if negative else 0))).any()
