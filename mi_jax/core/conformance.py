"""`check_sites`: whether the sites of a model hold what their names say.

A site name is a promise in the form of an equation. Every model family and every adapter is held to the same ones; an
equation is checked wherever the model has all of its sites.
"""

import numpy as np
from jaxtyping import Array, Bool, Int

from mi_jax.core.sites import SiteError
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


def check_sites(
    model: SiteModel,
    tokens: Int[Array, "batch pos"],
    mask: Bool[Array, "batch pos"] | None = None,
    *,
    tolerance: float = 1e-5,
) -> list[str]:
    """Checks every equation between sites, and the shape of every site, on one run of the model.

    Args:
      tolerance: largest difference, relative to the largest absolute value of the site where that exceeds 1.

    Returns:
      The equations that hold: those that the model has the sites for.

    Raises:
      SiteError: an equation that does not hold, with the largest difference, or a site of the wrong shape.

    Example:
      `check_sites(model, tokens)` for an adapter of a foreign model, before anything is measured with it.
    """
    table = model.site_table
    output, captured = jit(capture(model, *table.names))(tokens, **({} if mask is None else {"mask": mask}))
    acts = {name: np.asarray(x, np.float64) for name, x in captured.items()} | {
        "output": np.asarray(output, np.float64)
    }
    real = np.ones(tokens.shape, bool) if mask is None else np.asarray(mask)
    known = {"batch": tokens.shape[0]} | dict.fromkeys(("pos", "query", "key"), tokens.shape[1]) | dict(table.sizes)
    for site in table.sites:
        expected = tuple(known[axis] for axis in site.axes)
        if acts[site.name].shape != expected:
            raise SiteError(
                f"site {site.name!r} of {table.model} has shape {acts[site.name].shape}; "
                f"its axes {' '.join(site.axes)} make {expected}"
            )
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
    return checked


def _compare(model: str, equation: str, left: np.ndarray, right: np.ndarray, tolerance: float) -> None:
    scale = max(1.0, float(np.abs(right).max(initial=0.0)))
    difference = float(np.abs(left - right).max(initial=0.0))
    if not difference <= tolerance * scale:
        raise SiteError(
            f"{model}: {equation} does not hold: the sides differ by {difference:.3g}, values reach {scale:.3g}"
        )
