"""The tuned lens on a model whose basis turns from layer to layer, where the right translators are known."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mi_jax as mi
from mi_jax.core.errors import InputError
from mi_jax.features.lens import logit_lens
from mi_jax.features.translators import (
    TunedLens,
    TunedLensConfig,
    evaluate_tuned_lens,
    fit_tuned_lens,
    identity_lens,
    load_tuned_lens,
    save_tuned_lens,
    tuned_lens,
)
from mi_jax.models import DecoderConfig, init_decoder
from mi_jax.models.mlp import MLP
from tests.models.tiny import prompts, tiny

LAYERS, WIDTH, VOCABULARY, ANGLE = 3, 6, 12, 0.3
CONFIG = TunedLensConfig(steps=120, batch_size=16, learning_rate=2e-2, steps_per_call=60)


@pytest.fixture(scope="module")
def turning():
    """Attention in the first layer, and in every layer an MLP that turns the stream: x + relu(Mx) − relu(−Mx) = Rx."""
    config = DecoderConfig(
        n_layers=LAYERS, d_model=WIDTH, n_heads=1, n_kv_heads=1, d_head=WIDTH, d_mlp=2 * WIDTH, d_vocab=VOCABULARY,
        n_ctx=8, norm="none", positions="none", activation="relu", gated=False, tied=False,
    )  # fmt: skip
    model = init_decoder(config, key=jax.random.key(0))
    turn = np.array([[np.cos(ANGLE), -np.sin(ANGLE)], [np.sin(ANGLE), np.cos(ANGLE)]])
    rotation = np.kron(np.eye(WIDTH // 2), turn).astype(np.float32)
    change = jnp.asarray(rotation - np.eye(WIDTH, dtype=np.float32))
    up = jnp.concatenate([change.T, -change.T], 1)
    down = jnp.concatenate([jnp.eye(WIDTH), -jnp.eye(WIDTH)])
    o = model.blocks.attn.o.at[1:].set(0.0)
    model = eqx.tree_at(
        lambda m: (m.blocks.mlp, m.blocks.attn.o, m.embed, m.unembed),
        model,
        (MLP(None, jnp.stack([up] * LAYERS), jnp.stack([down] * LAYERS)), o, 3 * model.embed, 3 * model.unembed),
    )
    power = [np.linalg.matrix_power(rotation, LAYERS - 1 - layer) for layer in range(LAYERS)]
    exact = jnp.stack([jnp.asarray(p.T - np.eye(WIDTH, dtype=np.float32)) for p in power])
    return model, TunedLens(exact, jnp.zeros((LAYERS, WIDTH)))


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(3), (64, 8), 0, VOCABULARY, jnp.int32)


@pytest.fixture(scope="module")
def fitted(turning, tokens):
    model, _ = turning
    lens, history = fit_tuned_lens(model, tokens[:40], None, CONFIG, key=jax.random.key(1))
    null, _ = fit_tuned_lens(model, tokens[:40], None, CONFIG, key=jax.random.key(1), shuffled_targets=True)
    return lens, null, history


def test_the_right_translators_read_the_output_at_every_layer(turning, tokens):
    model, exact = turning
    reading = mi.jit(tuned_lens(model, exact))(tokens[:8])
    np.testing.assert_allclose(reading.kl, 0.0, atol=1e-5)
    np.testing.assert_allclose(mi.jit(tuned_lens(model, exact, layers=(1,)))(tokens[:8]).kl, 0.0, atol=1e-5)
    assert float(mi.jit(logit_lens(model))(tokens[:8]).mean_kl()[0]) > 0.5


def test_on_held_out_text_it_beats_the_logit_lens_and_its_null_does_not(turning, tokens, fitted):
    model, _ = turning
    lens, null, history = fitted
    scores = evaluate_tuned_lens(model, lens, null, tokens[40:], key=jax.random.key(2), batch_size=24)
    plain = mi.jit(logit_lens(model))(tokens[40:]).mean_kl()
    np.testing.assert_allclose([e.value for e in scores.logit], plain, atol=1e-5)
    for layer in range(LAYERS - 1):
        assert scores.gain[layer].ci_low > 0
        assert scores.gain_null[layer].ci_high < 0
        assert scores.gain_over_null[layer].ci_low > 0
        assert scores.tuned[layer].ci_high < 0.1 * scores.logit[layer].ci_low
        assert scores.tuned[layer].ci_low <= scores.tuned[layer].value <= scores.tuned[layer].ci_high
    # what the null has learned is the average distribution
    final = jax.nn.log_softmax(mi.jit(model)(tokens[:40]))
    average = jnp.log(jnp.exp(final).mean((0, 1)))
    floor = float((jnp.exp(final) * (final - average[None, None])).sum(-1).mean())
    assert all(0.8 * floor < estimate.value < 1.5 * floor for estimate in scores.null[:-1])
    # the last layer is the output and stays as it is
    assert scores.tuned[-1].value == pytest.approx(0.0, abs=1e-6)
    assert float(jnp.abs(lens.weight[-1]).max()) == 0.0
    assert [h["step"] for h in history] == [60, 120]
    assert history[1]["kl"] < 0.5 * history[0]["kl"]


def test_without_training_it_is_the_logit_lens(tokens):
    model = tiny()
    plain = mi.jit(logit_lens(model))(prompts(0))
    tuned = mi.jit(tuned_lens(model, identity_lens(model)))(prompts(0))
    np.testing.assert_allclose(tuned.kl, plain.kl, atol=1e-6)


def test_the_first_step_of_adam_is_the_learning_rate_and_of_the_bias_in_units_of_the_stream():
    model, mask = tiny(), jnp.array([[True] * 5, [True] * 3 + [False] * 2])
    config = TunedLensConfig(steps=1, batch_size=2, learning_rate=1e-2)
    lens, _ = fit_tuned_lens(model, prompts(1), mask, config, key=jax.random.key(4))
    _, acts = mi.jit(mi.capture(model, "resid_post"))(prompts(1), mask)
    rms = np.sqrt((np.asarray(acts["resid_post"], np.float64) ** 2).mean(-1))[:, np.asarray(mask)]
    size = np.exp(np.log(rms).mean(-1))
    np.testing.assert_allclose(np.median(np.abs(lens.weight[:2]), (1, 2)), 1e-2, rtol=1e-3)
    np.testing.assert_allclose(np.median(np.abs(lens.bias[:2]), 1), 1e-2 * size[:2], rtol=1e-3)


def test_padding_is_not_trained_on_and_chunks_of_layers_change_nothing():
    mask = jnp.array([[True] * 5, [True] * 3 + [False] * 2])
    tokens = prompts(1)
    other = jnp.where(mask, tokens, 12 - tokens)
    config = TunedLensConfig(steps=3, batch_size=2, steps_per_call=3, learning_rate=1e-2)

    def fit(tokens, mask, config):
        return fit_tuned_lens(tiny(), tokens, mask, config, key=jax.random.key(4))[0]

    lens = fit(tokens, mask, config)
    assert float(jnp.abs(lens.weight[:2]).max()) > 1e-3
    # the eight real tokens come first
    chunked = dataclasses.replace(config, layers_at_once=1, tokens_per_step=8)
    for same in (fit(other, mask, config), fit(tokens, mask, chunked)):
        # Adam divides by the gradient's size, so a gradient of rounding size may differ by a step's worth
        np.testing.assert_allclose(same.weight, lens.weight, atol=1e-4)


def test_a_saved_lens_is_the_same_and_a_damaged_file_is_named(tmp_path, fitted):
    lens, path = fitted[0], tmp_path / "lens.safetensors"
    save_tuned_lens(lens, path)
    loaded = load_tuned_lens(path)
    assert loaded.site == lens.site
    np.testing.assert_array_equal(loaded.weight, lens.weight)
    np.testing.assert_array_equal(loaded.bias, lens.bias)
    with pytest.raises(
        mi.SiteError, match="llama-like has 3 layers of width 8; these translators are for 3 layers of width 6"
    ):
        tuned_lens(tiny(), loaded)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(InputError, match=r"lens\.safetensors is damaged or no safetensors file"):
        load_tuned_lens(path)
    with pytest.raises(InputError, match="no such file"):
        load_tuned_lens(tmp_path / "absent")


def test_what_cannot_be_trained_is_named():
    key = jax.random.key(0)
    with pytest.raises(mi.SiteError, match="mqa has one layer"):
        fit_tuned_lens(tiny("multi-query"), prompts(0), key=key)
    with pytest.raises(mi.SiteError, match="without edits of 'final_norm' and 'logits'"):
        fit_tuned_lens(mi.intervene(tiny(), mi.scale("logits", 2.0)), prompts(0), key=key)
    with pytest.raises(InputError, match="two or more real tokens"):
        fit_tuned_lens(tiny(), prompts(0), jnp.zeros((2, 5), bool), key=key)
    with pytest.raises(ValueError, match="steps must be positive, got 0"):
        TunedLensConfig(steps=0)
