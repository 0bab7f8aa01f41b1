"""`check_sites`: whether the sites of a model hold what their names say, and do what sites do.

A site name is a promise in the form of an equation. Every model family and every adapter is held to the same ones; an
equation is checked wherever the model has all of its sites. That a value is where its edits act and nowhere else is
checked at every site of every model.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from mi_jax.core.edits import Edit
from mi_jax.core.identities import Acts, equations
from mi_jax.core.index import Index
from mi_jax.core.precision import tolerance as dtype_tolerance
from mi_jax.core.sites import LAYER, Site, SiteError
from mi_jax.core.transforms import SiteModel, capture, jit


class _Swap(Edit):
    """Replaces the value where the operand says so: one program serves for every site and every layer."""

    def stacked(self, site):
        return (site.layered, site.layered)

    def prepare(self, operand, x, place):
        return operand

    def new(self, x, operand):
        on, value = operand
        return jnp.where(on, value, x)


def check_sites(
    model: SiteModel,
    *inputs: Any,
    mask: Bool[Array, "batch pos"] | None = None,
    tolerance: float | None = None,
    **options: Any,
) -> list[str]:
    """Checks every equation between sites, the shape of every site, and what every site does when it is edited.

    At every site: capturing it leaves the output as it is; so does replacing it by itself, in all layers; replaced by
    something else in one layer, it holds that there and what it held before in the layers before. Some site has an
    effect on the output, and a compiled run gives what a plain one gives.

    Args:
      inputs: of the model; the first has the shape `[batch pos …]`.
      mask: True at real tokens, passed on where it is given. A second input of booleans in the shape of the first is
        taken for it too.
      tolerance: largest difference, relative to the largest absolute value of the site where that exceeds 1; None for
        that of the model's dtype, 1e-5 for float32, 0.0625 for bfloat16, 0.0078 for float16.
      options: further arguments of the model.

    Returns:
      The equations that hold: those that the model has the sites for, then what holds of every site.

    Raises:
      SiteError: an equation that does not hold, with the largest difference, a site of the wrong shape, or a site that
        does not do what its edits say.

    Example:
      `check_sites(model, tokens)` for an adapter of a foreign model, before anything is measured with it.
    """
    table = model.site_table
    if mask is not None:
        options = options | {"mask": mask}
    elif len(inputs) > 1 and getattr(inputs[1], "dtype", None) == np.dtype(bool):
        mask = inputs[1] if inputs[1].shape == inputs[0].shape else None
    output, captured = jit(capture(model, *table.names))(*inputs, **options)
    acts = {name: np.asarray(x, np.float64) for name, x in captured.items()}
    if isinstance(output, jax.Array):
        acts["output"] = np.asarray(output, np.float64)
    if tolerance is None:
        tolerance = max(dtype_tolerance(x.dtype) for x in captured.values())
    leading = _leading(inputs, dict(table.sizes))
    _check_shapes(table.model, table.sites, acts, _known(leading) | dict(table.sizes))
    real = np.ones(leading, bool) if mask is None else np.asarray(mask)
    checked = []
    for equation, sides in equations(table, acts).items():
        left, right = sides(acts, real)
        _compare(table.model, equation, left, right, tolerance)
        checked.append(equation)
    return checked + _check_behaviour(model, inputs, options, (output, captured), tolerance)


def _check_behaviour(
    model: SiteModel, inputs: tuple, options: Mapping[str, Any], clean: tuple[Any, dict[str, Array]], tolerance: float
) -> list[str]:
    """What holds of the sites of any model; `clean` is the compiled run without edits."""
    table, (output, acts) = model.site_table, clean
    checked = []

    def holds(equation: str, left: Any, right: Any) -> None:
        pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
        for a, b in pairs:
            _compare(table.model, equation, np.asarray(a, np.float64), np.asarray(b, np.float64), tolerance)
        generic = equation.partition(":")[0]
        if generic not in checked:
            checked.append(generic)

    holds("capturing changes nothing", output, jit(model)(*inputs, **options))
    holds("jit == no jit", clean, capture(model, *table.names)(*inputs, **options))

    off = {site.name: np.zeros(_gates(site, table.sizes), bool) for site in table.sites}
    held = jax.tree.map(np.asarray, acts)
    # halved and shifted: another value wherever it was, and no more extreme than it was
    others = {name: (x / 2 + 1).astype(x.dtype) for name, x in held.items()}
    run = jit(capture(model, *table.names))

    def swapped(name: str, gates: Any, values: Mapping[str, Array]) -> tuple[Any, Acts]:
        on = off | {name: gates}
        taps = {site: (_Swap(site, Index(), (jnp.asarray(on[site]), values[site])),) for site in table.names}
        return jax.tree.map(np.asarray, run(*inputs, taps=taps, **options))

    effect, new_values = False, jax.tree.map(jnp.asarray, others)
    for site in table.sites:
        name, gates = site.name, off[site.name]
        layer = len(gates) // 2 if site.layered else None
        new_output, new = swapped(name, ~gates if layer is None else np.arange(len(gates)) == layer, new_values)
        here = ... if layer is None else layer
        holds(f"a replaced site holds the new value: {name!r}", new[name][here], others[name][here])
        if layer:
            holds(f"earlier layers stay as they were: {name!r}", new[name][:layer], held[name][:layer])
        holds(f"a site replaced by itself changes nothing: {name!r}", swapped(name, ~gates, acts), clean)
        effect = effect or _differ(new_output, output)
    if not effect:
        raise SiteError(f"{table.model}: no site changes the output when it is replaced by something else")
    return [*checked, "some site changes the output"]


def _leading(inputs: tuple, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Batch and positions: of the first input, unless the model has its own number of positions."""
    shape = next((x.shape for x in jax.tree.leaves(inputs) if getattr(x, "ndim", 0) > 1), ())
    return (shape[0], sizes["pos"]) if shape and "pos" in sizes else shape[:2]


def _known(leading: tuple[int, ...]) -> dict[str, int]:
    if len(leading) < 2:
        return {}
    return {"batch": leading[0]} | dict.fromkeys(("pos", "query", "key"), leading[1])


def _check_shapes(model: str, sites: tuple[Site, ...], acts: Acts, known: Mapping[str, int]) -> None:
    """Checks the axes whose sizes are known."""
    for site in sites:
        shape = acts[site.name].shape
        expected = tuple(known.get(axis, n) for axis, n in zip(site.axes, shape, strict=False))
        if len(shape) != len(site.axes) or shape != expected:
            expected = tuple(known.get(axis, axis) for axis in site.axes)
            raise SiteError(
                f"site {site.name!r} of {model} has shape {shape}; its axes {' '.join(site.axes)} make {expected}"
            )


def _gates(site: Site, sizes: tuple[tuple[str, int], ...]) -> tuple[int, ...]:
    return (dict(sizes)[LAYER],) if site.layered else ()


def _differ(left: Any, right: Any) -> bool:
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return any(not np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)


def _compare(model: str, equation: str, left: np.ndarray, right: np.ndarray, tolerance: float) -> None:
    scale = max(1.0, float(np.abs(right, where=np.isfinite(right), out=np.zeros(right.shape)).max(initial=0.0)))
    # infinities on both sides are equal
    with np.errstate(invalid="ignore"):
        difference = float(np.where(left == right, 0.0, np.abs(left - right)).max(initial=0.0))
    if not difference <= tolerance * scale:
        raise SiteError(
            f"{model}: {equation} does not hold: the sides differ by {difference:.3g}, values reach {scale:.3g}"
        )
