"""One network in seven forms: whatever the framework and its transforms, edits and captures are those of numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mi_jax as mi
from tests.models.adapters.foreign import FORMS, LAYERS, X, form, numpy_run

TOLERANCE = 1e-5
EVERY = ("resid_pre", "mlp.pre", "mlp_out", "resid_post")


def close(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=TOLERANCE, rtol=TOLERANCE), found, expected)


@pytest.fixture(params=FORMS)
def one(request):
    return form(request.param)


def test_empty_taps_are_the_program_of_the_foreign_model(one):
    def body(text):
        return text.split("\n", 1)[1]

    def text(fn, *args):
        return body(jax.jit(fn).lower(*args).as_text())

    leaves, treedef = jax.tree.flatten(one.variables)
    plain = text(lambda v, x: one.plain(jax.tree.unflatten(treedef, v), x), leaves, X)
    ours, ours_def = jax.tree.flatten(one.adapted)
    adapted = text(lambda v, x: jax.tree.unflatten(ours_def, v)(x, taps={}), ours, X)
    assert adapted == plain


INDICES = st.tuples(st.integers(0, LAYERS - 1), st.integers(-5, 4), st.floats(-2, 2, width=32))


@settings(max_examples=20, deadline=None)
@given(name=st.sampled_from(FORMS), places=st.tuples(*(INDICES for _ in EVERY)))
def test_edits_are_the_edits_of_numpy(name, places):
    one, at = form(name), dict(zip(EVERY, places, strict=True))

    def edit(site, layer, value):
        chosen, pos, factor = at[site]
        value = value.copy()
        value[:, pos] *= factor if layer == chosen else 1
        return value

    edits = [mi.scale(site, factor, layer=layer, pos=pos) for site, (layer, pos, factor) in at.items()]
    found = mi.jit(mi.capture(mi.intervene(one.adapted, *edits), *EVERY))(X)
    close(found, numpy_run(one.weights, X, edit))


def test_a_sweep_is_a_loop_of_interventions(one):
    _, acts = mi.jit(mi.capture(one.adapted, "mlp.pre"))(X[::-1])
    metric = jnp.sin
    edit = mi.patch("mlp.pre", acts, layer=mi.each, pos=mi.each)
    swept = mi.jit(mi.sweep(one.adapted, edit, lambda out: metric(out).sum(), batch_size=4))(X)
    assert swept.shape == (LAYERS, 5)
    for layer in range(LAYERS):
        for pos in range(5):
            single = mi.intervene(one.adapted, mi.patch("mlp.pre", acts, layer=layer, pos=pos))
            close(swept[layer, pos], metric(mi.jit(single)(X)).sum())


def test_nested_is_composed_in_order_and_some_layers_can_be_captured(one):
    first, second = mi.add("mlp_out", 0.5, layer=1), mi.scale("mlp_out", -2.0, pos=3)
    model = mi.intervene(mi.intervene(one.adapted, first), second)
    specs = (mi.at("mlp_out", layers=(2, 0)), mi.at("resid_post", layers=2))
    output, acts = mi.jit(mi.capture(model, *specs))(X)

    def edit(site, layer, value):
        if site == "mlp_out":
            value = value + 0.5 * (layer == 1)
            value[:, 3] *= -2
        return value

    expected, sites = numpy_run(one.weights, X, edit)
    close(output, expected)
    close(acts, {"mlp_out": sites["mlp_out"][[2, 0]], "resid_post": sites["resid_post"][2]})


def test_new_layers_and_values_do_not_recompile(one):
    traces = []

    def metric(out):
        traces.append(None)
        return out.sum()

    run = mi.jit(lambda model, x: metric(model(x)))
    found = {
        float(run(mi.intervene(one.adapted, mi.add("resid_pre", value, layer=layer, pos=pos)), X))
        for value, layer, pos in ((1.0, 0, 0), (2.0, 1, -1), (-1.0, 2, 3), (0.5, 1, 2))
    }
    assert len(found) == 4
    assert len(traces) == 1
