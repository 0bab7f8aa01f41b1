"""Capture and intervene: nesting, what is compiled and how often, and what is kept."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mi_jax as mi
import mi_jax.models.scan
from tests.models.tiny import prompts, tiny

TOLERANCE = 1e-5
TOKENS = prompts(3)


def test_capture_and_intervene_nest_in_both_orders():
    model, edit = tiny(), mi.scale("attn.z", 2.0, layer=1)
    outside = mi.jit(mi.capture(mi.intervene(model, edit), "resid_post"))(TOKENS)
    inside = mi.jit(mi.intervene(mi.capture(model, "resid_post"), edit))(TOKENS)
    jax.tree.map(np.testing.assert_array_equal, outside, inside)


def test_nested_captures_return_all_sites_and_nested_edits_apply_inner_first():
    model = tiny()
    _, acts = mi.jit(mi.capture(mi.capture(model, "embed"), mi.at("attn.z", layers=2), "embed"))(TOKENS)
    assert set(acts) == {"embed", "attn.z"}
    add, scale = mi.add("attn.z", 1.0, layer=1), mi.scale("attn.z", 3.0, layer=1)
    nested = mi.jit(mi.intervene(mi.intervene(model, add), scale))(TOKENS)
    flat = mi.jit(mi.intervene(model, add, scale))(TOKENS)
    np.testing.assert_array_equal(nested, flat)


def test_edits_apply_before_captures_and_reach_the_output():
    logits, acts = mi.jit(mi.capture(mi.intervene(tiny(), mi.ablate("logits", pos=0)), "logits"))(TOKENS)
    assert float(jnp.abs(logits[:, 0]).max()) == 0
    np.testing.assert_array_equal(acts["logits"], logits)


def test_jit_equals_no_jit():
    fn = mi.capture(mi.intervene(tiny(), mi.add("attn.z", 0.5, layer=1, head=2)), "resid_post")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=TOLERANCE), fn(TOKENS), mi.jit(fn)(TOKENS))


@pytest.fixture
def traces(monkeypatch):
    """How often the model has been traced: calls of the layer's function."""
    calls = []
    layer = mi_jax.models.scan.block

    def counted(*args):
        calls.append(None)
        return layer(*args)

    monkeypatch.setattr(mi_jax.models.scan, "block", counted)
    return calls


def test_new_places_and_values_do_not_recompile_and_new_sites_do(traces):
    # a batch of its own shape, so that no other test has compiled this before
    tokens = prompts(3, 3)
    results = set()

    def logits(*edits):
        before = len(traces)
        results.add(float(mi.jit(mi.intervene(tiny(), *edits))(tokens).sum()))
        return len(traces) > before

    assert logits(mi.add("attn.z", 1.0, layer=0, pos=0, head=0))
    for layer, pos, head, value in ((1, 0, 0, 1.0), (2, -1, 3, 1.0), (0, jnp.int32(3), 1, -2.0)):
        assert not logits(mi.add("attn.z", value, layer=layer, pos=pos, head=head))
    assert len(results) == 4
    assert logits(mi.add("attn_out", 1.0, layer=0, pos=0))
    assert logits(mi.add("attn.z", 1.0, layer=0, pos=0, head=0), mi.add("attn_out", 1.0, layer=0, pos=0))
    # another model of the same shape is an argument too
    before = len(traces)
    mi.jit(mi.intervene(jax.tree.map(lambda x: x * 2, tiny()), mi.add("attn_out", 1.0, layer=1, pos=0)))(tokens)
    assert len(traces) == before


def test_no_taps_and_empty_taps_are_one_program():
    def text(**options):
        return jax.jit(lambda tokens: tiny()(tokens, **options)).lower(TOKENS).as_text()

    assert text() == text(taps={}) == text(taps=None, mask=None)
    assert text() != text(taps=mi.intervene(tiny(), mi.ablate("attn_out", layer=0)).edits)


def test_what_is_not_asked_for_is_not_kept():
    def shapes(*specs):
        out = jax.eval_shape(lambda tokens: mi.capture(tiny(), *specs)(tokens)[1], TOKENS)
        return {name: x.shape for name, x in out.items()}

    assert shapes() == {}
    assert shapes("embed", "attn.k") == {"embed": (2, 5, 8), "attn.k": (3, 2, 5, 2, 6)}
    some = mi.at("resid_post", layers=(2,))
    assert shapes(some) == {"resid_post": (1, 2, 5, 8)}
    assert shapes(mi.at("resid_post", layers=2)) == {"resid_post": (2, 5, 8)}

    def scanned(spec):
        jaxpr = jax.make_jaxpr(lambda tokens: mi.capture(tiny(), spec)(tokens)[1])(TOKENS)
        (scan,) = [eqn for eqn in jaxpr.jaxpr.eqns if eqn.primitive.name == "scan"]
        return [v.aval.shape for v in scan.outvars]

    # the stream that is carried, and the rows asked for with one to spare: nothing has all three layers
    assert (3, 2, 5, 8) in scanned("resid_post")
    assert scanned(some) == [(2, 5, 8), (2, 2, 5, 8)]


def test_costly_sites_cost_nothing_where_nobody_touches_them():
    program = str(jax.make_jaxpr(lambda tokens: mi.capture(tiny(), "attn_out")(tokens))(TOKENS))
    per_head_stream = "2,5,4,8]"
    assert per_head_stream not in program
    assert per_head_stream in str(jax.make_jaxpr(lambda t: mi.capture(tiny(), "attn.head_out")(t))(TOKENS))


def test_edits_and_models_are_pytrees():
    intervened = mi.intervene(tiny(), mi.add("attn.z", jnp.ones(6), layer=1))
    doubled = eqx.tree_at(lambda m: m.edits["attn.z"][0].operand, intervened, 2 * jnp.ones(6))
    expected = mi.jit(mi.intervene(tiny(), mi.add("attn.z", 2 * jnp.ones(6), layer=1)))(TOKENS)
    np.testing.assert_array_equal(mi.jit(doubled)(TOKENS), expected)


def test_intervene_needs_an_edit():
    with pytest.raises(mi.SiteError, match="intervene needs at least one edit"):
        mi.intervene(tiny())
