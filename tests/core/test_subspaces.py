"""Subspace edits, noise and means per position against their closed forms; what a NaN must not reach."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mi_jax as mi
from tests.models.tiny import prompts, tiny

TOLERANCE = 1e-5
TOKENS, OTHER = prompts(3), prompts(4)
LAST = 2


@pytest.fixture(scope="module")
def runs():
    capture = mi.jit(mi.capture(tiny(), "resid_pre", "attn.z"))
    return capture(TOKENS)[1], capture(OTHER)[1]


def edited(edit, site="resid_pre", tokens=TOKENS, mask=None):
    _, acts = mi.jit(mi.capture(mi.intervene(tiny(), edit), site))(tokens, mask)
    return np.asarray(acts[site])


def projector(basis):
    return np.asarray(basis @ np.linalg.pinv(basis), np.float32)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 100), scale=st.floats(0.1, 10.0))
def test_projection_depends_on_the_span_alone(seed, scale):
    rng = np.random.default_rng(seed)
    basis = rng.normal(size=(8, 3))
    # well conditioned: a basis that is nearly singular has no span to speak of in float32
    mixed = scale * basis @ np.linalg.qr(rng.normal(size=(3, 3)))[0] @ np.diag([0.5, 1.0, 2.0])
    x = edited(mi.project_out("resid_pre", np.float32(basis), layer=LAST))[LAST]
    np.testing.assert_allclose(x @ basis, 0, atol=1e-4)
    np.testing.assert_allclose(edited(mi.project_out("resid_pre", np.float32(mixed), layer=LAST))[LAST], x, atol=2e-4)


def test_projection_and_swap_are_exact(runs):
    base, source = (np.asarray(acts["resid_pre"][LAST]) for acts in runs)
    basis = np.random.default_rng(0).normal(size=(8, 2)).astype(np.float32)
    inside = projector(basis)
    found = edited(mi.project_out("resid_pre", basis, layer=LAST))[LAST]
    np.testing.assert_allclose(found, base - base @ inside, atol=TOLERANCE)
    found = edited(mi.swap_subspace("resid_pre", basis, runs[1], layer=LAST, pos=1))[LAST]
    expected = base.copy()
    expected[:, 1] += (source - base)[:, 1] @ inside
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)


def test_a_whole_basis_swaps_everything_and_heads_have_their_own_axis(runs):
    everything = mi.swap_subspace("resid_pre", np.eye(8, dtype=np.float32), runs[1], layer=LAST)
    np.testing.assert_allclose(edited(everything)[LAST], runs[1]["resid_pre"][LAST], atol=TOLERANCE)
    z = edited(mi.project_out("attn.z", np.eye(6, 1, dtype=np.float32), layer=LAST, head=2), "attn.z")[LAST]
    expected = np.asarray(runs[0]["attn.z"][LAST]).copy()
    expected[:, :, 2, 0] = 0
    np.testing.assert_allclose(z, expected, atol=TOLERANCE)


def test_every_layer_can_have_its_own_basis():
    bases = jax.random.normal(jax.random.key(0), (3, 8, 1))
    x = edited(mi.project_out("resid_pre", bases))
    for layer in range(3):
        np.testing.assert_allclose(x[layer] @ np.asarray(bases[layer]), 0, atol=TOLERANCE)


def test_bases_that_do_not_fit_are_refused():
    with pytest.raises(mi.SiteError, match=r"k ≤ d; got \(2, 8\)"):
        mi.project_out("resid_pre", jnp.ones((2, 8)))
    with pytest.raises(mi.SiteError, match="floating numbers; got int32"):
        mi.project_out("resid_pre", jnp.ones((8, 2), jnp.int32))
    with pytest.raises(mi.SiteError, match=r"spans part of the last axis, d_head, so it needs shape \(6, k\)"):
        mi.intervene(tiny(), mi.project_out("attn.z", jnp.ones((8, 2))))(TOKENS)
    with pytest.raises(mi.SiteError, match="has 2 layers, llama-like has 3"):
        mi.intervene(tiny(), mi.project_out("resid_pre", jnp.ones((2, 8, 1))))


def test_noise_has_its_deviation_and_another_draw_in_every_layer():
    tokens = prompts(0, 64, 12)
    plain = np.asarray(mi.jit(mi.capture(tiny(), "attn_out"))(tokens)[1]["attn_out"])
    key = jax.random.key(3)
    first = edited(mi.noise("attn_out", 0.5, key=key, layer=0), "attn_out", tokens)[0] - plain[0]
    last = edited(mi.noise("attn_out", 0.5, key=key, layer=LAST), "attn_out", tokens)[LAST] - plain[LAST]
    for draw in (first, last):
        # 6144 draws: the deviation is known to about 1 %, the mean to 0.0064
        assert abs(draw.std() - 0.5) < 0.02
        assert abs(draw.mean()) < 0.025
    assert abs(np.corrcoef(first.ravel(), last.ravel())[0, 1]) < 0.05
    np.testing.assert_array_equal(
        edited(mi.noise("attn_out", 0.5, key=key, layer=0), "attn_out", tokens)[0] - plain[0], first
    )


def test_the_mean_of_a_position_is_that_of_its_real_tokens():
    mask = jnp.arange(5)[None, :] < jnp.array([5, 2])[:, None]
    plain = np.asarray(mi.jit(mi.capture(tiny(), "mlp_out"))(TOKENS, mask)[1]["mlp_out"])[LAST]
    value = edited(mi.ablate("mlp_out", baseline="mean_per_position", layer=LAST), "mlp_out", mask=mask)[LAST]
    for pos in range(5):
        expected = plain[:, pos].mean(0) if pos < 2 else plain[0, pos]
        np.testing.assert_allclose(value[:, pos], np.broadcast_to(expected, (2, 8)), atol=TOLERANCE)


NAN = jnp.full((3, 2, 5, 8), jnp.nan)


@pytest.mark.parametrize(
    "make",
    [
        lambda value: mi.patch("resid_pre", value, layer=1, pos=2),
        lambda value: mi.add("resid_pre", value, layer=1, pos=2),
        lambda value: mi.scale("resid_pre", value, layer=1, pos=2),
        lambda value: mi.swap_subspace("resid_pre", jnp.eye(8, 2), value, layer=1, pos=2),
    ],
    ids=["patch", "add", "scale", "swap_subspace"],
)
def test_a_nan_where_the_edit_does_not_apply_reaches_nothing(make):
    """Neither the output, nor the gradient of the weights, nor that of the value."""
    value = NAN.at[1, :, 2].set(0.7)
    clean = jnp.zeros_like(NAN).at[1, :, 2].set(0.7)

    @jax.jit
    def loss(value, embed):
        model = tiny()
        model = type(model)(**(vars(model) | {"embed": embed}))
        return jnp.square(mi.intervene(model, make(value))(TOKENS)).mean()

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    for found, expected in zip(gradient(value, tiny().embed), gradient(clean, tiny().embed), strict=True):
        assert np.isfinite(found).all()
        np.testing.assert_array_equal(found, expected)
    assert loss(value, tiny().embed) == loss(clean, tiny().embed)


def test_padding_holds_no_nan_against_the_real_tokens():
    mask = jnp.arange(5)[None, :] < jnp.array([5, 3])[:, None]
    value = jnp.where(mask[None, :, :, None], 0.7, jnp.full((3, 2, 5, 8), jnp.nan))

    def loss(value):
        logits = mi.intervene(tiny(), mi.patch("resid_pre", value, layer=1))(TOKENS, mask)
        return jnp.square(jnp.where(mask[:, :, None], logits, 0.0)).mean()

    found, gradient = jax.jit(jax.value_and_grad(loss))(value)
    expected, wanted = jax.jit(jax.value_and_grad(loss))(jnp.nan_to_num(value, nan=5.0))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    real = np.broadcast_to(np.asarray(mask)[None, :, :, None], value.shape)
    np.testing.assert_allclose(np.asarray(gradient)[real], np.asarray(wanted)[real], atol=1e-7)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("baseline", ["mean", "mean_per_position", "resample"])
@pytest.mark.parametrize("site", ["mlp_out", "attn.pattern"])
def test_what_stands_at_padding_changes_no_real_token(baseline, site):
    mask = jnp.arange(5)[None, :] < jnp.array([5, 3])[:, None]
    edit = mi.ablate(site, baseline=baseline, layer=0, key=jax.random.key(1))
    run = mi.jit(mi.intervene(tiny(), edit))
    one, other = run(TOKENS, mask), run(jnp.where(mask, TOKENS, (TOKENS + 1) % 13), mask)
    np.testing.assert_allclose(np.asarray(one)[np.asarray(mask)], np.asarray(other)[np.asarray(mask)], atol=TOLERANCE)


def test_noise_does_not_depend_on_the_padding():
    run = mi.jit(mi.intervene(tiny(), mi.noise("embed", 0.5, key=jax.random.key(2))))
    padded = jnp.pad(TOKENS, ((0, 0), (0, 3)))
    mask = jnp.broadcast_to(jnp.arange(8)[None, :] < 5, (2, 8))
    np.testing.assert_allclose(run(padded, mask)[:, :5], run(TOKENS), atol=TOLERANCE)


def test_dependent_columns_span_no_more_than_what_they_span():
    one = jnp.ones((8, 1))
    alone = edited(mi.project_out("resid_pre", one, layer=LAST))
    repeated = edited(mi.project_out("resid_pre", jnp.concatenate([one, 2 * one, 0 * one], 1), layer=LAST))
    np.testing.assert_allclose(repeated, alone, atol=TOLERANCE)
    nothing = edited(mi.project_out("resid_pre", 0 * one, layer=LAST))
    np.testing.assert_allclose(nothing, edited(mi.add("resid_pre", 0.0)), atol=TOLERANCE)
    traced = jax.jit(lambda basis: mi.intervene(tiny(), mi.project_out("resid_pre", basis, layer=LAST))(TOKENS))
    assert np.isnan(traced(jnp.ones((8, 2)))).all()
    assert np.isfinite(traced(jnp.eye(8, 2))).all()
