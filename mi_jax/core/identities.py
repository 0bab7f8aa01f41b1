"""The equations between sites, and how each of their sides is computed from captured activations.

An equation belongs to a model that has all of its sites; what it says can depend on how the model's attention computes
(`AttentionRule`). Everything is numpy, in float64, and independent of any model's code.
"""

from collections.abc import Callable

import numpy as np

from mi_jax.core.sites import AttentionRule, SiteTable

Acts = dict[str, np.ndarray]
Sides = Callable[[Acts, np.ndarray], tuple[np.ndarray, np.ndarray]]


def equations(table: SiteTable, acts: Acts) -> dict[str, Sides]:
    """The equations that this model has the sites for; both sides are functions of the activations and the mask."""
    rule = table.attention
    found: dict[str, tuple[tuple[str, ...], Sides]] = {
        "resid_pre[0] == embed": (("resid_pre", "embed"), lambda a, m: (a["resid_pre"][0], a["embed"])),
        **_stream(table.names),
        **{
            f"{name} == resid_pre of every head": ((name, "resid_pre"), _readers(name))
            for name in ("attn.q_in", "attn.k_in", "attn.v_in")
        },
        _scores_name(rule): (("attn.scores", "attn.q", "attn.k"), lambda a, m: _scores(a, m, rule)),
        "attn.pattern == softmax(attn.scores)": (
            ("attn.pattern", "attn.scores"),
            lambda a, m: (a["attn.pattern"], _softmax(a["attn.scores"])),
        ),
        "attn.z == attn.pattern · attn.v": (
            ("attn.z", "attn.pattern", "attn.v"),
            lambda a, m: (a["attn.z"], _mixed(a)),
        ),
        **_written(rule),
        "logits == output": (("logits", "output"), lambda a, m: (a["logits"], a["output"])),
    }
    return {name: sides for name, (needed, sides) in found.items() if all(site in acts for site in needed)}


def _stream(names: tuple[str, ...]) -> dict[str, tuple[tuple[str, ...], Sides]]:
    """What becomes of the stream in a layer: sequential or parallel, with or without an MLP and norms of the stream."""
    mid = next((name for name in ("resid_mid_normalized", "resid_mid") if name in names), "resid_pre")
    end = "resid_post_normalized" if "resid_post_normalized" in names else "resid_post"
    terms = (mid, *(("attn_out",) if mid == "resid_pre" else ()), *(("mlp_out",) if "mlp_out" in names else ()))
    return {
        f"resid_pre[l+1] == {end}[l]": (("resid_pre", end), lambda a, m: (a["resid_pre"][1:], a[end][:-1])),
        "resid_mid == resid_pre + attn_out": (
            ("resid_mid", "resid_pre", "attn_out"),
            lambda a, m: (a["resid_mid"], a["resid_pre"] + a["attn_out"]),
        ),
        f"mlp.in == {mid}": (("mlp.in", mid), lambda a, m: (a["mlp.in"], a[mid])),
        f"resid_post == {' + '.join(terms)}": (
            ("resid_post", *terms),
            lambda a, m: (a["resid_post"], np.sum([a[term] for term in terms], axis=0)),
        ),
    }


def _written(rule: AttentionRule) -> dict[str, tuple[tuple[str, ...], Sides]]:
    """What the parts of attention and of a mixture add up to, where no norm comes between."""
    if rule.written == "normed":
        return {}
    heads, experts = ("attn_out", "attn.head_out"), ("mlp_out", "mlp.gates", "mlp.expert_out")

    def mixture(a: Acts, mask: np.ndarray):
        return a["mlp_out"], (a["mlp.gates"][..., None] * a["mlp.expert_out"]).sum(-2)

    def remainder(a: Acts, mask: np.ndarray):
        left = a["attn_out"] - a["attn.head_out"].sum(3)
        return left, np.broadcast_to(left[:, :1, :1], left.shape)

    of_experts = {"mlp_out == Σ_expert mlp.gates · mlp.expert_out": (experts, mixture)}
    if rule.written == "sum + bias":
        return {"attn_out − Σ_head attn.head_out is one vector per layer": (heads, remainder)} | of_experts
    summed = {"attn_out == Σ_head attn.head_out": (heads, lambda a, m: (a["attn_out"], a["attn.head_out"].sum(3)))}
    return summed | of_experts


def _readers(name: str) -> Sides:
    def sides(acts: Acts, mask: np.ndarray):
        return acts[name], np.broadcast_to(acts["resid_pre"][..., None, :], acts[name].shape)

    return sides


def _scores_name(rule: AttentionRule) -> str:
    scaled = "attn.q · attn.k / sqrt(d_head)" if rule.scale is None else "attn.q · attn.k · scale"
    capped = f"softcap({scaled})" if rule.softcap else scaled
    return f"attn.scores == {capped}" + (", causal" if rule.causal else "") + (", in windows" if rule.windows else "")


def _scores(acts: Acts, mask: np.ndarray, rule: AttentionRule) -> tuple[np.ndarray, np.ndarray]:
    q, k = acts["attn.q"], acts["attn.k"]
    k = np.repeat(k, q.shape[3] // k.shape[3], 3)
    scores = np.einsum("lbqhd,lbkhd->lbhqk", q, k) * (q.shape[-1] ** -0.5 if rule.scale is None else rule.scale)
    if rule.softcap:
        scores = rule.softcap * np.tanh(scores / rule.softcap)
    back = np.arange(scores.shape[-2])[:, None] - np.arange(scores.shape[-1])[None, :]
    seen = back >= 0 if rule.causal else np.ones(back.shape, bool)
    windows = np.array(rule.windows or (0,) * len(scores))[:, None, None]
    seen = seen[None] & ((windows == 0) | (back[None] < windows))
    allowed = seen[:, None, None] & mask[None, :, None, None, :]
    # a score that is not allowed may be any hugely negative number, in float16 -65504: both sides then count as 0
    found = np.where(~allowed & (acts["attn.scores"] < -1e4), 0.0, acts["attn.scores"])
    return found, np.where(allowed, scores, 0.0)


def _softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def _mixed(acts: Acts) -> np.ndarray:
    pattern, v = acts["attn.pattern"], acts["attn.v"]
    return np.einsum("lbhqk,lbkhd->lbqhd", pattern, np.repeat(v, pattern.shape[2] // v.shape[3], 3))
