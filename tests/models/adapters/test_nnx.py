"""Flax NNX: the conformance suite, a copy that leaves the user's model alone, and attributes that stay reachable."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mi_jax as mi
from mi_jax.models.adapters.nnx import adapt_nnx
from tests.models.adapters.foreign import LAYERS, NNXBlock, X, form
from tests.models.tiny import prompts

TOLERANCE = 1e-5
TOKENS = prompts(3)


@pytest.mark.parametrize("name", ["nnx", "nnx-scan"])
def test_every_form_passes_the_conformance_suite(name):
    checked = mi.check_sites(form(name).adapted, X)
    assert {"resid_pre[l+1] == resid_post[l]", "earlier layers stay as they were"} <= set(checked)


class Block(nnx.Module):
    """Pre-norm attention and MLP as NNX's own modules are put together."""

    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(num_heads=2, in_features=4, decode=False, rngs=rngs)
        self.mlp = nnx.Sequential(nnx.Linear(4, 6, rngs=rngs), nnx.gelu, nnx.Linear(6, 4, rngs=rngs))

    def __call__(self, x, mask):
        x = x + self.attention(self.norm(x), mask=mask)
        return x + self.mlp(x)


class LanguageModel(nnx.Module):
    def __init__(self, rngs):
        self.embedding = nnx.Embed(13, 4, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])

    def __call__(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, nnx.make_causal_mask(tokens))
        # attributes and other methods of the modules are there as before
        assert isinstance(self.embedding, nnx.Embed)
        return self.embedding.attend(x) + self.embedding.embedding[...].sum()


NAMES = {
    "embed": "embedding",
    "resid_pre": "blocks/{layer}:in",
    "attn_out": "blocks/{layer}/attention",
    "mlp_out": "blocks/{layer}/mlp",
    "resid_post": "blocks/{layer}",
    "logits": "output",
}


def test_our_names_on_a_transformer_hold_what_they_say():
    net = LanguageModel(nnx.Rngs(1))
    model = adapt_nnx(net, TOKENS, names=NAMES)
    checked = mi.check_sites(model, TOKENS)
    assert checked[:4] == [
        "resid_pre[0] == embed",
        "resid_pre[l+1] == resid_post[l]",
        "resid_post == resid_pre + attn_out + mlp_out",
        "logits == output",
    ]
    np.testing.assert_array_equal(model(TOKENS), net(TOKENS))
    assert "blocks/mlp/layers/0" in model.site_table.names


def test_the_users_model_stays_as_it_was():
    net = LanguageModel(nnx.Rngs(1))
    before, structure = nnx.to_pure_dict(nnx.state(net)), nnx.graphdef(net)
    model = adapt_nnx(net, TOKENS, names=NAMES)
    mi.jit(mi.capture(mi.intervene(model, mi.ablate("mlp_out", layer=0)), "attn_out"))(TOKENS)
    assert type(net.blocks[0]) is Block
    assert nnx.graphdef(net) == structure
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(net)), before)


class Merged(nnx.Module):
    """A scan over the parameters by `jax.lax.scan`, which returns no state of the modules."""

    def __init__(self, rngs):
        self.blocks = nnx.vmap(NNXBlock, in_axes=0, out_axes=0)(rngs.split(LAYERS))

    def __call__(self, x):
        graph, state = nnx.split(self.blocks)
        return jax.lax.scan(lambda x, one: (nnx.merge(graph, one)(x), None), x, state)[0]


def test_a_scan_that_drops_the_modules_state_has_sites_too():
    merged = Merged(nnx.Rngs(1))
    model = adapt_nnx(merged, X, names={"resid_pre": "blocks:in", "mlp.pre": "blocks/up", "resid_post": "blocks"})
    expected = mi.jit(mi.capture(form("nnx-scan").adapted, "resid_pre", "mlp.pre", "resid_post"))(X)
    found = mi.jit(mi.capture(model, "resid_pre", "mlp.pre", "resid_post"))(X)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=TOLERANCE), found, expected)
    changed = mi.jit(mi.intervene(model, mi.add("mlp.pre", 1.0, layer=jnp.int32(1))))(X)
    same = mi.jit(mi.intervene(form("nnx-scan").adapted, mi.add("mlp.pre", 1.0, layer=1)))(X)
    np.testing.assert_allclose(changed, same, atol=TOLERANCE)
