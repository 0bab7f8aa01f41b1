"""`check_sites` holds for every configuration, and finds sites that do not hold what they should."""

import dataclasses
import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.core import Tracer

import mi_jax as mi
from mi_jax.core import Site, SiteTable, check_sites
from mi_jax.core.taps import Tap, stacked_rows
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
BEHAVIOUR = [
    "capturing changes nothing",
    "jit == no jit",
    "a replaced site holds the new value",
    "earlier layers stay as they were",
    "a site replaced by itself changes nothing",
    "some site changes the output",
]
OF_MLP = {"mlp.in == resid_mid", "resid_post == resid_mid + mlp_out"}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_sites_of_every_configuration_hold(name):
    expected = ALWAYS | (OF_MLP if CONFIGS[name].d_mlp else {"resid_post == resid_mid"})
    behaviour = [b for b in BEHAVIOUR if CONFIGS[name].n_layers > 1 or not b.startswith("earlier")]
    checked = check_sites(tiny(name), prompts(3))
    equations = checked[: -len(behaviour)]
    assert set(equations) == expected
    assert len(equations) == len(expected)
    assert set(checked[-len(behaviour) :]) == set(behaviour)


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


class _Toy(eqx.Module):
    """A foreign model with one site per layer, with a fault or none."""

    fault: str = eqx.field(static=True, default="")
    weights: Any = dataclasses.field(default_factory=lambda: jnp.array([0.5, -2.0, 1.5]))

    @property
    def site_table(self):
        return SiteTable("toy", (Site("hidden", ("layer", "batch", "pos", "axis2")),), (("layer", 3),))

    def __call__(self, tokens, *, taps=None, capture=None):
        x = jnp.tanh(tokens[:, :, None].astype(jnp.float32) / 10 - 0.5)
        taps = {} if self.fault == "deaf" else taps or {}
        seen, rows, start = [], stacked_rows(taps, self.site_table), x
        for layer in range(3):
            # the fault "early": what belongs to a layer happens in the one before too
            for at in (layer, layer + 1) if self.fault == "early" and layer < 2 else (layer,):
                row = jax.tree.map(lambda a, at=at: a[at], rows)
                tap = Tap(self.site_table, taps, ("hidden",), row, jnp.int32(at))
                x = tap("hidden", x * self.weights[layer] if at == layer else x)
            seen.append(x)
        if self.fault == "dead":
            x = start
        if self.fault == "loud" and capture is not None:
            x = x + 0.1
        if self.fault == "traced" and isinstance(x, Tracer):
            x = x + 0.1
        return x if capture is None else (x, {"hidden": jnp.stack(seen)} if capture else {})


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("deaf", "toy: a replaced site holds the new value: 'hidden' does not hold: the sides differ by"),
        ("early", "toy: earlier layers stay as they were: 'hidden' does not hold: the sides differ by"),
        ("loud", "toy: capturing changes nothing does not hold: the sides differ by 0.1,"),
        ("traced", "toy: jit == no jit does not hold: the sides differ by 0.1,"),
        ("dead", "toy: no site changes the output when it is replaced by something else"),
    ],
)
def test_a_site_that_does_not_do_what_its_edits_say_is_named(fault, message):
    with pytest.raises(mi.SiteError, match=re.escape(message)):
        check_sites(_Toy(fault), prompts(3))


def test_sites_without_equations_are_checked_by_what_they_do():
    assert check_sites(_Toy(), prompts(3)) == BEHAVIOUR


class _Parallel(eqx.Module):
    """A foreign model with few sites: attention and MLP read the same stream."""

    weight: Any = dataclasses.field(default_factory=lambda: np.float32(0.5))

    @property
    def site_table(self):
        stream = ("layer", "batch", "pos", "d_model")
        names = ("resid_pre", "attn_out", "mlp_out", "resid_post")
        return SiteTable("parallel", tuple(Site(n, stream) for n in names), (("layer", 1), ("d_model", 2)))

    def __call__(self, tokens, *, taps=None, capture=None):
        table, taps = self.site_table, taps or {}
        rows = jax.tree.map(lambda a: a[0], stacked_rows(taps, table))
        tap = Tap(table, taps, table.names, rows, jnp.int32(0))
        x = tap("resid_pre", jnp.broadcast_to(tokens[:, :, None].astype(jnp.float32), (*tokens.shape, 2)))
        x = tap("resid_post", x + tap("attn_out", x * 2) + tap("mlp_out", x * self.weight))
        return x if capture is None else (x, {w.site: tap.seen[w.site][None] for w in capture})


def test_parallel_blocks_have_their_own_equation():
    checked = check_sites(_Parallel(), prompts(3))
    assert checked[:2] == ["resid_pre[l+1] == resid_post[l]", "resid_post == resid_pre + attn_out + mlp_out"]
    assert len(checked) == 2 + len(BEHAVIOUR) - 1
