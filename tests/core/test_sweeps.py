"""A sweep equals a loop of single edits, whatever is swept, on models that resume and on those that do not."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mi_jax as mi
from tests.core.whole_runs import WithoutResume
from tests.models.tiny import prompts, tiny

TOLERANCE = 1e-5
CLEAN, CORRUPT = prompts(3), prompts(4)
KEY = jax.random.key(2)


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
    pos = mi.per_example(jnp.array([1, 4]))
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


def test_resuming_changes_nothing_even_where_a_masked_token_is_read(acts):
    mask = jnp.array([[True, False, True, True, True], [True, True, True, True, False]])
    edit = mi.patch("attn.z", acts, layer=mi.each, pos=mi.each)
    resumed = mi.jit(mi.sweep(tiny(), edit, lambda logits: logits))(CORRUPT, mask=mask)
    whole = mi.jit(mi.sweep(WithoutResume(tiny()), edit, lambda logits: logits))(CORRUPT, mask=mask)
    np.testing.assert_allclose(resumed, whole, atol=TOLERANCE)


def test_a_sweep_of_an_intervened_model_keeps_its_edits(acts):
    edit = mi.patch("attn.z", acts, layer=mi.each)
    base = mi.intervene(tiny(), mi.ablate("mlp_out", layer=0))
    values = mi.jit(mi.sweep(base, edit, metric))(CORRUPT)
    one = mi.jit(mi.intervene(base, mi.patch("attn.z", acts, layer=1)))(CORRUPT)
    np.testing.assert_allclose(values[1], metric(one), atol=TOLERANCE)


@pytest.mark.parametrize(
    "base",
    [mi.add("resid_pre", 1.0, layer=1), mi.ablate("attn.scores", head=1), mi.noise("attn.pattern", 0.2, key=KEY)],
    ids=["the stream before a layer", "tokens see those after them", "noise in the pattern"],
)
def test_edits_that_hold_in_every_cell_are_made_once_and_break_no_causality(acts, base):
    model = mi.intervene(tiny(), base)
    for edit in (
        mi.patch("attn.z", acts, layer=mi.each, head=mi.each),
        mi.patch("resid_pre", acts, layer=mi.each, pos=mi.each),
    ):
        found = mi.jit(mi.sweep(model, edit, lambda logits: logits))(CORRUPT)
        whole = mi.jit(mi.sweep(WithoutResume(model), edit, lambda logits: logits))(CORRUPT)
        np.testing.assert_allclose(found, whole, atol=TOLERANCE)


def test_a_metric_can_be_a_tree_and_a_sweep_needs_no_jit(acts):
    edit = mi.patch("attn.z", acts, layer=1, head=mi.each)

    def metrics(logits):
        return {"mean": logits.mean(), "last": (logits[:, -1],)}

    found = mi.sweep(tiny(), edit, metrics)(tokens=CORRUPT)
    one = mi.intervene(tiny(), mi.patch("attn.z", acts, layer=1, head=2))(CORRUPT)
    np.testing.assert_allclose(found["mean"][2], one.mean(), atol=TOLERANCE)
    np.testing.assert_allclose(found["last"][0][2], one[:, -1], atol=TOLERANCE)


def test_positions_of_the_output_past_the_end_are_nan_as_in_the_model(acts):
    edit = mi.patch("attn.z", acts, layer=1, head=mi.each)
    past = jnp.array([1, 9], jnp.int32)
    found = np.asarray(mi.jit(mi.sweep(tiny(), edit, lambda logits: logits))(CORRUPT, output_pos=past))
    alone = np.asarray(mi.jit(tiny())(CORRUPT, output_pos=past))
    assert np.isnan(alone[1]).all()
    assert np.isnan(found[:, 1]).all()
    assert np.isfinite(found[:, 0]).all()


def test_a_sweep_computes_only_from_the_edited_layer_on(acts):
    """The layers run in a loop whose start is the edited layer, not in a scan over all of them."""
    edit = mi.patch("resid_pre", acts, layer=mi.each)
    program = str(jax.make_jaxpr(lambda tokens: mi.sweep(tiny(), edit, metric)(tokens))(CORRUPT))
    assert "while[" in program
    assert "while[" not in str(jax.make_jaxpr(lambda t: mi.sweep(WithoutResume(tiny()), edit, metric)(t))(CORRUPT))


def test_a_sweep_needs_an_axis_that_the_site_has():
    with pytest.raises(mi.SiteError, match=r"sweep of site 'attn.z': mark an axis with mi.each"):
        mi.sweep(tiny(), mi.ablate("attn.z", layer=1), metric)
    with pytest.raises(mi.SiteError, match="it takes no index 'head'"):
        mi.sweep(tiny(), mi.ablate("resid_pre", head=mi.each), metric)
    with pytest.raises(mi.SiteError, match="has no site 'nowhere'"):
        mi.sweep(tiny(), mi.ablate("nowhere", layer=mi.each), metric)


def test_the_program_does_not_grow_with_the_prompt():
    """Which positions a cell can change is worked out on the device: as constants it would be a table of pairs."""

    def constant_bytes(n_pos):
        edit = mi.ablate("attn.z", layer=mi.each, pos=mi.each, head=mi.each)
        text = eqx.filter_jit(mi.sweep(tiny(), edit, metric)).lower(prompts(0, 2, n_pos)).as_text()
        # lists and bytes; a number that fills an array is written once
        return sum(len(found) for found in re.findall(r"dense<([\[\"][^>]*)>", text))

    assert constant_bytes(12) == constant_bytes(6)


def test_a_metric_of_integers_in_a_layer_that_is_not_known_is_refused():
    def top(logits):
        return logits[:, -1].argmax(-1)

    def run(layer):
        return mi.sweep(tiny(), mi.ablate("attn.z", layer=layer, head=mi.each), top)(CORRUPT)

    with pytest.raises(mi.SiteError, match=r"NaN where the model lacks that layer, which a metric of int32 cannot be"):
        jax.jit(run)(jnp.asarray(9))
    expected = [
        mi.intervene(tiny(), mi.ablate("attn.z", layer=1, head=head))(CORRUPT)[:, -1].argmax(-1) for head in (0, 3)
    ]
    np.testing.assert_array_equal(run(1)[jnp.array([0, 3])], jnp.stack(expected))
