"""Sweeps in every structure of a decoder: equal to the loop of their cells, with and without `output_pos`."""

import jax.numpy as jnp
import numpy as np
import pytest

import mi_jax as mi
from tests.models.tiny_families import family, inputs

TOLERANCE = 1e-5
# the first of each is also swept without `output_pos`, where the last layer computes all positions
SWEPT = {
    "gemma": ("resid_mid", "attn.z"),
    "gptj": ("mlp_out", "mlp.post"),
    "bert": ("attn.z", "resid_mid"),
    "mixture": ("mlp.post", "resid_pre"),
    "vit": ("resid_pre", "mlp_out"),
}


def close(found, expected, message):
    bound = TOLERANCE * max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(found, expected, rtol=0, atol=bound, err_msg=message)


@pytest.mark.parametrize("name", SWEPT)
def test_a_sweep_is_the_loop_of_its_cells(name):
    model, clean, corrupt = family(name), inputs(name, 4), inputs(name, 5)
    read = jnp.array([3, 2], jnp.int32)
    _, acts = mi.jit(mi.capture(model, *SWEPT[name]))(clean)
    for site in SWEPT[name]:
        axis = "head" if site == "attn.z" else "pos"
        edit = mi.patch(site, acts, layer=mi.each, **{axis: mi.each})
        at_read = np.asarray(mi.jit(mi.sweep(model, edit, lambda out: out[:, 0]))(corrupt, output_pos=read))
        for layer, place in ((0, 0), (0, at_read.shape[1] - 1), (1, 1), (1, 2), (1, 3)):
            one = mi.intervene(model, mi.patch(site, acts, **{"layer": layer, axis: place}))
            rows = mi.jit(one)(corrupt)[jnp.arange(2), read]
            close(at_read[layer, place], rows, f"{site} at {layer}, {place}")
        assert np.abs(at_read - at_read[:1, :1]).max() > 1e-3
        if site == SWEPT[name][0]:
            whole = np.asarray(mi.jit(mi.sweep(model, edit, lambda out: out))(corrupt))
            close(whole[:, :, np.arange(2), np.asarray(read)], at_read, site)


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_without_causality_a_patch_changes_every_position(name):
    model, clean, corrupt = family(name), inputs(name, 4), inputs(name, 5)
    _, acts = mi.jit(mi.capture(model, "resid_mid"))(clean)
    edit = mi.patch("resid_mid", acts, layer=0, pos=mi.each)
    found = mi.jit(mi.sweep(model, edit, lambda out: out))(corrupt)
    assert (np.abs(found - mi.jit(model)(corrupt)[None]).max((1, 3)) > 1e-3).all()
