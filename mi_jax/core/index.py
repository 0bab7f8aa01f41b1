"""Indices: where an edit applies, and the mask of those places."""

import dataclasses
import itertools
from typing import Any, Literal

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


@dataclasses.dataclass(frozen=True)
class Places:
    """Places with how they go together; `per_example`, `pairs` and `product` make them."""

    value: Any
    how: Literal["per example", "pairs", "product"]


def per_example(positions) -> Places:
    """One position for every example, `[batch]`; a tuple of ints, in contrast, is a set for all examples.

    Example: `mi.patch("resid_pre", acts, layer=3, pos=mi.per_example(subject_position))`.
    """
    return Places(positions, "per example")


def pairs(*, layer=None, pos=None, head=None, unit=None) -> dict[str, Places]:
    """Places that go together, the first of one index with the first of the others, and so on.

    Example: `mi.ablate("attn.z", **mi.pairs(layer=(0, 2), head=(1, 3)))` ablates head 1 of layer 0 and head 3 of
    layer 2.

    Raises:
      SiteError: fewer than two indices, or sets of different sizes.
    """
    given = _given(layer, pos, head, unit)
    shapes = {np.shape(value) for value in given.values()}
    if len(given) < 2 or len(shapes) != 1 or len(next(iter(shapes))) != 1:
        sizes = ", ".join(f"{name} of shape {np.shape(value)}" for name, value in given.items())
        raise SiteError(f"pairs takes two or more flat sets of the same size, such as layer and head; got {sizes}")
    return {name: Places(value, "pairs") for name, value in given.items()}


def product(*, layer=None, pos=None, head=None, unit=None) -> dict[str, Places]:
    """Every place of one index with every place of the others.

    Example: `mi.ablate("attn.z", **mi.product(layer=(0, 2), head=(1, 3)))` ablates four heads.
    """
    return {name: Places(value, "product") for name, value in _given(layer, pos, head, unit).items()}


def _given(layer, pos, head, unit) -> dict[str, Any]:
    named = {"layer": layer, "pos": pos, "head": head, "unit": unit}
    return {name: value for name, value in named.items() if value is not None}


# Which axis of a site an index means: the first of these that the site has.
_INDEX_AXES = {
    "layer": (LAYER,),
    "pos": ("pos", "query"),
    "head": ("head", "kv_head"),
    "unit": ("d_head", "d_mlp", "d_model", "d_vocab", "unit", "expert"),
}


class Index(eqx.Module):
    """Where an edit applies. None: everywhere on that axis.

    An int or a scalar array is one place, a list, tuple or array of ints a set of places. `per_example` gives every
    example its own position; an array of positions needs it, or to be a tuple, for it could be either. Two sets of one
    size are `pairs` or a `product`; of different sizes they are a product. Negative positions, heads and units count
    from the end of the axis, which at right-padded prompts is padding: give such prompts their own positions. Layers do
    not count from the end. A place that is out of range is an error where its value is known, and makes the site NaN
    where it is traced. Edits with stacked indices can be mapped over with `jax.vmap`; `pairs` stacks them.

    Attributes:
      per_example: `pos` is one for every example.
      paired: the indices whose places go together one by one.
    """

    layer: Any = None
    pos: Any = None
    head: Any = None
    unit: Any = None
    per_example: bool = eqx.field(static=True, default=False)
    paired: tuple[str, ...] = eqx.field(static=True, default=())

    @classmethod
    def of(cls, layer=None, pos=None, head=None, unit=None) -> "Index":
        """Indices as int32 arrays.

        Raises:
          SiteError: an index that is not an integer, an empty set, which would edit nothing, positions that could be a
            set or one for every example, or sets that could be pairs or a product.
        """
        given = _given(layer, pos, head, unit)
        how = {name: value.how for name, value in given.items() if isinstance(value, Places)}
        values = {name: value.value if isinstance(value, Places) else value for name, value in given.items()}
        for name, value in values.items():
            if len(np.shape(value)) > 1:
                raise SiteError(f"{name!r} takes one place or a flat set of them; got shape {np.shape(value)}")
        _check_unambiguous(values, how)
        places = {name: _places(name, value) for name, value in values.items()}
        paired = tuple(name for name in values if how.get(name) == "pairs")
        return cls(**places, per_example="per example" in how.values(), paired=paired)

    def items(self) -> list[tuple[str, Any]]:
        return [(name, value) for name in _INDEX_AXES if (value := getattr(self, name)) is not None]

    def replace(self, **values) -> "Index":
        merged = {name: getattr(self, name) for name in _INDEX_AXES} | values
        paired = tuple(name for name in self.paired if name not in values)
        return Index(**merged, per_example=self.per_example and "pos" not in values, paired=paired)


def _check_unambiguous(values: dict[str, Any], how: dict[str, str]) -> None:
    """Raises SiteError for arrays of positions, and for sets of one size, that could mean two things."""
    for name in (name for name in how if how[name] == "per example"):
        if name != "pos" or len(np.shape(values[name])) != 1:
            raise SiteError(
                f"mi.per_example gives pos one place for every example, [batch]; got {name} of shape "
                f"{np.shape(values[name])}"
            )
    if "pos" not in how and getattr(values.get("pos"), "ndim", 0):
        raise SiteError(
            f"'pos' is an array of shape {np.shape(values['pos'])}, which may be one position for every example or a "
            "set for all of them: pass pos=mi.per_example(…) for the first, a tuple for the second"
        )
    sizes = {name: np.shape(value)[0] for name, value in values.items() if name not in how and np.shape(value)}
    for one, other in itertools.combinations(sizes, 2):
        if sizes[one] == sizes[other] > 1:
            raise SiteError(
                f"{one!r} and {other!r} are both sets of {sizes[one]} places, which may go together one by one or each "
                f"with each: pass **mi.pairs({one}=…, {other}=…) for the first, **mi.product({one}=…, {other}=…) for "
                "the second"
            )


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


def selection(index: Index, x: Array, site: Site, layer: Array | None = None) -> Bool[Array, "..."] | None:
    """Mask that broadcasts against x; None means everywhere.

    Args:
      layer: the one that x belongs to.
    """
    mask = None if index.layer is None else (layer == index.layer).any()
    together = None
    for name, value in index.items():
        if name == "layer":
            if name in index.paired:
                together = (layer == value).reshape(*(1,) * x.ndim, -1)
            continue
        axis = site.slice_axes.index(index_axis(site, name) or "")
        n = x.shape[axis]
        check_places(site.name, name, value, n)
        places = jnp.where(value < 0, value + n, value)
        if name in index.paired:
            hit = jnp.arange(n, dtype=jnp.int32)[:, None] == places.reshape(1, -1)
            hit = jnp.expand_dims(hit, [i for i in range(x.ndim) if i != axis])
            together = hit if together is None else together & hit
            continue
        if name == "pos" and index.per_example and places.ndim:
            if places.shape[0] != x.shape[0]:
                raise SiteError(f"site {site.name!r}: {places.shape[0]} positions for a batch of {x.shape[0]}")
            hit, axes = jnp.arange(n, dtype=jnp.int32)[None, :] == places[:, None], (0, axis)
        else:
            hit, axes = (jnp.arange(n, dtype=jnp.int32)[:, None] == places.reshape(1, -1)).any(1), (axis,)
        hit = jnp.expand_dims(hit, [i for i in range(x.ndim) if i not in axes])
        mask = hit if mask is None else mask & hit
    if together is None:
        return mask
    together = together.any(-1)
    return together if mask is None else mask & together


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
