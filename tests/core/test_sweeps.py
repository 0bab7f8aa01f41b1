"""A sweep equals a loop of single edits, whatever is swept, on models that resume and on those that do not."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mi_jax as mi
from tests.models.tiny import prompts, tiny

TOLERANCE = 1e-5
CLEAN, CORRUPT = prompts(3), prompts(4)


@pytest.fixture(scope="module")
def acts():
    return mi.jit(mi.capture(tiny(), "resid_pre", "attn.z", "attn.k"))(CLEAN)[1]


def metric(logits):
    return logits[:, -1, 3] - logits[:, -1, 5]


def loop(make, sizes):
    """The metric of one edit a cell, `[*sizes batch]`."""
    out = np.zeros((*sizes, 2))
    for place in np.ndindex(*sizes):
        out[place] = metric(mi.jit(mi.intervene(tiny(), make(*place)))(CORRUPT))
    return out


def test_layers_and_positions(acts):
    values = mi.jit(mi.sweep(tiny(), mi.patch("resid_pre", acts, layer=mi.each, pos=mi.each), metric))(CORRUPT)
    expected = loop(lambda layer, pos: mi.patch("resid_pre", acts, layer=layer, pos=pos), (3, 5))
    np.testing.assert_allclose(values, expected, atol=TOLERANCE)
    assert np.abs(expected - expected[0, 0]).max() > 0.1


def test_layers_and_heads_with_fixed_positions(acts):
    pos = jnp.array([1, 4])
    values = mi.jit(mi.sweep(tiny(), mi.patch("attn.z", acts, layer=mi.each, head=mi.each, pos=pos), metric))(CORRUPT)
    expected = loop(lambda layer, head: mi.patch("attn.z", acts, layer=layer, head=head, pos=pos), (3, 4))
    np.testing.assert_allclose(values, expected, atol=TOLERANCE)


def test_heads_in_one_layer_and_key_heads():
    values = mi.jit(mi.sweep(tiny(), mi.scale("attn.z", 2.0, layer=1, head=mi.each), metric))(CORRUPT)
    expected = loop(lambda head: mi.scale("attn.z", 2.0, layer=1, head=head), (4,))
    np.testing.assert_allclose(values, expected, atol=TOLERANCE)
    grouped = mi.jit(mi.sweep(tiny(), mi.ablate("attn.k", layer=mi.each, head=mi.each), metric))(CORRUPT)
    assert grouped.shape == (3, 2, 2)


def test_units_of_a_site_outside_the_layers():
    values = mi.jit(mi.sweep(tiny(), mi.ablate("final_norm", unit=mi.each, pos=-1), metric))(CORRUPT)
    expected = loop(lambda unit: mi.ablate("final_norm", unit=unit, pos=-1), (8,))
    np.testing.assert_allclose(values, expected, atol=TOLERANCE)


def test_layers_alone_and_a_transform():
    sweep = mi.sweep(tiny(), mi.transform("mlp_out", jnp.tanh, layer=mi.each), lambda logits: metric(logits).mean())
    values = mi.jit(sweep)(CORRUPT)
    expected = loop(lambda layer: mi.transform("mlp_out", jnp.tanh, layer=layer), (3,)).mean(-1)
    np.testing.assert_allclose(values, expected, atol=TOLERANCE)


@pytest.mark.parametrize("batch_size", [1, 4, 99])
def test_the_batch_size_changes_nothing(acts, batch_size):
    edit = mi.patch("resid_pre", acts, layer=mi.each, pos=mi.each)
    values = mi.jit(mi.sweep(tiny(), edit, metric, batch_size=batch_size))(CORRUPT)
    np.testing.assert_allclose(values, mi.jit(mi.sweep(tiny(), edit, metric))(CORRUPT), atol=TOLERANCE)


def test_options_reach_the_model(acts):
    edit = mi.patch("resid_pre", acts, layer=mi.each, pos=mi.each)
    whole = mi.jit(mi.sweep(tiny(), edit, lambda logits: logits[:, 2]))(CORRUPT)
    at = mi.jit(mi.sweep(tiny(), edit, lambda logits: logits[:, 0]))(CORRUPT, output_pos=jnp.array([2, 2], jnp.int32))
    np.testing.assert_allclose(at, whole, atol=TOLERANCE)


class _WithoutResume(eqx.Module):
    model: Any

    @property
    def site_table(self):
        return self.model.site_table

    def __call__(self, *inputs, **options):
        return self.model(*inputs, **options)


def test_resuming_changes_nothing_even_where_a_masked_token_is_read(acts):
    mask = jnp.array([[True, False, True, True, True], [True, True, True, True, False]])
    edit = mi.patch("attn.z", acts, layer=mi.each, pos=mi.each)
    resumed = mi.jit(mi.sweep(tiny(), edit, lambda logits: logits))(CORRUPT, mask=mask)
    whole = mi.jit(mi.sweep(_WithoutResume(tiny()), edit, lambda logits: logits))(CORRUPT, mask=mask)
    np.testing.assert_allclose(resumed, whole, atol=TOLERANCE)


def test_a_sweep_of_an_intervened_model_keeps_its_edits(acts):
    edit = mi.patch("attn.z", acts, layer=mi.each)
    base = mi.intervene(tiny(), mi.ablate("mlp_out", layer=0))
    values = mi.jit(mi.sweep(base, edit, metric))(CORRUPT)
    one = mi.jit(mi.intervene(base, mi.patch("attn.z", acts, layer=1)))(CORRUPT)
    np.testing.assert_allclose(values[1], metric(one), atol=TOLERANCE)


def test_a_sweep_computes_only_from_the_edited_layer_on(acts):
    """The layers run in a loop whose start is the edited layer, not in a scan over all of them."""
    edit = mi.patch("resid_pre", acts, layer=mi.each)
    program = str(jax.make_jaxpr(lambda tokens: mi.sweep(tiny(), edit, metric)(tokens))(CORRUPT))
    assert "while[" in program
    assert "while[" not in str(jax.make_jaxpr(lambda t: mi.sweep(_WithoutResume(tiny()), edit, metric)(t))(CORRUPT))


def test_a_sweep_needs_an_axis_that_the_site_has():
    with pytest.raises(mi.SiteError, match=r"sweep of site 'attn.z': mark an axis with mi.each"):
        mi.sweep(tiny(), mi.ablate("attn.z", layer=1), metric)
    with pytest.raises(mi.SiteError, match="it takes no index 'head'"):
        mi.sweep(tiny(), mi.ablate("resid_pre", head=mi.each), metric)
    with pytest.raises(mi.SiteError, match="has no site 'nowhere'"):
        mi.sweep(tiny(), mi.ablate("nowhere", layer=mi.each), metric)
