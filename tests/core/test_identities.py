"""The equations between sites of every structure, that they are the ones meant, and that they find what is wrong."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import mi_jax as mi
from mi_jax.core.identities import equations
from tests.models.tiny_families import FAMILIES, family, inputs

ATTENTION = {f"attn.{name}_in == resid_pre of every head" for name in "qkv"} | {
    "resid_pre[0] == embed",
    "attn.pattern == softmax(attn.scores)",
    "attn.z == attn.pattern · attn.v",
}
SUMMED, ONE_VECTOR = "attn_out == Σ_head attn.head_out", "attn_out − Σ_head attn.head_out is one vector per layer"
SEQUENTIAL = {
    "resid_mid == resid_pre + attn_out",
    "mlp.in == resid_mid",
    "resid_post == resid_mid + mlp_out",
    "resid_pre[l+1] == resid_post[l]",
}
PARALLEL = {
    "mlp.in == resid_pre",
    "resid_post == resid_pre + attn_out + mlp_out",
    "resid_pre[l+1] == resid_post[l]",
}
POST = {
    "resid_mid == resid_pre + attn_out",
    "mlp.in == resid_mid_normalized",
    "resid_post == resid_mid_normalized + mlp_out",
    "resid_pre[l+1] == resid_post_normalized[l]",
}
PLAIN, LOGITS = "attn.scores == attn.q · attn.k / sqrt(d_head)", "logits == output"
EXPECTED = {
    "llama": SEQUENTIAL | {SUMMED, LOGITS, f"{PLAIN}, causal"},
    "qwen2": SEQUENTIAL | {SUMMED, LOGITS, f"{PLAIN}, causal, in windows"},
    "gpt2": SEQUENTIAL | {ONE_VECTOR, LOGITS, f"{PLAIN}, causal"},
    "neox": PARALLEL | {ONE_VECTOR, LOGITS, f"{PLAIN}, causal"},
    "gptj": PARALLEL | {SUMMED, LOGITS, f"{PLAIN}, causal"},
    "gemma": SEQUENTIAL | {LOGITS, "attn.scores == softcap(attn.q · attn.k · scale), causal, in windows"},
    "olmo2": SEQUENTIAL | {LOGITS, f"{PLAIN}, causal"},
    "mixture": SEQUENTIAL | {SUMMED, LOGITS, f"{PLAIN}, causal", "mlp_out == Σ_expert mlp.gates · mlp.expert_out"},
    "bert": POST | {ONE_VECTOR, PLAIN},
    "vit": SEQUENTIAL | {ONE_VECTOR, LOGITS, PLAIN},
}


def captured(name, seed=1):
    model, x = family(name), inputs(name, seed)
    output, acts = mi.jit(mi.capture(model, *model.site_table.names))(x)
    acts = {site: np.asarray(value, np.float64) for site, value in acts.items()}
    return model.site_table, acts | {"output": np.asarray(output, np.float64)}, np.ones(output.shape[:2], bool)


def differences(name, **changed):
    table, acts, mask = captured(name)
    acts |= {site: change(acts[site]) for site, change in changed.items()}
    out = {}
    for equation, sides in equations(table, acts).items():
        left, right = sides(acts, mask)
        out[equation] = float(np.abs(left - right).max())
    return out


@pytest.mark.parametrize("name", FAMILIES)
def test_the_equations_of_a_structure_are_the_ones_that_hold(name):
    found = differences(name)
    assert set(found) == ATTENTION | EXPECTED[name]
    assert max(found.values()) < 2e-5


@pytest.mark.parametrize("name", ["gemma", "gptj", "mixture", "bert", "vit"])
def test_check_sites_holds_for_every_structure(name):
    checked = mi.check_sites(family(name), inputs(name, 2))
    assert ATTENTION | EXPECTED[name] <= set(checked)


WRONG = [
    ("gemma", "attn.scores", lambda x: np.where(x > -1e9, x * 1.01, x), "softcap"),
    ("qwen2", "attn.scores", lambda x: np.where(x < -1e9, 0.1, x), "in windows"),
    ("bert", "resid_mid_normalized", lambda x: x + 0.01, "mlp.in == resid_mid_normalized"),
    ("bert", "resid_post_normalized", lambda x: x * 1.01, "resid_pre[l+1] == resid_post_normalized[l]"),
    ("gptj", "mlp.in", lambda x: x + 0.01, "mlp.in == resid_pre"),
    ("gptj", "attn_out", lambda x: x * 1.01, "resid_post == resid_pre + attn_out + mlp_out"),
    ("gpt2", "attn.head_out", lambda x: x * 1.01, "is one vector per layer"),
    ("llama", "attn.head_out", lambda x: x + 0.01, SUMMED),
    ("mixture", "mlp.gates", lambda x: x * 1.01, "Σ_expert"),
    ("vit", "attn.pattern", lambda x: x[..., ::-1], "softmax"),
]


@pytest.mark.parametrize(("name", "site", "change", "equation"), WRONG, ids=[f"{n}-{s}" for n, s, *_ in WRONG])
def test_an_equation_finds_the_site_that_holds_something_else(name, site, change, equation):
    found = differences(name, **{site: change})
    broken = [each for each, difference in found.items() if difference > 1e-3]
    assert any(equation in each for each in broken), broken
    assert all(site in each for each in broken), broken


def test_a_masked_key_has_no_score():
    model, tokens = family("llama"), inputs("llama", 3)
    mask = jnp.arange(6)[None, :] < jnp.array([6, 4])[:, None]
    _, acts = mi.jit(mi.capture(model, *model.site_table.names))(tokens, mask)
    acts = {site: np.asarray(value, np.float64) for site, value in acts.items()}
    left, right = equations(model.site_table, acts)[f"{PLAIN}, causal"](acts, np.asarray(mask))
    np.testing.assert_allclose(left, right, atol=1e-5)
    left, right = equations(model.site_table, acts)[f"{PLAIN}, causal"](acts, np.ones((2, 6), bool))
    assert np.abs(left - right).max() > 0.1


def test_the_rule_of_attention_is_that_of_the_configuration():
    config = dataclasses.replace(FAMILIES["gemma"], causal=True)
    rule = family("gemma").site_table.attention
    assert (rule.scale, rule.softcap, rule.windows) == (config.attn_scale, config.score_softcap, config.windows)
    assert rule.written == "normed"
    assert [family(n).site_table.attention.written for n in ("gpt2", "llama")] == ["sum + bias", "sum"]
    assert not family("bert").site_table.attention.causal
