"""Google's `gemma` package, unchanged: a tiny random model, local and global attention, under `nn.jit`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mi_jax as mi
from mi_jax.models.adapters.linen import adapt_linen

pytestmark = [pytest.mark.reference, pytest.mark.filterwarnings("ignore")]
TOLERANCE = 1e-5
NAMES = {
    "resid_pre": "layer_{layer}:in",
    "attn.z": ("layer_{layer}/attn/attn_vec_einsum:in1", ("batch", "pos", "head", "d_head")),
    "attn_out": "layer_{layer}/post_attention_norm",
    "mlp_out": "layer_{layer}/post_ffw_norm",
    "resid_post": "layer_{layer}:1",
    "final_norm": "final_norm",
}


def test_gemma_passes_the_conformance_suite_and_a_head_can_be_patched():
    # the package relies on implicit promotion
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        gm = pytest.importorskip("gemma.gm")
        kinds = gm.nn.AttentionType
        config = gm.nn.config.TransformerConfig(
            num_embed=23,
            embed_dim=8,
            hidden_dim=12,
            num_heads=4,
            head_dim=6,
            num_kv_heads=2,
            final_logit_softcap=None,
            use_post_attn_norm=True,
            use_post_ffw_norm=True,
            attention_types=(kinds.LOCAL_SLIDING, kinds.GLOBAL, kinds.LOCAL_SLIDING),
            sliding_window_size=4,
        )
        net = gm.nn.Transformer(config=config, dtype=jnp.float32)
        tokens = jax.random.randint(jax.random.key(0), (2, 5), 1, 23, jnp.int32)
        variables = net.init(jax.random.key(1), tokens)
        # norms start at zero scale: random ones, so that none can be forgotten unseen
        variables = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), variables)
        model = adapt_linen(net, variables, tokens, names=NAMES)

        checked = mi.check_sites(model, tokens)
        assert checked[:2] == ["resid_pre[l+1] == resid_post[l]", "resid_post == resid_pre + attn_out + mlp_out"]
        assert "earlier layers stay as they were" in checked
        output, acts = mi.jit(mi.capture(model, "attn.z"))(tokens)
        plain = net.apply(variables, tokens).logits
        np.testing.assert_allclose(output.logits, plain, atol=TOLERANCE)

        edit = mi.patch("attn.z", acts["attn.z"][:, ::-1], layer=mi.each, head=mi.each, pos=3)
        swept = mi.jit(mi.sweep(model, edit, lambda out: out.logits.sum((0, 2))))(tokens)
        assert swept.shape == (3, 4, 5)
        # causal: an edit at position 3 changes nothing before it, and something from there on
        before = np.broadcast_to(plain.sum((0, 2))[:3], (3, 4, 3))
        np.testing.assert_allclose(swept[..., :3], before, atol=1e-3)
        assert float(jnp.abs(swept[..., 3] - plain.sum((0, 2))[3]).min()) > 1e-3
        single = mi.intervene(model, mi.patch("attn.z", acts["attn.z"][:, ::-1], layer=1, head=2, pos=3))
        np.testing.assert_allclose(swept[1, 2], mi.jit(single)(tokens).logits.sum((0, 2)), atol=1e-3)
