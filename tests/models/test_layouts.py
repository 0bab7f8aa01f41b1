"""Every structure of a decoder: against equations in numpy, and what windows, caps and norms do."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mi_jax as mi
from mi_jax.models.config import RopeScaling
from tests.models.numpy_decoder import numpy_output, numpy_sites
from tests.models.tiny import prompts
from tests.models.tiny_families import CAUSAL, FAMILIES, family, inputs, noisy

# relative to the largest value of a site where that exceeds 1
TOLERANCE = 1e-5


def close(found, expected, message=""):
    found, expected = np.maximum(np.asarray(found), -1e9), np.maximum(np.asarray(expected), -1e9)
    bound = TOLERANCE * max(1.0, float(np.abs(expected, where=expected > -1e9, out=np.zeros(expected.shape)).max()))
    np.testing.assert_allclose(found, expected, rtol=0, atol=bound, err_msg=message)


def compare(model, x, mask=None, **options):
    """All sites of all real positions against numpy."""
    output, acts = mi.jit(mi.capture(model, *model.site_table.names))(x, mask, **options)
    lengths = [None] * len(x) if mask is None else np.asarray(mask.sum(1))
    for row, n in enumerate(lengths):
        types = options["token_types"][row, :n] if options else None
        expected = numpy_sites(model, np.asarray(x[row])[:n] if n is not None else np.asarray(x[row]), None, types)
        close(output[row, :n], numpy_output(expected), f"output of row {row}")
        assert set(expected) == set(acts)
        for site, reference in expected.items():
            axes = model.site_table.resolve(site)[0].axes
            value = np.asarray(acts[site]).take(row, axes.index("batch"))
            for axis in ("pos", "query", "key"):
                if axis in axes:
                    value = value.take(range(reference.shape[axes.index(axis) - 1]), axes.index(axis) - 1)
            close(value, reference, f"{site} of row {row}")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_site_equals_the_equations_in_numpy(name):
    mask = None if FAMILIES[name].patches is not None else jnp.arange(6)[None, :] < jnp.array([6, 4])[:, None]
    types = {"token_types": jnp.array([[0, 0, 1, 1, 1, 0]] * 2, jnp.int32)} if name == "bert" else {}
    compare(family(name), inputs(name, 3), mask, **types)


SCALINGS = (
    None,
    RopeScaling("linear", 3.0),
    RopeScaling("llama3", 4.0, 16, 1.0, 4.0),
    RopeScaling("yarn", 4.0, 16, beta_fast=4.0),
)


@st.composite
def configurations(draw) -> dict:
    """The fields of any valid configuration of a decoder of tokens."""

    def one(*values):
        return draw(st.sampled_from(values))

    n_kv, n_layers = one(1, 2), one(1, 2)
    mixture = draw(st.booleans())
    norms, causal = one("pre", "output", "sandwich", "post"), draw(st.booleans())
    parallel = norms in ("pre", "sandwich") and draw(st.booleans())
    d_mlp = 3 if mixture or parallel else one(0, 3)
    fields = {
        "n_kv_heads": n_kv,
        "n_heads": n_kv * one(1, 2),
        "n_layers": n_layers,
        "causal": causal,
        "positions": one("rotary", "learned", "none"),
        "rope_dim": one(None, 2),
        "rope_adjacent": draw(st.booleans()),
        "rope_scaling": one(*SCALINGS),
        "rope_local_theta": one(None, 30.0),
        "rope_layers": one((), (True, False))[:n_layers],
        "windows": one((), (2, 0))[:n_layers] if causal else (),
        "embed_scale": one(1.0, 2.5),
        "n_token_types": one(0, 2),
        "norm": one("rms", "layer", "none"),
        "norm_offset": one(0.0, 1.0),
        "norms": norms,
        "embed_norm": draw(st.booleans()),
        "parallel": parallel,
        "shared_norm": parallel and draw(st.booleans()),
        "qkv_bias": draw(st.booleans()),
        "o_bias": draw(st.booleans()),
        "qk_norm": one("none", "head", "whole"),
        "attn_scale": one(None, 0.4),
        "score_softcap": one(0.0, 1.5),
        "logit_softcap": one(0.0, 2.0),
        "activation": one("silu", "gelu", "gelu_exact", "quick_gelu", "relu"),
        "gated": mixture or draw(st.booleans()),
        "mlp_bias": not mixture and draw(st.booleans()),
        "n_experts": 3 if mixture else 0,
        "n_active_experts": one(1, 2) if mixture else 0,
        "renormalize_experts": draw(st.booleans()),
        "head": one("logits", "none"),
        "d_mlp": d_mlp,
    }
    fields["tied"] = fields["head"] == "none" or draw(st.booleans())
    fields["unembed_bias"] = fields["head"] == "logits" and draw(st.booleans())
    return fields


@settings(max_examples=8, deadline=None, derandomize=True)
@given(fields=configurations(), seed=st.integers(0, 9))
def test_any_configuration_equals_the_equations_in_numpy(fields, seed):
    config = dataclasses.replace(FAMILIES["llama"], name="any", d_model=6, d_vocab=7, n_ctx=8, **fields)
    # a norm of what is nearly constant, or nearly zero, makes rounding large: not in float64
    with jax.enable_x64(True):
        model = jax.tree.map(lambda x: x.astype(jnp.float64), noisy(config))
        compare(model, prompts(seed, 1, 5, 7), jnp.arange(5)[None, :] < 4)


def reached(model, changed: int, n_pos: int = 9) -> np.ndarray:
    """Which positions' output differs where one token is another."""
    tokens = prompts(1, 1, n_pos)
    other = tokens.at[0, changed].set((tokens[0, changed] + 1) % 13)
    run = mi.jit(model)
    return np.asarray(jnp.abs(run(tokens) - run(other)).max((0, 2)) > 1e-6)


@pytest.mark.parametrize(("windows", "reach"), [((3, 3), 5), ((3, 1), 3), ((1, 1), 1), ((0, 2), 9), ((4, 0), 9)])
def test_a_token_reaches_as_far_as_the_windows_let_it(windows, reach):
    """Every layer carries it on by its window less one."""
    config = dataclasses.replace(FAMILIES["llama"], windows=windows, positions="none")
    found = reached(noisy(config), 1)
    expected = np.zeros(9, bool)
    expected[1 : 1 + reach] = True
    np.testing.assert_array_equal(found, expected)


def test_without_causality_every_position_is_reached():
    config = dataclasses.replace(FAMILIES["llama"], causal=False)
    assert reached(noisy(config), 7).all()


@pytest.mark.parametrize("capped", ["score_softcap", "logit_softcap"])
def test_soft_caps_bound_and_a_large_one_changes_nothing(capped):
    site = {"score_softcap": "attn.scores", "logit_softcap": "logits"}[capped]
    models = [noisy(dataclasses.replace(FAMILIES["gpt2"], **{capped: cap})) for cap in (0.0, 0.5, 1e4)]
    free, tight, wide = (np.asarray(mi.jit(mi.capture(m, site))(prompts(2))[1][site]) for m in models)
    real = free > -1e9
    assert np.abs(free[real]).max() > 1.0
    assert np.abs(tight[real]).max() <= 0.5
    np.testing.assert_allclose(wide[real], free[real], atol=1e-3)
    if capped == "logit_softcap":
        close(tight, 0.5 * np.tanh(free / 0.5))


@pytest.mark.parametrize("kind", ["head", "whole"])
def test_queries_and_keys_have_the_size_that_their_norm_gives_them(kind):
    config = dataclasses.replace(FAMILIES["llama"], qk_norm=kind, rope_scaling=None)
    model = noisy(config)
    ones = jax.tree.map(jnp.ones_like, (model.blocks.attn.q_norm, model.blocks.attn.k_norm))
    model = eqx.tree_at(lambda m: (m.blocks.attn.q_norm, m.blocks.attn.k_norm), model, ones)
    scaled = eqx.tree_at(lambda m: m.blocks.attn.q, model, 3 * model.blocks.attn.q)
    run = mi.capture(model, "attn.q", "attn.k")
    logits, acts = mi.jit(run)(prompts(3))
    for name in ("attn.q", "attn.k"):
        square = jnp.square(acts[name]).mean(-1)
        square = square if kind == "head" else square.mean(-1)
        np.testing.assert_allclose(square, 1.0, rtol=1e-3)
    # the norm takes the scale of what it reads away
    np.testing.assert_allclose(mi.jit(scaled)(prompts(3)), logits, atol=1e-3)


@pytest.mark.parametrize("name", CAUSAL)
def test_padding_is_not_read(name):
    model, tokens = family(name), prompts(6, 2, 6)
    mask = jnp.arange(6)[None, :] < jnp.array([6, 3])[:, None]
    run = mi.jit(model)
    padded = run(tokens, mask)
    other = run(jnp.where(mask, tokens, 7), mask)
    np.testing.assert_array_equal(padded[1, :3], other[1, :3])
    close(padded[1, :3], run(tokens, jnp.ones((2, 6), bool))[1, :3])
