"""`check_sites` holds for every configuration, and finds sites that do not hold what they should."""

import dataclasses
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest

import mi_jax as mi
from mi_jax.core import check_sites
from tests.models.tiny import CONFIGS, prompts, tiny

ALWAYS = {
    "resid_pre[0] == embed",
    "resid_pre[l+1] == resid_post[l]",
    "resid_mid == resid_pre + attn_out",
    "attn.q_in == resid_pre of every head",
    "attn.k_in == resid_pre of every head",
    "attn.v_in == resid_pre of every head",
    "attn.scores == attn.q · attn.k / sqrt(d_head), causal",
    "attn.pattern == softmax(attn.scores)",
    "attn.z == attn.pattern · attn.v",
    "attn_out == Σ_head attn.head_out",
    "logits == output",
}
OF_MLP = {"mlp.in == resid_mid", "resid_post == resid_mid + mlp_out"}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_sites_of_every_configuration_hold(name):
    expected = ALWAYS | (OF_MLP if CONFIGS[name].d_mlp else {"resid_post == resid_mid"})
    checked = check_sites(tiny(name), prompts(3))
    assert set(checked) == expected
    assert len(checked) == len(expected)


def test_they_hold_for_padded_prompts_and_under_edits():
    mask = jnp.arange(5)[None, :] < jnp.array([5, 2])[:, None]
    check_sites(tiny(), prompts(3), mask)
    # an edit of `attn.z` breaks the equation that gives it, and no other
    edited = mi.intervene(tiny(), mi.scale("attn.z", 2.0, layer=1))
    with pytest.raises(mi.SiteError, match=r"attn.z == attn.pattern · attn.v does not hold"):
        check_sites(edited, prompts(3))


TAMPERED = [
    ("embed", lambda x: x + 0.01, r"resid_pre\[0\] == embed"),
    ("resid_post", lambda x: jnp.roll(x, 1, 0), r"resid_pre\[l\+1\] == resid_post\[l\]"),
    ("mlp_out", lambda x: x * 1.01, r"resid_post == resid_mid \+ mlp_out"),
    ("attn.q", lambda x: jnp.roll(x, 1, 3), r"attn.scores == attn.q · attn.k"),
    ("attn.k", lambda x: x[..., ::-1], r"attn.scores == attn.q · attn.k"),
    ("attn.scores", lambda x: jnp.where(x < -1e9, 0.5, x), r"attn.scores == attn.q · attn.k"),
    ("attn.pattern", lambda x: x[:, ::-1], r"attn.pattern == softmax"),
    ("attn.v", lambda x: x * jnp.nan, r"attn.z == attn.pattern · attn.v"),
    ("attn.head_out", lambda x: x[:, :, ::-1], r"attn_out == Σ_head attn.head_out"),
    ("logits", lambda x: x - 1, r"logits == output"),
]


class _Tampered(eqx.Module):
    """A model of which one captured site is wrong: the one that `which` says, so that one program serves all."""

    model: Any
    which: Any

    @property
    def site_table(self):
        return self.model.site_table

    def __call__(self, *inputs, taps=None, capture=None, **options):
        logits, acts = self.model(*inputs, taps=taps, capture=capture, **options)
        for i, (site, wrong, _) in enumerate(TAMPERED):
            acts[site] = jnp.where(self.which == i, wrong(acts[site]), acts[site])
        return logits, acts


@pytest.mark.parametrize("which", range(len(TAMPERED)), ids=[site for site, *_ in TAMPERED])
def test_a_site_that_holds_something_else_is_named(which):
    with pytest.raises(mi.SiteError, match=rf"llama-like: {TAMPERED[which][2]}.*does not hold: the sides differ by"):
        check_sites(_Tampered(tiny(), jnp.int32(which)), prompts(3))


class _Ungrouped(eqx.Module):
    model: Any

    @property
    def site_table(self):
        return self.model.site_table

    def __call__(self, *inputs, **options):
        logits, acts = self.model(*inputs, **options)
        return logits, acts | {"attn.k": jnp.repeat(acts["attn.k"], 2, 3)}


def test_a_site_of_another_shape_is_named():
    message = r"site 'attn.k' of llama-like has shape \(3, 2, 5, 4, 6\); its axes .* make \(3, 2, 5, 2, 6\)"
    with pytest.raises(mi.SiteError, match=message):
        check_sites(_Ungrouped(tiny()), prompts(3))


class _Parallel(eqx.Module):
    """A foreign model with few sites: attention and MLP read the same stream."""

    weight: Any = dataclasses.field(default_factory=lambda: np.float32(0.5))

    @property
    def site_table(self):
        stream = ("layer", "batch", "pos", "d_model")
        names = ("resid_pre", "attn_out", "mlp_out", "resid_post")
        return mi.core.SiteTable(
            "parallel", tuple(mi.core.Site(n, stream) for n in names), (("layer", 1), ("d_model", 2))
        )

    def __call__(self, tokens, *, taps=None, capture=None):
        x = jnp.broadcast_to(tokens[None, :, :, None].astype(jnp.float32), (1, *tokens.shape, 2))
        acts = {"resid_pre": x, "attn_out": x * 2, "mlp_out": x * self.weight}
        return x[0], acts | {"resid_post": x * (3 + self.weight)}


def test_parallel_blocks_have_their_own_equation():
    assert check_sites(_Parallel(), prompts(3)) == [
        "resid_pre[l+1] == resid_post[l]",
        "resid_post == resid_pre + attn_out + mlp_out",
    ]
