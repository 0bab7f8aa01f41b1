"""The audit against a model in which the effect of a displacement can be written down."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mi_jax.applications import Probe, audit
from mi_jax.models import DecoderConfig, init_decoder

D, VOCAB, EVENT = 8, 12, 5


@pytest.fixture(scope="module")
def model():
    config = DecoderConfig(
        n_layers=1, d_model=D, n_heads=1, n_kv_heads=1, d_head=8, d_mlp=0, d_vocab=VOCAB, n_ctx=8, norm="none"
    )
    model = init_decoder(config, key=jax.random.key(0))
    # without attention's output, logits are the embedding times its transpose
    return eqx.tree_at(lambda m: m.blocks.attn.o, model, jnp.zeros_like(model.blocks.attn.o))


def test_the_effect_is_the_displacement_through_the_unembedding(model):
    unembed = np.asarray(model.embed)
    weight = jnp.asarray(unembed[EVENT])
    pattern = weight / (weight @ weight)
    probe = Probe(weight, jnp.asarray(0.25), pattern)
    tokens = jax.random.randint(jax.random.key(1), (20, 6), 0, VOCAB)
    at = jnp.arange(20, dtype=jnp.int32) % 6
    found = audit(
        model,
        probe,
        site="resid_post",
        layer=0,
        triggered=tokens,
        predicted_at=at,
        event=EVENT,
        benign=tokens[:4],
        target=-1.0,
        key=jax.random.key(2),
        n_random=3,
    )
    x = unembed[np.asarray(tokens)[np.arange(20), np.asarray(at)]]
    moved = -(x @ np.asarray(weight) + 0.25 + 1.0)[:, None] * np.asarray(pattern)[None, :]
    change = moved @ unembed.T
    assert found.probe.effect == pytest.approx(-(change[:, EVENT] - change.mean(1)).mean(), rel=1e-4)
    assert found.probe.ci_low <= found.probe.effect <= found.probe.ci_high

    def softmax(logits):
        p = np.exp(logits - logits.max(-1, keepdims=True))
        return p / p.sum(-1, keepdims=True)

    before, after = softmax(x @ unembed.T)[:, EVENT].mean(), softmax((x + moved) @ unembed.T)[:, EVENT].mean()
    np.testing.assert_allclose(found.probe.probability, (before, after), rtol=1e-4)
    assert len({r.effect for r in found.random}) == 3
    assert abs(found.random_effect) < abs(found.probe.effect)


def test_the_benign_kl_is_that_of_the_edited_predictions(model):
    probe = Probe(jnp.zeros(D).at[0].set(1.0), jnp.asarray(0.0), jnp.zeros(D).at[0].set(1.0))
    tokens = jnp.arange(6, dtype=jnp.int32)[None, :]
    found = audit(
        model,
        probe,
        site="resid_post",
        layer=0,
        triggered=tokens,
        predicted_at=jnp.array([2], jnp.int32),
        event=EVENT,
        benign=tokens,
        target=0.0,
        key=jax.random.key(0),
        n_random=1,
    )
    unembed = np.asarray(model.embed, np.float64)
    x = unembed[:6]
    # the score is the first coordinate; it is set to zero
    edited = np.concatenate([np.zeros((6, 1)), x[:, 1:]], 1)
    log_p, log_q = (a - np.log(np.exp(a).sum(-1, keepdims=True)) for a in (x @ unembed.T, edited @ unembed.T))
    assert found.probe.benign_kl == pytest.approx((np.exp(log_p) * (log_p - log_q)).sum(-1).mean(), rel=1e-3)
