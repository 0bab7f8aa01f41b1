"""The decoder against its equations in numpy, padding, partial forwards, resuming, and its errors."""

import dataclasses
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mi_jax as mi
from mi_jax.core.errors import InputError
from mi_jax.models.config import check_choices
from tests.models.numpy_decoder import numpy_sites
from tests.models.tiny import CONFIGS, prompts, tiny
from tests.models.tiny_families import FAMILIES, family

TOLERANCE = 1e-5


@pytest.mark.parametrize("name", CONFIGS)
def test_every_site_equals_the_equations_in_numpy(name):
    model, tokens = tiny(name), prompts(3)
    logits, acts = mi.jit(mi.capture(model, *model.site_table.names))(tokens)
    expected = [numpy_sites(model, row) for row in np.asarray(tokens)]
    assert set(acts) == set(expected[0])
    for site, value in acts.items():
        batch_axis = int(value.ndim > 3 or site in ("resid_pre", "resid_post"))
        reference = np.stack(
            [e[site] for e in expected], 0 if site in ("embed", "final_norm", "logits") else batch_axis
        )
        if site == "attn.scores":
            value, reference = jnp.maximum(value, -1e9), np.maximum(reference, -1e9)
        np.testing.assert_allclose(value, reference, atol=TOLERANCE, rtol=TOLERANCE, err_msg=site)
    np.testing.assert_array_equal(logits, acts["logits"])


class _TowardsOtherExample(eqx.Module):
    """Moves an activation towards that of the other example."""

    strength: jax.Array

    def __call__(self, x):
        return x + self.strength.astype(x.dtype) * (jnp.roll(x, 1, 0) - x)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_every_site_is_read_again_by_the_model(name):
    """Putting back what was captured changes nothing; putting back something else changes the logits."""
    model, tokens = tiny(name), prompts(3)
    sites = model.site_table.names
    logits, acts = mi.jit(mi.capture(model, *sites))(tokens)

    put_back = mi.jit(mi.intervene(model, *[mi.patch(site, acts) for site in sites]))(tokens)
    np.testing.assert_allclose(put_back, logits, atol=TOLERANCE)
    for chosen in sites:
        # an edit at every site, all but one of strength 0, so that one program serves all
        strengths = {site: jnp.asarray(float(site == chosen), jnp.float32) for site in sites}
        edits = [mi.transform(site, _TowardsOtherExample(strength)) for site, strength in strengths.items()]
        moved = mi.jit(mi.intervene(model, *edits))(tokens)
        assert float(jnp.abs(moved - logits).max()) > 1e-3, chosen


def _compiled_logits(name):
    return eqx.filter_jit(lambda tokens, mask: tiny(name)(tokens, mask))


_PADDED = {name: _compiled_logits(name) for name in ("llama", "gpt2")}


@pytest.mark.parametrize("name", _PADDED)
@settings(max_examples=8, deadline=None)
@given(
    spans=st.tuples(*[st.tuples(st.integers(0, 5), st.integers(1, 6))] * 3),
    pad=st.integers(0, 12),
    seed=st.integers(0, 99),
)
def test_padded_equals_unpadded(name, spans, pad, seed):
    """With the padding after a prompt, before it, or on both sides."""
    rows = np.asarray(prompts(seed, 3, 6))
    first, n = np.asarray(spans).T[:, :, None]
    mask = (np.arange(6)[None, :] >= first) & (np.arange(6)[None, :] < first + n)
    logits = _PADDED[name](jnp.asarray(np.where(mask, rows, pad), jnp.int32), jnp.asarray(mask))
    for row in range(3):
        reference = numpy_sites(tiny(name), rows[row, mask[row]])["logits"]
        np.testing.assert_allclose(logits[row, mask[row]], reference, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "vit"])
def test_prompts_padded_on_the_left_equal_those_padded_on_the_right(name):
    model, tokens, mask = family(name), prompts(7, 2, 6), jnp.arange(6)[None, :] < jnp.array([[4], [3]])
    run = eqx.filter_jit(lambda tokens, mask: model(tokens, mask))
    right = run(tokens, mask)
    left = run(*(jnp.stack([jnp.roll(x[0], 2), jnp.roll(x[1], 3)]) for x in (tokens, mask)))
    np.testing.assert_allclose(left[0, 2:], right[0, :4], atol=TOLERANCE, rtol=TOLERANCE)
    np.testing.assert_allclose(left[1, 3:], right[1, :3], atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (0, 0)])
def test_an_empty_batch_is_refused(shape):
    for model in (family("llama"), mi.capture(family("gpt2"), "resid_post")):
        with pytest.raises(InputError, match=rf"tokens of shape \({shape[0]}, {shape[1]}\) hold none"):
            model(jnp.zeros(shape, jnp.int32))


def test_a_masked_token_in_the_middle_is_not_read():
    model, tokens = tiny(), prompts(4, 1)
    mask = jnp.array([[True, False, True, True, True]])
    _, acts = mi.jit(mi.capture(model, "attn.pattern"))(tokens, mask)
    assert float(acts["attn.pattern"][..., 1].max()) == 0.0
    np.testing.assert_allclose(acts["attn.pattern"].sum(-1), 1.0, atol=TOLERANCE)


def test_output_pos_is_the_same_rows_of_the_logits():
    model, tokens = tiny(), prompts(5)
    logits = mi.jit(model)(tokens)
    some = mi.jit(model)(tokens, output_pos=jnp.array([1, 4], jnp.int32))
    np.testing.assert_allclose(some[:, 0], jnp.stack([logits[0, 1], logits[1, 4]]), atol=TOLERANCE)
    from_the_end = mi.jit(model)(tokens, output_pos=jnp.array([-1, -4], jnp.int32))
    np.testing.assert_allclose(from_the_end[:, 0], jnp.stack([logits[0, 4], logits[1, 1]]), atol=TOLERANCE)
    with pytest.raises(mi.SiteError, match="output_pos drops positions"):
        mi.capture(model, "final_norm")(tokens, output_pos=jnp.array([1, 4], jnp.int32))


def test_resume_equals_the_whole_forward():
    model, tokens = tiny(), prompts(6)
    logits, acts = mi.jit(mi.capture(model, "resid_pre"))(tokens)
    resume = jax.jit(lambda x, layer: model.resume(x, layer))
    for layer in range(model.config.n_layers):
        np.testing.assert_allclose(resume(acts["resid_pre"][layer], jnp.int32(layer)), logits, atol=TOLERANCE)


def _scan_lengths(fn, *args) -> list[int]:
    jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
    return [eqn.params["length"] for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]


def test_without_output_only_the_layers_that_are_needed_run():
    model, tokens = tiny(), prompts(7)

    def lengths(*specs, output=False):
        return _scan_lengths(lambda t: mi.capture(model, *specs)(t, output=output)[1], tokens)

    assert lengths("embed") == []
    assert lengths(mi.at("resid_post", layers=0)) == [1]
    assert lengths(mi.at("resid_post", layers=(1, 0)), "embed") == [2]
    assert lengths("resid_pre") == [3]
    assert lengths("final_norm") == [3]
    assert lengths(mi.at("resid_post", layers=0), output=True) == [3]
    products = str(jax.make_jaxpr(lambda t: mi.capture(model, "resid_post")(t, output=False)[1])(tokens))
    assert f"2,5,{model.config.d_vocab}]" not in products


def test_output_false_returns_none_and_the_same_activations():
    model, tokens = tiny(), prompts(7)
    wanted = mi.capture(model, mi.at("resid_post", layers=1), "embed")
    _, with_output = mi.jit(wanted)(tokens)
    output, without = mi.jit(wanted)(tokens, output=False)
    assert output is None
    assert set(without) == {"resid_post", "embed"}
    for name, value in without.items():
        np.testing.assert_allclose(value, with_output[name], atol=TOLERANCE)


def test_low_precision_weights_run():
    model = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny())
    logits = mi.jit(model)(prompts(8))
    assert logits.dtype == jnp.bfloat16
    np.testing.assert_allclose(logits.astype(jnp.float32), mi.jit(tiny())(prompts(8)), atol=0.3)


def test_a_prompt_longer_than_the_context_is_named():
    with pytest.raises(ValueError, match="the prompt has 13 tokens, the context of llama-like is 12"):
        tiny()(prompts(0, 1, 13))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layers": 0}, "n_layers must be at least 1, got 0"),
        ({"n_kv_heads": 3}, "n_heads=4 is not a multiple of n_kv_heads=3"),
        ({"d_head": 5}, "rotary positions need an even d_head, got 5"),
        ({"d_mlp": -1}, "d_mlp must be at least 0, got -1"),
        ({"score_softcap": -2.0}, "score_softcap is a positive number, or 0 for none; got -2.0"),
        ({"logit_softcap": -30.0}, "logit_softcap is a positive number, or 0 for none; got -30.0"),
        ({"logit_softcap": float("nan")}, "logit_softcap is a positive number, or 0 for none; got nan"),
        ({"logit_softcap": float("inf")}, "logit_softcap is a positive number, or 0 for none; got inf"),
        ({"windows": (0, 2)}, "windows has 2 entries for 3 layers"),
        ({"windows": 4}, "windows is a tuple with one int for every layer, or empty; got 4"),
        ({"windows": (0, 2.5, 0)}, r"windows is a tuple with one int .* got \(0, 2.5, 0\)"),
        ({"rope_layers": (1, 0, 1)}, r"rope_layers is a tuple with one bool .* got \(1, 0, 1\)"),
    ],
)
def test_a_configuration_that_cannot_be_is_named(monkeypatch, change, message):
    # as for a user who does not check annotations
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIGS["llama"], **change)


def test_a_list_with_an_entry_for_every_layer_is_a_tuple(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    lists: dict = {"windows": [0, 2, 0], "rope_layers": [True, False, True]}
    config = dataclasses.replace(CONFIGS["llama"], **lists)
    assert config == dataclasses.replace(CONFIGS["llama"], windows=(0, 2, 0), rope_layers=(True, False, True))
    # what a model is compiled for is hashed
    assert hash(config) == hash(dataclasses.replace(config))


@pytest.mark.parametrize("wrong", [-1, 13])
def test_a_token_outside_of_the_vocabulary_is_named_or_has_no_embedding(wrong):
    tokens = prompts(0).at[1, 2].set(wrong)
    with pytest.raises(InputError, match=rf"llama-like has 13 tokens \(0–12\); got {wrong} in row 1, position 2"):
        tiny()(tokens)
    # where it is traced it must not be another token
    logits = mi.jit(tiny())(tokens)
    assert jnp.isnan(logits[1, 2:]).all()
    np.testing.assert_array_equal(logits[0], mi.jit(tiny())(prompts(0))[0])


def test_a_token_type_that_is_not_there_is_named():
    tokens = prompts(0)
    types = jnp.zeros_like(tokens).at[0, 3].set(2)
    with pytest.raises(InputError, match=r"bert-like has 2 token types \(0–1\); got 2 in row 0, position 3$"):
        family("bert")(tokens, token_types=types)


def test_a_choice_that_does_not_exist_is_named_without_a_type_checker():
    @dataclasses.dataclass
    class Choice:
        norm: Literal["rms", "layer"]

    check_choices(Choice("rms"))
    with pytest.raises(ValueError, match="norm is one of rms, layer; got 'peri'"):
        check_choices(Choice("peri"))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        ([[1, 2]], {}, r"tokens are an array \[batch pos\], .*; got list"),
        (jnp.ones((1, 3)), {}, "takes tokens, which are integers; got float32"),
        (jnp.ones((1, 3), bool), {}, "takes tokens, which are integers; got bool"),
        (jnp.ones((1, 3), int), {"output_pos": 2}, r"one position for each of 1 prompts; got shape \(\)"),
        (jnp.ones((1, 3), int), {"output_pos": jnp.array([0, 1])}, r"each of 1 prompts; got shape \(2,\)"),
    ],
)
def test_what_is_no_prompt_is_named(tokens, options, message, monkeypatch):
    # as for a user: only tests check the types of arguments
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(InputError, match=message):
        family("gpt2")(tokens, **options)
