"""Forward mode: central differences in the interpolation, exactness on a linear model, and attribution's other side."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mi_jax as mi
from mi_jax.core.attribution import attribute
from mi_jax.core.forward import forward_effects
from tests.core.linear_model import inputs, linear_model
from tests.models.tiny import prompts, tiny

TOLERANCE = 1e-5
TOKENS = prompts(3)


def mean_over_batch(x):
    return jnp.broadcast_to(x.mean(0, keepdims=True), x.shape)


# an edit, what it does to the value at its place, and the layers
EDITS = {
    "scale everywhere": (lambda **index: mi.scale("attn_out", 2.0, **index), lambda x: 2.0 * x, {}),
    "ablate one layer": (
        lambda **index: mi.ablate("attn_out", baseline="mean_per_position", **index),
        mean_over_batch,
        {"layer": 1},
    ),
    "transform two layers": (
        lambda **index: mi.transform("attn_out", jnp.tanh, **index),
        jnp.tanh,
        {"layer": (0, 2)},
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_against_central_differences_of_the_interpolation(name):
    make, change, index = EDITS[name]
    sites, step = ("resid_post", "attn.pattern"), 1e-5
    with jax.enable_x64(True):
        model = jax.tree.map(lambda x: x.astype(jnp.float64), tiny())

        @jax.jit
        def run(t):
            edit = mi.transform("attn_out", lambda x: x + t * (change(x) - x), **index)
            return mi.capture(mi.intervene(model, edit), *sites)(TOKENS)

        moved = mi.jit(forward_effects(model, make(**index), *sites))(TOKENS)
        slope = jax.tree.map(lambda a, b: (a - b) / (2 * step), run(step), run(-step))
        for found, expected in zip(jax.tree.leaves(moved), jax.tree.leaves(slope), strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-7)
        assert np.abs(moved[0]).max() > 0.01


def test_on_a_linear_model_it_is_the_whole_effect():
    x, value = inputs(1), inputs(2)
    edit = mi.patch("attn_out", value, layer=1, pos=2)
    plain, edited = (mi.capture(m, "resid_post")(x) for m in (linear_model(), mi.intervene(linear_model(), edit)))
    output, moved = forward_effects(linear_model(), edit, "resid_post")(x)
    np.testing.assert_allclose(output, edited[0] - plain[0], atol=TOLERANCE)
    np.testing.assert_allclose(moved["resid_post"], edited[1]["resid_post"] - plain[1]["resid_post"], atol=TOLERANCE)
    assert np.abs(moved["resid_post"][0]).max() == 0.0


def test_it_is_attribution_seen_from_the_sender():
    """A patch's forward effect on the metric is its attribution score, layer by layer, under vmap."""

    def metric(logits):
        return (logits[:, -1, 3] - logits[:, -1, 5]).mean()

    corrupt = prompts(4)
    acts = mi.jit(mi.capture(tiny(), "attn.z"))(TOKENS)[1]

    @jax.jit
    def by_layer(layers):
        def one(layer):
            return metric(forward_effects(tiny(), mi.patch("attn.z", acts, layer=layer))(corrupt)[0])

        return jax.vmap(one)(layers)

    scores = mi.jit(attribute(tiny(), metric, "attn.z", axes=("layer",)))(TOKENS, corrupt)["attn.z"]
    np.testing.assert_allclose(by_layer(jnp.arange(3, dtype=jnp.int32)), scores, atol=TOLERANCE)


def test_bad_input_is_named():
    with pytest.raises(mi.SiteError, match=r"takes one place of 'attn.z'; use jax.vmap"):
        forward_effects(tiny(), mi.scale("attn.z", 2.0, layer=mi.each), "attn.q")
    with pytest.raises(mi.SiteError, match=r"has no site 'attn.qq'"):
        forward_effects(tiny(), mi.scale("attn.z", 2.0), "attn.qq")
