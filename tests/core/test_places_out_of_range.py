"""A place or a value that does not fit is an error where that is known, and NaN where it is traced; never a silence."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mi_jax as mi
from tests.models.tiny import prompts, tiny

TOKENS, OTHER = prompts(3), prompts(4)
ZERO = 0.0


@pytest.mark.parametrize(
    "index", [{"pos": 99}, {"pos": -6}, {"head": 4}, {"unit": -7}, {"layer": 3}, {"layer": -1}], ids=str
)
def test_a_traced_place_out_of_range_makes_the_output_nan(index):
    ((name, place),) = index.items()
    run = jax.jit(lambda place: mi.intervene(tiny(), mi.patch("attn.z", ZERO, **{name: place}))(TOKENS))
    assert np.isnan(run(jnp.asarray(place))).any()
    assert np.isfinite(run(jnp.asarray(1))).all()


def test_a_position_past_the_end_is_found_however_the_model_is_called():
    model = mi.intervene(tiny(), mi.patch("resid_pre", ZERO, pos=99))
    for call in (lambda: mi.jit(model)(TOKENS), lambda: mi.jit(model)(tokens=TOKENS), lambda: model(TOKENS)):
        with pytest.raises(mi.SiteError, match="5 places on 'pos'"):
            call()
    # as an argument of a function that nobody knows, its value is traced
    assert np.isnan(mi.jit(lambda m, x: m(x))(model, TOKENS)).all()
    sweep = mi.sweep(tiny(), mi.patch("attn.z", ZERO, layer=1, head=mi.each, pos=77), lambda logits: logits)
    assert np.isnan(eqx.filter_jit(sweep)(TOKENS)).all()
    with pytest.raises(mi.SiteError, match="5 places on 'pos'"):
        mi.jit(sweep)(TOKENS)


def test_a_sweep_in_a_traced_layer_out_of_range_is_nan():
    def run(layer):
        return mi.sweep(tiny(), mi.patch("attn.z", ZERO, layer=layer, head=mi.each), lambda logits: logits)(TOKENS)

    assert np.isnan(jax.jit(run)(jnp.asarray(9))).all()
    assert np.isfinite(jax.jit(run)(jnp.asarray(2))).all()


def test_the_users_own_functions_may_have_other_arguments_first():
    model = mi.intervene(tiny(), mi.patch("resid_pre", ZERO, pos=4))
    assert np.isfinite(mi.jit(lambda w, x: model(x) * w.sum())(jnp.ones((3, 2)), TOKENS)).all()


def test_raw_taps_are_checked():
    with pytest.raises(mi.SiteError, match=r"taps are keyed by site; .* has no site 'blocks.1.hook_resid_pre'"):
        tiny()(TOKENS, taps={"blocks.1.hook_resid_pre": (mi.patch("resid_pre", ZERO),)})
    with pytest.raises(mi.SiteError, match="has 3 layers"):
        tiny()(TOKENS, taps={"resid_pre": (mi.patch("resid_pre", ZERO, layer=9),)})


def test_captured_values_keep_their_places():
    short = mi.jit(mi.capture(tiny(), "resid_pre"))(OTHER[:, :1])[1]
    with pytest.raises(mi.SiteError, match=r"captured value .* capture it on prompts of the same length"):
        mi.intervene(tiny(), mi.patch("resid_pre", short, layer=1, pos=4))(TOKENS)
    one_layer = mi.jit(mi.capture(tiny(), mi.at("resid_pre", layers=1)))(OTHER)[1]
    for layer in (mi.each, None, (0, 1)):
        with pytest.raises(mi.SiteError, match="is of one layer; say which one it is for"):
            mi.sweep(tiny(), mi.patch("resid_pre", one_layer, layer=layer, pos=mi.each), lambda logits: logits)
    # a batch of one serves every example, and a TransformerLens name finds its site
    single = mi.jit(mi.capture(tiny(), "resid_pre"))(OTHER[:1])[1]
    found = mi.jit(mi.intervene(tiny(), mi.patch("blocks.1.hook_resid_pre", single)))(TOKENS)
    expected = mi.jit(mi.intervene(tiny(), mi.patch("resid_pre", single["resid_pre"], layer=1)))(TOKENS)
    np.testing.assert_array_equal(found, expected)


def test_places_are_flat():
    with pytest.raises(mi.SiteError, match=r"'pos' takes one place or a flat set of them; got shape \(1, 2\)"):
        mi.patch("resid_pre", ZERO, pos=jnp.array([[0, 1]]))


def test_a_token_outside_the_vocabulary_has_no_embedding():
    assert np.isnan(mi.jit(tiny())(TOKENS.at[0, 2].set(13))[0, 2:]).all()
    assert np.isfinite(mi.jit(tiny())(TOKENS.at[0, 2].set(12))).all()
