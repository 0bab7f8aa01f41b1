"""The QK fix against one-at-a-time patching in float64, where attention is saturated and where everything is linear."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mi_jax as mi
from mi_jax.core.atp import key_effects, query_effects
from mi_jax.core.attribution import attribute
from mi_jax.core.errors import InputError
from mi_jax.models import init_decoder
from tests.models.tiny import CONFIGS, prompts, tiny

B, T, H, KV, D = 2, 6, 4, 2, 3
LOWEST = float(jnp.finfo(jnp.float32).min)


def softmax(x):
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


@pytest.fixture(params=[1.0, 12.0], ids=["soft", "saturated"])
def attention(request):
    """Queries, keys, masked scores and a gradient; at gain 12 the largest pattern entries round to 1."""
    keys = jax.random.split(jax.random.key(3), 5)
    gain = request.param
    q, q_source = (gain * jax.random.normal(k, (B, T, H, D)) for k in keys[:2])
    k, k_source = (jax.random.normal(k, (B, T, KV, D)) for k in keys[2:4])
    allowed = jnp.tril(jnp.ones((T, T), bool))[None] & (jnp.arange(T)[None, None, :] < jnp.array([6, 4])[:, None, None])
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, jnp.repeat(k, H // KV, 2)) * D**-0.5
    scores = jnp.where(allowed[:, None], scores, LOWEST)
    return q, k, q_source, k_source, scores, jax.random.normal(keys[4], scores.shape)


def one_at_a_time(q, k, q_source, k_source, scores, gradient):
    """Every query and every key replaced alone, the whole softmax computed anew, in float64."""
    q, k, q_source, k_source, scores, gradient = (
        np.asarray(x, np.float64) for x in (q, k, q_source, k_source, scores, gradient)
    )
    allowed, before = scores > LOWEST / 2, softmax(scores)

    def effect(q, k):
        new = np.einsum("bqhd,bkhd->bhqk", q, np.repeat(k, H // KV, 2)) * D**-0.5
        return ((softmax(np.where(allowed, new, LOWEST)) - before) * gradient).sum((2, 3))

    by_query, by_key = np.zeros((B, T, H)), np.zeros((B, T, KV))
    for t in range(T):
        for h in range(H):
            patched = q.copy()
            patched[:, t, h] = q_source[:, t, h]
            by_query[:, t, h] = effect(patched, k).sum(1)
        for h in range(KV):
            patched = k.copy()
            patched[:, t, h] = k_source[:, t, h]
            by_key[:, t, h] = effect(q, patched).sum(1)
    return by_query, by_key


def test_queries_and_keys_one_at_a_time(attention):
    q, k, q_source, k_source, scores, gradient = attention
    by_query, by_key = one_at_a_time(*attention)
    np.testing.assert_allclose(query_effects(q_source, k, scores, gradient), by_query, atol=2e-5)
    np.testing.assert_allclose(key_effects(q, k_source, scores, gradient), by_key, atol=2e-5)
    assert min(np.abs(by_query).max(), np.abs(by_key).max()) > 0.5


def test_a_leading_layer_axis_is_a_loop(attention):
    q, k, _, k_source, scores, gradient = attention
    stacked = [jnp.stack([x, x[::-1]]) for x in (q, k_source, scores, gradient)]
    both = jax.jit(key_effects)(*stacked)
    np.testing.assert_allclose(both[1], key_effects(*(x[1] for x in stacked)), atol=1e-6)
    assert np.isfinite(key_effects(q[:, :1], k[:, :1], scores[:, :, :1, :1], gradient[:, :, :1, :1])).all()


def last_layer_model(gain):
    """Attention only, no norm, one layer: the metric is linear in the pattern, so the QK fix is exact."""
    config = dataclasses.replace(CONFIGS["attention-only"], n_layers=1, n_kv_heads=2, positions="rotary")
    model = init_decoder(config, key=jax.random.key(1))
    attn = dataclasses.replace(model.blocks.attn, q=gain * model.blocks.attn.q)
    return dataclasses.replace(model, blocks=dataclasses.replace(model.blocks, attn=attn))


def metric(logits):
    return logits[:, -1, 3] - logits[:, -1, 5]


@pytest.mark.parametrize("gain", [3.0, 10_000.0])
def test_the_fix_is_exact_where_the_rest_is_linear(gain):
    sites, clean, corrupt = ("attn.q", "attn.k", "attn.v"), prompts(3), prompts(4)
    model = last_layer_model(gain)
    fixed, plain, exact = (
        mi.jit(attribute(model, metric, sites, method=m))(clean, corrupt) for m in ("atp+qk", "atp", "exact")
    )
    for site in sites:
        np.testing.assert_allclose(fixed[site], exact[site], atol=2e-5)
    assert np.abs(exact["attn.q"]).max() > 0.01
    if gain > 100:  # saturated: the gradient sees nothing
        assert np.abs(plain["attn.q"]).max() < 0.01 * np.abs(exact["attn.q"]).max()
    else:
        assert np.abs(plain["attn.q"] - exact["attn.q"]).max() > 1e-3


def test_scores_of_magnitude_are_checked_as_such():
    found = mi.jit(attribute(tiny(), metric, ("attn.q", "mlp_out"), method="atp*", check=25))(
        prompts(3), prompts(4), key=jax.random.key(1)
    )
    assert all(float(x.min()) >= 0 for x in found.values.values())
    assert found.check.sign_agreement is None
    assert found.check.rank_correlation.value > found.check.rank_correlation.null


def test_one_layer_has_none_to_drop():
    with pytest.raises(InputError, match=r"drops one layer at a time; toy has 1: use 'atp\+qk'"):
        attribute(last_layer_model(1.0), metric, "attn.q", method="atp*")(prompts(3), prompts(4))


def test_the_fix_follows_how_the_model_makes_scores():
    """Another scale, a soft cap and a window: still exact where the rest is linear."""
    model = last_layer_model(3.0)
    config = dataclasses.replace(model.config, attn_scale=0.9, score_softcap=1.5, windows=(3,))
    model, sites = dataclasses.replace(model, config=config), ("attn.q", "attn.k")
    fixed, exact = (
        mi.jit(attribute(model, metric, sites, method=m))(prompts(3), prompts(4)) for m in ("atp+qk", "exact")
    )
    for site in sites:
        np.testing.assert_allclose(fixed[site], exact[site], atol=2e-5)
        assert np.abs(exact[site]).max() > 0.01
