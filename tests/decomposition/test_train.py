"""Training on data with known features; resuming and a mesh of 8 devices give the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mi_jax.core import sharding
from mi_jax.decomposition import train
from mi_jax.decomposition.baselines import fit_pca, fit_random_decoder
from mi_jax.decomposition.massive import massive
from mi_jax.decomposition.sae import SAEConfig, init, unit_rows
from mi_jax.decomposition.train import TrainConfig, fit, init_state, train_step

N, D_MODEL, D_SAE, K = 2048, 16, 32, 3
SAE_CONFIG = SAEConfig(d_model=D_MODEL, d_sae=D_SAE, k=K, k_aux=8)
CONFIG = TrainConfig(steps=200, batch_size=256, learning_rate=1e-2, warmup_steps=10, dead_after=20, steps_per_call=5)


@pytest.fixture(scope="module")
def planted():
    """Sums of 3 of 24 unit directions with positive coefficients, off the origin and in odd units."""
    k_direction, k_place, k_size = jax.random.split(jax.random.key(3), 3)
    directions = unit_rows(jax.random.normal(k_direction, (24, D_MODEL)))
    score = jax.random.uniform(k_place, (N, 24))
    active = score >= jax.lax.top_k(score, K)[0][:, -1:]
    codes = jnp.where(active, jax.random.uniform(k_size, (N, 24), minval=0.5, maxval=1.5), 0.0)
    return 40.0 * (codes @ directions) + 7.0, directions


def unexplained(model, x):
    return float(jnp.sum((x - model(x)) ** 2) / jnp.sum((x - x.mean(0)[None, :]) ** 2))


@pytest.fixture(scope="module")
def trained(planted):
    saved = []

    def save(state, metrics):
        saved.append((jax.tree.map(jnp.copy, state), metrics))

    before = train.train_steps._cache_size()
    sae, history = fit(planted[0], SAE_CONFIG, CONFIG, key=jax.random.key(0), progress=save)
    # calls of 5, 3 and 4 steps are one program
    assert train.train_steps._cache_size() == before + 1
    return sae, history, saved


def test_finds_planted_directions_and_beats_its_nulls(planted, trained):
    x, directions = planted
    sae, history, _ = trained
    np.testing.assert_allclose(jnp.linalg.norm(sae.w_dec, axis=1), 1, rtol=1e-5)
    random, _ = fit_random_decoder(x, SAE_CONFIG, CONFIG, key=jax.random.key(0))
    ours, null, pca = (unexplained(m, x) for m in (sae, random, fit_pca(x, K)))
    assert ours < 0.1
    assert null > 3 * ours
    assert pca > 3 * ours
    best = (directions @ sae.w_dec.T).max(1)
    assert float(jnp.median(best)) > 0.95
    assert history[-1]["step"] == CONFIG.steps
    assert history[-1]["l0"] <= K
    # the history is in units of the data's variance
    assert history[-1]["reconstruction"] == pytest.approx(ours, rel=0.2)


def test_random_decoder_is_never_trained(planted):
    config = TrainConfig(steps=4, batch_size=256, steps_per_call=2)
    drawn = init(SAE_CONFIG, key=jax.random.split(jax.random.key(5))[0])
    sae, _ = fit_random_decoder(planted[0], SAE_CONFIG, config, key=jax.random.key(5))
    np.testing.assert_array_equal(sae.w_dec, drawn.w_dec)
    assert jnp.abs(sae.w_enc - drawn.w_enc).max() > 1e-4


def test_resumes_to_the_same_numbers(planted, trained):
    sae, history, saved = trained
    state, metrics = saved[-4]
    assert metrics["step"] % (N // CONFIG.batch_size) != 0
    resumed, rest = fit(planted[0], SAE_CONFIG, CONFIG, key=jax.random.key(0), state=state)
    assert rest == history[-3:]
    jax.tree.map(np.testing.assert_array_equal, resumed, sae)


def test_one_step_alone_equals_one_of_many(planted, trained):
    x = planted[0] / 40
    sae = init(SAE_CONFIG, key=jax.random.key(1), mean=x.mean(0))
    static = {"sae_config": SAE_CONFIG, "config": CONFIG}
    alone, metrics = train_step(init_state(sae, CONFIG), x[: CONFIG.batch_size], **static)
    one, int_one = jnp.ones(()), jnp.ones((), jnp.int32)
    looped, means = train.train_steps(init_state(sae, CONFIG), x, jnp.arange(N), one, int_one, **static)
    for a, b in zip(jax.tree.leaves((alone, metrics)), jax.tree.leaves((looped, means)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_mesh_of_eight_equals_one_device(planted):
    mesh = sharding.make_mesh(data=2, fsdp=2, model=2)
    config = TrainConfig(steps=3, batch_size=8, steps_per_call=2)
    x = planted[0][:24] / 40
    (one, _), (many, _) = (fit(x, SAE_CONFIG, config, key=jax.random.key(0), mesh=m) for m in (None, mesh))
    assert not many.w_dec.sharding.is_fully_replicated
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_massive_activations_are_refused(planted):
    x = planted[0].at[7].multiply(1000.0)
    np.testing.assert_array_equal(jnp.flatnonzero(massive(x)), [7])
    with pytest.raises(ValueError, match="1 of 2048 activations have a norm over 10 times the median"):
        fit(x, SAE_CONFIG, CONFIG, key=jax.random.key(0))


def test_faults_are_named(planted):
    with pytest.raises(ValueError, match="d_model=16, the activations have width 15"):
        fit(planted[0][:, 1:], SAE_CONFIG, CONFIG, key=jax.random.key(0))
    with pytest.raises(ValueError, match="100 activations do not fill one batch of batch_size=256"):
        fit(planted[0][:100], SAE_CONFIG, CONFIG, key=jax.random.key(0))
    with pytest.raises(ValueError, match="n_components must be from 1 to d_model=16, got 17"):
        fit_pca(planted[0], 17)
