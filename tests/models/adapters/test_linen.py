"""Flax Linen: a transformer in the style of Flax's own examples, a GRU, shared modules, and what cannot be a site."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import mi_jax as mi
from mi_jax.models.adapters.linen import adapt_linen
from tests.models.adapters.foreign import LinenBlock, LinenPlain, X, form
from tests.models.tiny import prompts

TOLERANCE = 1e-5
TOKENS = prompts(3)


class EncoderBlock(nn.Module):
    """Pre-norm attention and MLP, with dropout, as in the language-model example of Flax."""

    @nn.compact
    def __call__(self, x, mask, deterministic):
        y = nn.LayerNorm()(x)
        y = nn.MultiHeadDotProductAttention(num_heads=2, deterministic=deterministic, name="attention")(y, mask=mask)
        x = x + nn.Dropout(0.1)(y, deterministic=deterministic)
        y = nn.Dense(6, name="wi")(nn.LayerNorm()(x))
        y = nn.Dense(4, name="wo")(nn.gelu(y))
        return x + nn.Dropout(0.1, name="mlp")(y, deterministic=deterministic)


class LanguageModel(nn.Module):
    @nn.compact
    def __call__(self, tokens, deterministic=True):
        embed = nn.Embed(13, 4, name="embed")
        x = embed(tokens) + self.param("positions", nn.initializers.normal(0.5), (8, 4))[None, : tokens.shape[1]]
        mask = nn.make_causal_mask(tokens)
        for layer in range(2):
            x = nn.remat(EncoderBlock, static_argnums=(3,))(name=f"encoderblock_{layer}")(x, mask, deterministic)
        return embed.attend(nn.LayerNorm(name="final_norm")(x))


NAMES = {
    "resid_pre": "encoderblock_{layer}:in",
    "attn.q": "encoderblock_{layer}/attention/query",
    "attn_out": "encoderblock_{layer}/Dropout_0",
    "mlp.pre": "encoderblock_{layer}/wi",
    "mlp_out": "encoderblock_{layer}/mlp",
    "resid_post": "encoderblock_{layer}",
    "logits": "output",
}


@functools.cache
def language_model():
    net = LanguageModel()
    variables = net.init(jax.random.key(1), TOKENS)
    return adapt_linen(net, variables, TOKENS, names=NAMES, methods=("__call__", "attend")), net, variables


def test_our_names_on_a_transformer_hold_what_they_say():
    model, net, variables = language_model()
    table = model.site_table
    assert table.resolve("attn.q")[0].axes == ("layer", "batch", "pos", "head", "d_head")
    assert dict(table.sizes) == {"layer": 2, "d_model": 4, "head": 2, "d_head": 2, "d_mlp": 6, "d_vocab": 13}
    # numbered modules of one block are not layers, methods are sites of their own, and a name of ours is not taken
    assert {"encoderblock/LayerNorm_0", "encoderblock/LayerNorm_1", "embed.attend", "embed:out"} <= set(table.names)
    checked = mi.check_sites(model, TOKENS, deterministic=True)
    assert checked[:3] == [
        "resid_pre[l+1] == resid_post[l]",
        "resid_post == resid_pre + attn_out + mlp_out",
        "logits == output",
    ]
    np.testing.assert_array_equal(model(TOKENS), net.apply(variables, TOKENS))


def test_a_head_is_edited_and_other_heads_are_not():
    model, *_ = language_model()
    _, clean = mi.jit(mi.capture(model, "attn.q"))(TOKENS)
    edited = mi.intervene(model, mi.add("attn.q", 1.0, layer=1, head=-1, pos=2, unit=0))
    _, acts = mi.jit(mi.capture(edited, "attn.q"))(TOKENS)
    change = np.asarray(acts["attn.q"] - clean["attn.q"])
    expected = np.zeros_like(change)
    expected[1, :, 2, 1, 0] = 1
    np.testing.assert_allclose(change, expected, atol=TOLERANCE)


def test_options_and_randomness_of_the_foreign_model_are_passed_on():
    model, net, variables = language_model()
    rngs = {"dropout": jax.random.key(5)}
    found = mi.jit(mi.capture(model, "attn_out"))(TOKENS, deterministic=False, rngs=rngs)
    dropped = jax.jit(lambda v, t: net.apply(v, t, deterministic=False, rngs=rngs))(variables, TOKENS)
    np.testing.assert_allclose(found[0], dropped, atol=TOLERANCE)
    assert float(jnp.abs(found[0] - model(TOKENS)).max()) > 0.01
    out, acts = mi.capture(model, "attn_out")(TOKENS, output=False)
    assert out is None
    assert acts["attn_out"].shape == (2, 2, 5, 4)


@pytest.mark.parametrize("name", ["linen", "linen-remat", "linen-scan"])
def test_every_form_passes_the_conformance_suite(name):
    checked = mi.check_sites(form(name).adapted, X)
    assert {"resid_pre[l+1] == resid_post[l]", "earlier layers stay as they were"} <= set(checked)


class Recurrent(nn.Module):
    """Two GRU layers that scan over time, and one that is unrolled."""

    @nn.compact
    def __call__(self, x):
        for layer in range(2):
            x = jnp.asarray(nn.RNN(nn.GRUCell(4), name=f"rnn_{layer}")(x))
        cell, carry, out = nn.GRUCell(4, name="cell"), jnp.zeros((x.shape[0], 4)), []
        for step in range(3):
            carry, y = cell(carry, x[:, step])
            out.append(y)
        return jnp.stack(out, 1)


def test_a_gru_has_its_layers_and_its_unrolled_steps_as_sites():
    net = Recurrent()
    model = adapt_linen(net, net.init(jax.random.key(1), X), X, names={"hidden": "rnn_{layer}"})
    assert dict(model.site_table.sizes)["layer"] == 2
    checked = mi.check_sites(model, X)
    assert "earlier layers stay as they were" in checked
    # one body serves all steps in time, with the same parameters: no step can be told from another
    assert not [name for name in model.site_table.names if name.startswith("rnn") and "cell" in name]
    assert {"cell#0:1", "cell#2:1"} <= set(model.site_table.names)
    output, acts = mi.capture(mi.intervene(model, mi.ablate("cell#1:1")), "cell#1:1")(X)
    np.testing.assert_array_equal(output[:, 1], 0)
    np.testing.assert_array_equal(acts["cell#1:1"], 0)
    assert float(jnp.abs(output[:, 2]).max()) > 0


class Shared(nn.Module):
    """One block called three times."""

    block: type[nn.Module] = LinenBlock

    @nn.compact
    def __call__(self, x):
        block = self.block(name="block")
        for _ in range(3):
            x = block(x)
        return x


def test_calls_of_a_shared_module_are_layers():
    net = Shared()
    variables = net.init(jax.random.key(1), X)
    model = adapt_linen(net, variables, X, names={"resid_post": "block#{layer}", "resid_pre": "block#{layer}:in"})
    assert mi.check_sites(model, X)[0] == "resid_pre[l+1] == resid_post[l]"
    edited = mi.intervene(model, mi.ablate("resid_post", layer=1))
    once = {"params": variables["params"]["block"]}
    expected = jnp.asarray(LinenBlock().apply(once, jnp.zeros_like(X)))
    np.testing.assert_allclose(edited(X), expected, atol=TOLERANCE)


def test_calls_that_share_a_compiled_trace_are_no_sites():
    net = Shared(nn.jit(LinenBlock))
    model = adapt_linen(net, net.init(jax.random.key(1), X), X)
    assert model.site_table.names == ("input", "output")


def test_cached_traces_of_the_foreign_model_do_not_go_stale():
    class Jitted(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.jit(LinenPlain)(name="inside")(x)

    net = Jitted()
    model = adapt_linen(net, net.init(jax.random.key(1), X), X)
    site = "inside/block"
    clean = model(X)
    one, two = (model(X, taps=mi.intervene(model, mi.add(site, 1.0, layer=layer)).edits) for layer in (0, 2))
    np.testing.assert_allclose(two, clean + 1, atol=TOLERANCE)
    assert float(jnp.abs(one - two).max()) > 0.1
    np.testing.assert_array_equal(model(X), clean)


class Ensemble(nn.Module):
    """As many modules mapped over as there are layers."""

    @nn.compact
    def __call__(self, x):
        unmapped: Any = None
        split = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        many = nn.vmap(nn.Dense, in_axes=unmapped, axis_size=3, **split)
        return LinenPlain()(many(4, name="many")(x).mean(0))


def test_an_ensemble_is_no_stack_of_layers():
    net = Ensemble()
    variables = net.init(jax.random.key(1), X)
    model = adapt_linen(net, variables, X)
    assert not [name for name in model.site_table.names if name.startswith("many")]
    with pytest.raises(mi.SiteError, match="Ensemble has no site 'many'; it has LinenPlain_0/block:in, "):
        mi.capture(model, "many")
    np.testing.assert_array_equal(model(X), net.apply(variables, X))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            {"resid_post": "blok_{layer}"},
            r"no tensor of LinenPlain is called 'blok_\{layer\}' \(for site 'resid_post'\)",
        ),
        ({"a": "block_0/up", "b": "block_{layer}/up"}, r"'b'\) exists for \[1, 2\]: layers count from 0"),
        ({"a": ("block_{layer}/up", ("batch", "pos"))}, "given axes batch pos, but has shape"),
        (
            {"resid_post": "block_{layer}", "mlp_out": "block_{layer}/up"},
            "axis 'd_model' of LinenPlain has size 4, and 6",
        ),
    ],
)
def test_names_that_do_not_fit_are_refused(names, message):
    net = LinenPlain()
    with pytest.raises(mi.SiteError, match=message):
        adapt_linen(net, net.init(jax.random.key(1), X), X, names=names)


def test_a_call_that_does_not_compute_a_site_says_so():
    class Optional(nn.Module):
        @nn.compact
        def __call__(self, x, extra=True):
            y = nn.Dense(4, name="extra")(x)
            return y if extra else nn.Dense(4, name="other")(x)

    net = Optional()
    variables = net.init(jax.random.key(1), X, extra=False)
    model = adapt_linen(net, variables, X, extra=False)
    with pytest.raises(mi.SiteError, match="site 'other' of Optional is not computed by this call"):
        mi.capture(model, "other")(X, extra=True)
    with pytest.raises(mi.SiteError, match=r"the example of Optional had inputs of rank \(3,\), this call has \(2,\)"):
        mi.capture(model, "other")(X[0], extra=False)
