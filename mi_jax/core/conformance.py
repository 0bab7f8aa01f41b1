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
from mi_jax.core.index import Index
from mi_jax.core.sites import LAYER, Site, SiteError
from mi_jax.core.transforms import SiteModel, capture, jit

Acts = dict[str, np.ndarray]


def _same(acts: Acts, *names: str):
    return tuple(acts[name] for name in names)


def _readers(acts: Acts, name: str):
    stream = acts["resid_pre"][..., None, :]
    return acts[name], np.broadcast_to(stream, acts[name].shape)


def _masked_scores(acts: Acts, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    q, k = acts["attn.q"], acts["attn.k"]
    k = np.repeat(k, q.shape[3] // k.shape[3], 3)
    scores = np.einsum("lbqhd,lbkhd->lbhqk", q, k) / np.sqrt(q.shape[-1])
    allowed = np.tril(np.ones(scores.shape[-2:], bool)) & mask[None, :, None, None, :]
    # a score that is not allowed may be any hugely negative number: both sides then count as 0
    found = np.where(acts["attn.scores"] < -1e9, 0.0, acts["attn.scores"])
    return found, np.where(allowed, scores, 0.0)


def _softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def _mixed(acts: Acts) -> np.ndarray:
    pattern, v = acts["attn.pattern"], acts["attn.v"]
    return np.einsum("lbhqk,lbkhd->lbqhd", pattern, np.repeat(v, pattern.shape[2] // v.shape[3], 3))


# equation: the sites it needs, and both of its sides
_IDENTITIES = {
    "resid_pre[0] == embed": (("resid_pre", "embed"), lambda a, m: (a["resid_pre"][0], a["embed"])),
    "resid_pre[l+1] == resid_post[l]": (
        ("resid_pre", "resid_post"),
        lambda a, m: (a["resid_pre"][1:], a["resid_post"][:-1]),
    ),
    "resid_mid == resid_pre + attn_out": (
        ("resid_mid", "resid_pre", "attn_out"),
        lambda a, m: (a["resid_mid"], a["resid_pre"] + a["attn_out"]),
    ),
    "mlp.in == resid_mid": (("mlp.in", "resid_mid"), lambda a, m: _same(a, "mlp.in", "resid_mid")),
    "attn.q_in == resid_pre of every head": (("attn.q_in", "resid_pre"), lambda a, m: _readers(a, "attn.q_in")),
    "attn.k_in == resid_pre of every head": (("attn.k_in", "resid_pre"), lambda a, m: _readers(a, "attn.k_in")),
    "attn.v_in == resid_pre of every head": (("attn.v_in", "resid_pre"), lambda a, m: _readers(a, "attn.v_in")),
    "attn.scores == attn.q · attn.k / sqrt(d_head), causal": (("attn.scores", "attn.q", "attn.k"), _masked_scores),
    "attn.pattern == softmax(attn.scores)": (
        ("attn.pattern", "attn.scores"),
        lambda a, m: (a["attn.pattern"], _softmax(a["attn.scores"])),
    ),
    "attn.z == attn.pattern · attn.v": (
        ("attn.z", "attn.pattern", "attn.v"),
        lambda a, m: (a["attn.z"], _mixed(a)),
    ),
    "attn_out == Σ_head attn.head_out": (
        ("attn_out", "attn.head_out"),
        lambda a, m: (a["attn_out"], a["attn.head_out"].sum(3)),
    ),
    "logits == output": (("logits", "output"), lambda a, m: _same(a, "logits", "output")),
}


def _stream_identity(names: tuple[str, ...]) -> str:
    """What the end of a layer is the sum of, given the sites: sequential, parallel, or attention only."""
    start = "resid_mid" if "resid_mid" in names else "resid_pre"
    parts = [start] + ["attn_out"] * (start == "resid_pre") + ["mlp_out"] * ("mlp_out" in names)
    return "resid_post == " + " + ".join(parts)


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
    tolerance: float = 1e-5,
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
      tolerance: largest difference, relative to the largest absolute value of the site where that exceeds 1.
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
    leading = next((x.shape[:2] for x in jax.tree.leaves(inputs) if getattr(x, "ndim", 0) > 1), ())
    _check_shapes(table.model, table.sites, acts, _known(leading) | dict(table.sizes))
    real = np.ones(leading, bool) if mask is None else np.asarray(mask)
    checked = []
    for equation, (needed, sides) in _IDENTITIES.items():
        if all(name in acts for name in needed):
            left, right = sides(acts, real)
            _compare(table.model, equation, left, right, tolerance)
            checked.append(equation)
    equation = _stream_identity(table.names)
    terms = equation.removeprefix("resid_post == ").split(" + ")
    if "resid_post" in acts and all(term in acts for term in terms):
        total = np.sum([acts[term] for term in terms], axis=0)
        _compare(table.model, equation, acts["resid_post"], total, tolerance)
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
