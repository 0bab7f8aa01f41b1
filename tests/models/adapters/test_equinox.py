"""Equinox: the conformance suite, maps over positions and examples, a GRU, and a copy that leaves the model alone."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mi_jax as mi
from mi_jax.models.adapters.equinox import adapt_equinox
from tests.models.adapters.foreign import X, form, over_batch

TOLERANCE = 1e-5


@pytest.mark.parametrize("name", ["equinox", "equinox-scan"])
def test_every_form_passes_the_conformance_suite(name):
    checked = mi.check_sites(form(name).adapted, X)
    assert {"resid_pre[l+1] == resid_post[l]", "earlier layers stay as they were"} <= set(checked)


class Recurrent(eqx.Module):
    """GRU layers over time, each followed by a norm, and a read-out of the last state."""

    cells: tuple[eqx.nn.GRUCell, ...]
    norms: list[eqx.nn.LayerNorm]
    readout: eqx.nn.Linear
    dropout: eqx.nn.Dropout

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.cells = tuple(eqx.nn.GRUCell(4, 4, key=k) for k in keys[:2])
        self.norms = [eqx.nn.LayerNorm(4) for _ in keys[:2]]
        self.readout = eqx.nn.Linear(4, 3, key=keys[2])
        self.dropout = eqx.nn.Dropout(0.5)

    def __call__(self, x, *, key=None):
        for cell, norm in zip(self.cells, self.norms, strict=True):
            _, states = jax.lax.scan(lambda h, x, cell=cell: (h := cell(x, h), h), jnp.zeros(4), x)
            x = jax.vmap(norm)(states)
        return self.readout(self.dropout(x[-1], inference=key is None, key=key))


def recurrent(**options):
    net = Recurrent(jax.random.key(1))
    return net, adapt_equinox(net, X, call=over_batch, names={"resid_post": "norms/{layer}"}, **options)


def test_a_gru_passes_the_conformance_suite():
    net, model = recurrent()
    checked = mi.check_sites(model, X)
    assert "earlier layers stay as they were" in checked
    # the steps in time share one body and its parameters, so none can be told from another
    assert not [name for name in model.site_table.names if name.startswith("cells")]
    assert model.site_table.resolve("resid_post")[0].axes == ("layer", "batch", "pos", "d_model")
    assert model.site_table.resolve("readout")[0].axes == ("batch", "unit")
    np.testing.assert_array_equal(model(X), over_batch(net, X))


def test_a_map_outside_the_model_and_one_inside_do_not_get_mixed_up():
    _, model = recurrent()
    _, acts = mi.jit(mi.capture(model, "resid_post"))(X)

    def effect(layer, pos, x):
        return mi.intervene(model, mi.patch("resid_post", 2 * acts["resid_post"], layer=layer, pos=pos))(x)

    layers, places = jnp.array([0, 1, 1], jnp.int32), jnp.array([4, 0, -1], jnp.int32)
    inputs = jnp.stack([X, X * 2, X[::-1]])
    mapped = jax.jit(jax.vmap(effect))(layers, places, inputs)
    for layer, pos, x, found in zip(layers, places, inputs, mapped, strict=True):
        np.testing.assert_allclose(found, mi.jit(effect)(layer, pos, x), atol=TOLERANCE)
    swapped = mi.intervene(model, mi.ablate("resid_post", layer=1, pos=mi.per_example(jnp.array([4, 0]))))
    found = mi.jit(swapped)(X)
    # the read-out sees the last position only: the first example has lost it, the second has not
    np.testing.assert_allclose(found[0], model.module.readout.bias, atol=TOLERANCE)
    np.testing.assert_allclose(found[1], model(X)[1], atol=TOLERANCE)


@eqx.filter_jit
def _compiled(layer, x):
    return jax.vmap(layer)(x)


class Jitted(eqx.Module):
    """Calls its layer through a function that keeps its traces."""

    layer: eqx.nn.Linear

    def __call__(self, x):
        return _compiled(self.layer, x)


def test_kept_traces_of_the_foreign_model_do_not_go_stale():
    model = adapt_equinox(Jitted(eqx.nn.Linear(4, 4, key=jax.random.key(1))), X, call=over_batch)
    clean = model(X)
    # the two edits send the same arrays along: only what is done with them differs
    added, scaled = (mi.intervene(model, edit("layer", 3.0)) for edit in (mi.add, mi.scale))
    np.testing.assert_allclose(added(X), clean + 3, atol=TOLERANCE)
    np.testing.assert_allclose(scaled(X), clean * 3, atol=TOLERANCE)
    np.testing.assert_array_equal(model(X), clean)


def test_the_users_model_stays_as_it_was():
    net, model = recurrent()
    assert type(net.readout) is eqx.nn.Linear
    assert isinstance(model.module.readout, eqx.nn.Linear)
    before = jax.tree.leaves(net)
    mi.jit(mi.capture(model, "resid_post"))(X)
    assert all(a is b for a, b in zip(before, jax.tree.leaves(net), strict=True))


class Ensemble(eqx.Module):
    """Members that all read the same input, and a stack of layers."""

    members: eqx.nn.Linear
    last: eqx.nn.Linear

    def __init__(self, key):
        self.members = eqx.filter_vmap(lambda k: eqx.nn.Linear(4, 4, key=k))(jax.random.split(key, 3))
        self.last = eqx.nn.Linear(4, 4, key=key)

    def __call__(self, x):
        def member(net):
            return jax.vmap(jax.vmap(net))(x)

        return jax.vmap(jax.vmap(self.last))(eqx.filter_vmap(member)(self.members).mean(0))


def test_an_ensemble_is_no_stack_of_layers():
    net = Ensemble(jax.random.key(1))
    model = adapt_equinox(net, X)
    assert model.site_table.names == ("input", "last:in", "last", "output")
    np.testing.assert_array_equal(mi.capture(model, "last:in")(X)[0], net(X))
