"""Directions and causal effects where they can be calculated, and a small model that is trained."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mi_jax.core.errors import InputError
from mi_jax.models import init_decoder
from mi_jax.validation.attribute_model import AttributeModel, AttributeModelConfig, learned, train_attribute_model
from mi_jax.validation.attribute_task import AttributeTaskConfig, attribute_task
from mi_jax.validation.attribute_truth import causal_effect, true_directions

CONFIG = AttributeModelConfig(
    AttributeTaskConfig(n_tokens=60, n_attributes=6, mean_attributes=1.2, n_roots=None, n_pos=8),
    d_model=32,
    n_heads=2,
    d_mlp=64,
    steps=600,
    batch_size=64,
    learning_rate=1e-2,
)


@pytest.fixture(scope="module")
def planted():
    """A model without layers whose stream is a known sum of attributes, and which reads them as the rule does.

    It knows nothing of earlier tokens.
    """
    task = attribute_task(CONFIG.task, key=jax.random.key(0))
    directions = jax.random.normal(jax.random.key(1), (6, 32))
    offset = jnp.linspace(-1.0, 1.0, 32)
    model = init_decoder(dataclasses.replace(CONFIG.decoder, norm="none"), key=jax.random.key(2))
    # attribute b of the current token speaks for the attribute a with now[a] = b
    unembed = CONFIG.task.strength * task.attributes @ jnp.linalg.pinv(directions).T[task.now]
    assert model.blocks.mlp is not None
    model = eqx.tree_at(
        lambda m: (m.embed, m.unembed, m.blocks.attn.o, m.blocks.mlp.down),
        model,
        (
            task.attributes @ directions + offset[None, :],
            unembed,
            jnp.zeros_like(model.blocks.attn.o),
            jnp.zeros_like(model.blocks.mlp.down),
        ),
    )
    return AttributeModel(task, model, np.zeros(0)), directions, offset


@pytest.fixture(scope="module")
def tokens(planted):
    return planted[0].task.sequences(600, key=jax.random.key(3))


def test_directions_are_found_exactly_where_the_stream_is_a_sum_of_attributes(planted, tokens, key):
    model, directions, offset = planted
    truth = true_directions(model, tokens, key=key)
    np.testing.assert_allclose(truth.directions[:6], directions, atol=1e-3)
    np.testing.assert_allclose(truth.directions[6:], 0, atol=1e-3)
    np.testing.assert_allclose(truth.offset, offset, atol=1e-3)
    assert truth.explained > 1 - 1e-5
    assert truth.readout[:6].min() > 1 - 1e-4
    # attributes of the last token are not in the stream; they only go together with those of this one
    assert truth.readout[6:].max() < 0.3
    assert truth.explained_null < 0.5
    assert truth.readout_null.max() < 0.7
    features = np.asarray(model.task.features(tokens))[:, 2:]
    np.testing.assert_allclose(truth.frequencies, features.mean((0, 1)), rtol=1e-5)
    x, f = np.asarray(model.activations(tokens)[0])[:300].reshape(-1, 32), features[:300].reshape(-1, 12)
    difference = x[f[:, 2] == 1].mean(0) - x[f[:, 2] == 0].mean(0)
    cosine = difference @ np.asarray(directions[2]) / np.linalg.norm(difference) / np.linalg.norm(directions[2])
    np.testing.assert_allclose(truth.mean_difference_cosine[2], cosine, rtol=1e-3)


def test_the_effect_of_a_flip_is_the_share_of_the_rule_that_the_model_knows(planted, tokens):
    model, directions, _ = planted
    task, pos = model.task, CONFIG.task.n_pos // 2
    rows = np.concatenate([directions, np.zeros((6, 32))]).astype(np.float32)
    effect = causal_effect(model, rows, tokens)
    # the rule turns the sign around where the other attribute is there two tokens back; the model does not know
    two_back = np.asarray(task.attributes[tokens[:, pos - 2]])
    for a, b in enumerate(np.asarray(task.now)):
        there = two_back[:, task.before[a]].mean()
        np.testing.assert_allclose(effect.slope[b], 1 - 2 * there, atol=1e-3)
    np.testing.assert_allclose(effect.slope[6:], 0, atol=1e-4)
    # along another attribute's direction nothing of the feature's own effect is left
    np.testing.assert_allclose(effect.slope_null, 0, atol=1e-3)
    assert effect.correlation > 0.35 > 0.1 > abs(effect.correlation_null)


def test_the_loss_is_beside_the_entropy_and_the_frequencies(planted, tokens):
    model = planted[0]
    scores = learned(model, tokens)
    following = np.asarray(tokens)[:, 3:]
    best = np.asarray(model.task.log_probabilities(tokens))[:, 2:-1]
    logits = np.asarray(model.model(tokens), np.float64)[:, 2:-1]
    ours = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for value, log_p in ((scores.best, best), (scores.loss, ours)):
        by_hand = [log_p[i, t, token] for i, row in enumerate(following) for t, token in enumerate(row)]
        np.testing.assert_allclose(value, -np.mean(by_hand), rtol=1e-4)
    np.testing.assert_allclose(scores.share, (scores.unigram - scores.loss) / (scores.unigram - scores.best))


def test_what_gives_no_directions_is_refused(planted, tokens, key):
    with pytest.raises(InputError, match=r"4 sequences are too few: in one half of them, some attribute never occurs"):
        true_directions(planted[0], tokens[:4], key=key)
    with pytest.raises(InputError, match=r"a multiple of twice n_heads.*got d_model=30, n_heads=4"):
        AttributeModelConfig(d_model=30)


@pytest.mark.slow
def test_a_trained_model_carries_the_attributes_of_two_tokens_and_uses_them(key):
    trained = train_attribute_model(CONFIG, key=key)
    tokens = trained.task.sequences(600, key=jax.random.key(4))
    assert trained.losses.shape == (CONFIG.steps,)
    assert learned(trained, tokens).share > 0.8
    truth = true_directions(trained, tokens, key=key)
    assert truth.explained > 0.75 > 0.5 > truth.explained_null
    assert truth.readout.min() > 0.3
    assert np.median(truth.readout) > 0.8
    effect = causal_effect(trained, truth.directions, tokens[:100])
    assert np.median(effect.slope[:6]) > 0.6
    assert np.median(effect.slope[6:]) > 0.3
    assert abs(np.median(effect.slope_null)) < 0.15
    assert effect.correlation > 0.7 > 0.2 > abs(effect.correlation_null)
