"""The audit against a model in which the effect of a displacement can be written down."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mi_jax.applications import Probe, audit
from mi_jax.core.errors import InputError
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
    whole = found.whole
    expected = -(change[:, EVENT] - change.mean(1)).mean()
    assert whole.probe.effect == pytest.approx(expected, rel=1e-4)
    assert whole.probe.ci_low <= whole.probe.effect <= whole.probe.ci_high
    # logits are linear in the stream here
    for part in found.doses:
        assert part.probe.effect == pytest.approx(part.dose * expected, rel=1e-3)
    assert found.saturation == pytest.approx(0.5, rel=1e-3)

    def softmax(logits):
        p = np.exp(logits - logits.max(-1, keepdims=True))
        return p / p.sum(-1, keepdims=True)

    before, after = softmax(x @ unembed.T)[:, EVENT].mean(), softmax((x + moved) @ unembed.T)[:, EVENT].mean()
    np.testing.assert_allclose(whole.probe.probability, (before, after), rtol=1e-4)
    assert len({r.effect for r in whole.random}) == 3
    assert abs(whole.random_effect) < abs(whole.probe.effect)


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
    assert found.whole.probe.benign_kl == pytest.approx((np.exp(log_p) * (log_p - log_q)).sum(-1).mean(), rel=1e-3)


def test_random_directions_lie_where_activations_differ(model):
    """Activations that differ in one direction only leave no other one: the null is the probe's own direction."""
    embed = jnp.zeros((VOCAB, D)).at[:, 0].set(jnp.arange(VOCAB, dtype=jnp.float32)).at[:, 1].set(5.0)
    line = eqx.tree_at(lambda m: m.embed, model, embed)
    one = jnp.zeros(D).at[0].set(1.0)
    tokens = jax.random.randint(jax.random.key(3), (6, 5), 0, VOCAB)
    found = audit(
        line,
        Probe(one, jnp.asarray(0.0), one),
        site="resid_post",
        layer=0,
        triggered=tokens,
        predicted_at=jnp.full(6, 2, jnp.int32),
        event=EVENT,
        benign=tokens,
        target=0.0,
        key=jax.random.key(4),
        n_random=5,
    )
    for part in found.doses:
        np.testing.assert_allclose([abs(r.effect) for r in part.random], abs(part.probe.effect), rtol=1e-4, atol=1e-5)
    assert found.whole.p_value > 0.05


@pytest.mark.parametrize("doses", [(), (0.5,), (0.5, 0.5, 1.0), (0.0, 1.0)])
def test_doses_end_with_the_whole_step(model, doses):
    tokens = jnp.zeros((1, 2), jnp.int32)
    with pytest.raises(InputError, match="doses are ascending"):
        audit(
            model,
            Probe(jnp.ones(D), jnp.asarray(0.0), jnp.ones(D)),
            site="resid_post",
            layer=0,
            triggered=tokens,
            predicted_at=jnp.zeros(1, jnp.int32),
            event=EVENT,
            benign=tokens,
            target=0.0,
            key=jax.random.key(0),
            doses=doses,
        )
