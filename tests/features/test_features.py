"""Features against hand-made codes, a brute-force AUROC, and a real ablation."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mi_jax as mi
from mi_jax.core.errors import InputError
from mi_jax.decomposition import Dictionary
from mi_jax.decomposition.activations import TopK
from mi_jax.features import (
    Codes,
    auroc,
    average_precision,
    deciles,
    detection,
    encode_contexts,
    fit_rule,
    next_token_nll,
    removal_effects,
    token_effects,
)
from mi_jax.models import DecoderConfig, init_decoder
from mi_jax.models.config import PatchConfig


@pytest.fixture(scope="module")
def model():
    config = DecoderConfig(
        n_layers=2, d_model=16, n_heads=2, n_kv_heads=1, d_head=8, d_mlp=24, d_vocab=30, n_ctx=16, norm="none"
    )
    return init_decoder(config, key=jax.random.key(0))


@pytest.fixture(scope="module")
def sae():
    w = jax.random.normal(jax.random.key(1), (12, 16))
    w = w / jnp.linalg.norm(w, axis=1, keepdims=True)
    return Dictionary(w_enc=w, b_enc=jnp.zeros(12), w_dec=w, b_dec=jnp.zeros(16), activation=TopK(3))


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=30))
@settings(deadline=None)
def test_auroc_is_the_probability_of_the_right_order(rows):
    scores, labels = (np.array(column) for column in zip(*rows, strict=True))
    positive, negative = scores[labels], scores[~labels]
    if not len(positive) or not len(negative):
        with pytest.raises(ValueError, match="both classes"):
            auroc(scores, labels)
        return
    pairs = positive[:, None] - negative[None, :]
    assert auroc(scores, labels) == pytest.approx(((pairs > 0) + 0.5 * (pairs == 0)).mean())


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=30))
@settings(deadline=None)
def test_average_precision_is_its_sum_over_thresholds(rows):
    scores, labels = (np.array(column) for column in zip(*rows, strict=True))
    if not labels.any():
        with pytest.raises(ValueError, match="needs a positive"):
            average_precision(scores, labels)
        return
    want, recall = 0.0, 0.0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        found = scores >= threshold
        now = (found & labels).sum() / labels.sum()
        want, recall = want + (now - recall) * (found & labels).sum() / found.sum(), now
    assert average_precision(scores, labels) == pytest.approx(want)


def test_average_precision_sees_that_a_rare_event_is_hardly_found():
    # one of 200 in front of each of 5 events of 100,000: the AUROC hardly falls
    scores, labels = -np.arange(100_000.0), np.zeros(100_000, bool)
    labels[200:1200:200] = True
    assert auroc(scores, labels) > 0.99
    assert average_precision(scores, labels) < 0.01


def test_a_rule_finds_the_token_that_makes_a_latent_fire_and_not_another_latents():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 20, (400, 50))
    here, after = tokens == 7, np.roll(tokens, 1, 1) == 3
    after[:, 0] = False
    rules = [fit_rule(tokens[:200], fires[:200], d_vocab=20) for fires in (here, after)]
    assert rules[0].triggers(1) == [7]
    assert np.argmax(rules[1].after) == 3
    scores = detection(rules, tokens[200:], np.stack([here[200:], after[200:]]))
    np.testing.assert_allclose(scores.own, 1.0, atol=0.01)
    assert (np.abs(scores.other - 0.5) < 0.1).all()
    mean, low, high, null = scores.summary(seed=0)
    assert low <= mean <= high
    assert null == pytest.approx(scores.other.mean())
    np.testing.assert_allclose(scores.own_precision, 1.0, atol=0.1)
    np.testing.assert_allclose(scores.base_rate, 0.05, atol=0.01)
    assert (scores.other_precision < 0.15).all()
    mean, low, high, null = scores.summary(seed=0, metric="average_precision")
    assert low <= mean <= high
    assert null == pytest.approx(scores.other_precision.mean())


def test_a_latent_that_never_fires_is_not_scored():
    tokens = np.zeros((2, 8), np.int64)
    rule = fit_rule(tokens, tokens > 0, d_vocab=2)
    assert np.isnan(detection([rule], tokens, (tokens > 0)[None]).own[0])


def test_deciles_cover_the_range_and_show_the_place_they_name():
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 9, (10, 30))
    values = rng.random((10, 30, 1)).astype(np.float32) + 0.1
    values[:, 0] = 0
    codes = Codes(tokens, values, np.full((10, 30, 1), 4))
    activations = codes.activations(np.array([4]))[0]
    found = deciles(activations, codes, per_decile=3, window=5, seed=0)
    assert [d.decile for d in found] == list(range(1, 11))
    positive = activations[activations > 0]
    assert found[0].low == pytest.approx(positive.min())
    assert found[-1].high == pytest.approx(positive.max())
    assert all(a.high <= b.low for a, b in itertools.pairwise(found))
    for decile in found:
        assert len(decile.examples) == 3
        for example in decile.examples:
            assert decile.low - 1e-3 <= example.activations[example.focus] <= decile.high + 1e-3
            assert len(example.tokens) == len(example.activations)


def test_an_example_shows_as_many_tokens_after_its_focus_as_before():
    tokens = np.arange(20)[None, :]
    for pos, window in itertools.product(range(1, 20), (0, 1, 5, 30)):
        values = np.zeros((1, 20, 1), np.float32)
        values[0, pos] = 1
        codes = Codes(tokens, values, np.zeros((1, 20, 1), int))
        (decile,) = deciles(values[..., 0], codes, per_decile=1, window=window, seed=0)
        (example,) = decile.examples
        assert example.tokens == tuple(range(max(0, pos - window), min(20, pos + window + 1)))
        assert example.tokens[example.focus] == pos


def test_codes_are_dense_activations_without_position_0(sae):
    stream = np.asarray(jax.random.normal(jax.random.key(2), (3, 5, 16)))
    codes = encode_contexts(sae, stream, np.zeros((3, 5), np.int32))
    dense = np.moveaxis(np.array(sae.encode(jnp.asarray(stream))), -1, 0)
    dense[:, :, 0] = 0
    np.testing.assert_allclose(codes.activations(np.arange(12)), dense, rtol=1e-6)
    np.testing.assert_allclose(codes.density(12), (dense[:, :, 1:] > 0).mean((1, 2)))


def test_removal_effects_agree_with_taking_a_little_of_the_latent_out(model, sae):
    tokens = jax.random.randint(jax.random.key(3), (2, 9), 0, 30)
    layer = jnp.asarray(1, jnp.int32)
    stream = mi.jit(mi.capture(model, mi.at("resid_pre", layers=1)))(tokens, output=False)[1]["resid_pre"]
    effects = removal_effects(model, sae, stream, tokens, layer)
    codes = sae.encode(stream).at[:, 0].set(0.0)

    @jax.jit
    def loss(latent, share):
        x = stream - share * codes[..., latent][..., None] * sae.w_dec[latent][None, None, :]
        return next_token_nll(model.resume(x, layer), tokens)[:, 1:].mean()

    for latent in (int(i) for i in jnp.argsort(-jnp.abs(effects))[:3]):
        slope = (loss(latent, 1e-2) - loss(latent, -1e-2)) / 2e-2
        np.testing.assert_allclose(effects[latent], slope, rtol=2e-2, atol=1e-5)


def test_token_effects_are_the_logits_of_the_direction(model, sae):
    promotes, suppresses = token_effects(model, sae, 5, n=4)
    logits = np.asarray(model.embed @ sae.w_dec[5])
    order = np.argsort(logits - logits.mean())
    assert [t for t, _ in promotes] == order[::-1][:4].tolist()
    assert [t for t, _ in suppresses] == order[:4].tolist()
    np.testing.assert_allclose([v for _, v in suppresses], np.sort(logits - logits.mean())[:4], rtol=1e-5)


def test_token_effects_need_a_stream_that_one_norm_leads_to_the_logits_of_tokens(model, sae):
    images = {"patches": PatchConfig(4, 2), "n_ctx": 5, "positions": "none", "tied": False}
    for changed, message in (
        ({"head": "none"}, "is an encoder without an unembedding"),
        ({"norms": "post"}, "normalises the stream itself"),
        (images, "reads images: its outputs are classes"),
        ({"d_model": 8}, "the dictionary writes to 16 dimensions; the stream of decoder has 8"),
    ):
        with pytest.raises(InputError, match=message):
            token_effects(replace(model, config=replace(model.config, **changed)), sae, 0, n=2)
    for latent in (-1, 12):
        with pytest.raises(InputError, match=rf"has 12 latents \(0–11\); got {latent}"):
            token_effects(model, sae, latent, n=2)


def test_next_token_nll_of_uniform_logits_is_log_vocab():
    nll = next_token_nll(jnp.zeros((2, 5, 7)), jnp.zeros((2, 5), jnp.int32))
    np.testing.assert_allclose(nll, np.log(7), rtol=1e-6)
    assert nll.shape == (2, 4)
