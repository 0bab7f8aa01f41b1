"""Freight: how edits reach a tensor inside `scan`, `checkpoint`, `jit` or `vmap`, and how its value gets out.

Nothing is carried by closure there: a cached trace would be stale, and a scan has one body for all layers. Arrays go in
beside the parameters of a module, which every transform of the foreign model splits by layer as it must; a value comes
out as the cotangent of a slot that went in.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float, Inexact

from mi_jax.models.adapters.visits import Shape


@jax.custom_vjp
def report(x: Float[Array, "..."], value: Inexact[Array, "..."], slot: Inexact[Array, "..."]) -> Float[Array, "..."]:
    """x itself; the cotangent of `slot` is `value`, whatever comes after x in the model."""
    return x


def _report_forward(x, value, slot):
    return x, value


def _report_backward(value, cotangent):
    return cotangent, jnp.zeros_like(value), value


report.defvjp(_report_forward, _report_backward)


def with_slots(call: Callable, slots: Mapping[Any, Array]) -> tuple[Any, dict[Any, Array]]:
    """The output of `call(slots)`, and what it has seen in place together with the cotangents of the slots."""
    static: list[Any] = []

    def arrays_only(slots):
        out, seen = call(slots)
        arrays, rest = eqx.partition(out, eqx.is_array)
        static.append(rest)
        floating = [x for x in jax.tree.leaves((arrays, seen)) if jnp.issubdtype(x.dtype, jnp.inexact)]
        return floating, (arrays, seen)

    floating, backward, (arrays, seen) = jax.vjp(arrays_only, slots, has_aux=True)
    (reported,) = backward([jnp.zeros_like(x) for x in floating])
    return eqx.combine(arrays, static[-1]), {**seen, **reported}


def whole(
    fn: Callable[[Array, Any], Array],
    x: Array,
    freight: Any,
    done: Callable[[Shape], bool],
    mapped: Callable[[], None] = lambda: None,
) -> Array:
    """`fn(x, freight)` once every `vmap` of the foreign model around x has put its axis in front.

    Args:
      fn: keeps the shape of x.
      done: whether a shape has all axes; further ones are a `vmap` of the user's.
      mapped: called if the freight itself is mapped over.
    """
    if done(x.shape):
        return fn(x, freight)

    @custom_vmap
    def part(x, freight):
        return x

    @part.def_vmap
    def rule(n, batched, x, freight):
        if any(jax.tree.leaves(batched[1])):
            # as in an ensemble: the calls of such a module have no layer
            mapped()
            return x, batched[0]
        x = x if batched[0] else jnp.broadcast_to(x[None], (n, *x.shape))
        return whole(fn, x, freight, done, mapped), True

    return part(x, freight)


@dataclasses.dataclass(frozen=True)
class Stack:
    """How the parameters of a module are stacked: the layer axis, and its length."""

    axis: int
    n: int

    def put(self, leaf: Array) -> Array:
        """An array, the same for every layer, as the scan takes it."""
        leaf = jnp.expand_dims(leaf, tuple(range(self.axis + 1)))
        shape = list(leaf.shape)
        shape[self.axis] = self.n
        return jnp.broadcast_to(leaf, tuple(shape))

    def put_layers(self, leaf: Array) -> Array:
        """An array with a leading layer axis, as the scan takes it."""
        leaf = jnp.expand_dims(leaf, tuple(range(1, self.axis + 1)))
        return jnp.moveaxis(leaf, 0, self.axis)

    def take(self, leaf: Array) -> Array:
        """One layer's array, as the body of the scan sees it, without the axes that `put` has added."""
        return leaf.reshape(leaf.shape[self.axis :])

    def get_layers(self, leaf: Array) -> Array:
        """The inverse of `put_layers`."""
        leaf = jnp.moveaxis(leaf, self.axis, 0)
        return leaf.reshape(leaf.shape[0], *leaf.shape[self.axis + 1 :])


def stack_of(outside: Sequence[Shape], inside: Sequence[Shape]) -> Stack | None:
    """The axis that a transform has taken off the parameters; None if it has taken none off.

    Raises:
      ValueError: the shapes differ in some other way.
    """
    if list(outside) == list(inside):
        return None
    pairs = list(zip(outside, inside, strict=True))
    for axis in range(max(map(len, outside))):
        sizes = {a[axis] if axis < len(a) and (*a[:axis], *a[axis + 1 :]) == b else None for a, b in pairs}
        if len(sizes) == 1 and None not in sizes:
            return Stack(axis, int(next(iter(sizes)) or 0))
    raise ValueError(f"the parameters outside, {outside}, are not those inside, {inside}, stacked along one axis")
