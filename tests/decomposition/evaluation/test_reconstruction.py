"""Scores against numpy in float64, and batching, sites and refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mi_jax.core.errors import InputError
from mi_jax.decomposition.baselines import fit_pca
from mi_jax.decomposition.evaluation import Batch, evaluate
from mi_jax.decomposition.evaluation.density import DENSITY_EDGES, density_histogram
from mi_jax.decomposition.recovery import recovery_ladder
from tests.decomposition.evaluation.toy import Toy, random_toy

N, D = 90, 6


@pytest.fixture(scope="module")
def x():
    scale = np.array([4.0, 2.0, 1.0, 0.5, 0.25, 1.0])
    return (np.random.default_rng(0).normal(size=(N, D)) * scale[None, :] + 3.0).astype(np.float32)


BLOCKS = np.arange(N) // 9


def numpy_scores(y, guess, mean) -> dict[str, float]:
    y, guess, mean = (np.asarray(a, np.float64) for a in (y, guess, mean))
    e, yc, gc = y - guess, y - mean, guess - mean
    cosine = (yc * gc).sum(1) / np.linalg.norm(yc, axis=1) / np.linalg.norm(gc, axis=1)
    return {
        "fraction_variance_unexplained": (e**2).sum() / (yc**2).sum(),
        "explained_variance": 1 - e.var(0).sum() / y.var(0).sum(),
        "mean_squared_error": (e**2).mean(),
        "cosine": cosine.mean(),
        "l2_ratio": (np.linalg.norm(guess, axis=1) / np.linalg.norm(y, axis=1)).mean(),
        "relative_reconstruction_bias": (guess**2).sum() / (guess * y).sum(),
        "slope": (yc * gc).sum() / (yc**2).sum(),
    }


def check(got, want):
    for name, value in want.items():
        estimate = getattr(got, name)
        assert estimate.value == pytest.approx(value, rel=1e-4), name
        assert estimate.ci_low < estimate.value < estimate.ci_high, name


def test_scores_are_their_definitions_in_batches_of_any_size(x):
    toy, mean = random_toy(1, D, 12), x[:40].mean(0)
    got = evaluate(toy, x, mean=mean, blocks=BLOCKS, key=jax.random.key(2), batch_size=40)
    check(got, numpy_scores(x, toy(jnp.asarray(x)), mean))
    codes = np.asarray(toy.encode(jnp.asarray(x)))
    assert got.l0.value == pytest.approx((codes > 0).sum(1).mean())
    assert got.l0.ci_low < got.l0.value < got.l0.ci_high
    assert got.dead_fraction.value == pytest.approx((codes == 0).all(0).mean())
    assert got.dense_fraction.value == pytest.approx(((codes > 0).mean(0) > 0.1).mean())
    np.testing.assert_allclose(got.density, (codes > 0).mean(0), rtol=1e-6)
    assert got.density_histogram.sum() == (codes > 0).any(0).sum()
    assert (got.n_tokens, got.n_blocks) == (N, 10)
    assert got.dead_rate_bound == pytest.approx(1 - 0.05**0.1)
    assert got.coherence is not None
    assert got.coherence.n_directions == (codes > 0).any(0).sum()
    assert got.ladder == recovery_ladder(D, got.coherence.n_directions, got.coherence)

    streamed = [Batch(x[i : i + 31], BLOCKS[i : i + 31]) for i in range(0, N, 31)]
    again = evaluate(toy, streamed, mean=mean, key=jax.random.key(2), batch_size=16)
    assert again.fraction_variance_unexplained.ci_low == pytest.approx(got.fraction_variance_unexplained.ci_low, 1e-5)
    np.testing.assert_allclose(again.density, got.density)


def test_every_site_of_a_crosscoder_is_scored(x):
    toy, mean = random_toy(1, D, 12, n_sites=2), x.mean(0)
    got = evaluate(toy, x, mean=mean, blocks=BLOCKS, key=jax.random.key(2))
    guess = np.asarray(toy(jnp.asarray(x)))
    check(got, numpy_scores(x, guess, mean))
    assert len(got.sites) == 2
    for site, columns in zip(got.sites, (slice(0, 3), slice(3, 6)), strict=True):
        check(site, numpy_scores(x[:, columns], guess[:, columns], mean[columns]))


def test_a_transcoder_is_scored_on_its_targets(x):
    toy = random_toy(3, D, 9, 4)
    y = np.random.default_rng(5).normal(size=(N, 4)).astype(np.float32)
    got = evaluate(toy, x, targets=y, mean=y.mean(0), blocks=BLOCKS, key=jax.random.key(0))
    check(got, numpy_scores(y, toy(jnp.asarray(x)), y.mean(0)))


def test_pca_leaves_the_small_eigenvalues_and_its_scores_know_it_does_not_shrink(x):
    pca = fit_pca(jnp.asarray(x), 2)
    got = evaluate(pca, x, mean=x.mean(0), blocks=np.arange(N), key=jax.random.key(0))
    eigenvalues = np.linalg.eigvalsh(np.cov(x.T))
    want = eigenvalues[:4].sum() / eigenvalues.sum()
    assert got.fraction_variance_unexplained.value == pytest.approx(want, rel=1e-4)
    assert got.explained_variance.value == pytest.approx(1 - want, rel=1e-4)
    assert got.slope.value == pytest.approx(1 - want, rel=1e-4)
    # a projection is shorter, but it is the best multiple of itself
    assert got.relative_reconstruction_bias.value == pytest.approx(1, rel=1e-4)
    assert (got.l0.value, got.dead_fraction.value, got.coherence) == (2.0, 0.0, None)


def test_shrunken_reconstructions_are_seen(x):
    eye = jnp.eye(D)
    half = Toy(jnp.concatenate([eye, -eye]), jnp.zeros(2 * D), 0.5 * jnp.concatenate([eye, -eye]), jnp.zeros(D))
    got = evaluate(half, x, mean=np.zeros(D, np.float32), blocks=BLOCKS, key=jax.random.key(0))
    for name in ("l2_ratio", "relative_reconstruction_bias", "slope"):
        assert getattr(got, name).value == pytest.approx(0.5, rel=1e-5), name
    assert got.cosine.value == pytest.approx(1, rel=1e-5)
    assert got.fraction_variance_unexplained.value == pytest.approx(0.25, rel=1e-5)


def test_density_histogram_counts_the_living():
    density = np.array([0.0, 1e-7, 10**-2.4, 0.5, 1.0])
    counts = density_histogram(density)
    assert counts.sum() == 4
    assert (counts[0], counts[-1]) == (1, 1)
    assert counts[np.searchsorted(DENSITY_EDGES, -2.4) - 1] == 1


def test_what_cannot_be_scored_is_named(x):
    toy, options = random_toy(1, D, 12), {"mean": x.mean(0), "key": jax.random.key(0)}
    with pytest.raises(InputError, match=r"shape \(90,\), got \(89,\)"):
        evaluate(toy, x, blocks=np.arange(89), **options)
    with pytest.raises(InputError, match="pass it with the array"):
        evaluate(toy, x, **options)
    with pytest.raises(InputError, match="activations that are NaN or infinite, among tokens 0 to 89"):
        evaluate(toy, np.where(np.arange(N)[:, None] == 70, np.nan, x).astype(np.float32), blocks=BLOCKS, **options)
    broken = dataclasses.replace(toy, b_dec=jnp.full(D, jnp.inf))
    with pytest.raises(InputError, match="reconstructions that are NaN or infinite"):
        evaluate(broken, x, blocks=BLOCKS, **options)
    with pytest.raises(InputError, match="no activations"):
        evaluate(toy, [], **options)
    with pytest.raises(InputError, match="width 6, their mean 4"):
        evaluate(toy, x, blocks=BLOCKS, mean=np.zeros(4, np.float32), key=jax.random.key(0))


@pytest.mark.parametrize("factor", [1, 20, -40, 10**12])
def test_ids_of_blocks_mean_nothing(x, factor):
    toy, options = random_toy(1, D, 12), {"mean": x.mean(0), "key": jax.random.key(2)}
    want = evaluate(toy, x, blocks=BLOCKS, **options)
    got = evaluate(toy, x, blocks=BLOCKS.astype(np.int64) * factor, **options)
    for field in dataclasses.fields(want):
        a, b = (getattr(scores, field.name) for scores in (want, got))
        np.testing.assert_equal(repr(a), repr(b))


def test_massive_tokens_are_counted_and_warned_of(x):
    toy, options = random_toy(1, D, 12), {"mean": x.mean(0), "key": jax.random.key(2), "blocks": BLOCKS}
    assert evaluate(toy, x, **options).n_massive == 0
    massive = np.where(np.arange(N)[:, None] == 41, 100 * x, x)
    for data in ({"activations": massive}, {"activations": x, "targets": massive}):
        with pytest.warns(UserWarning, match="1 of 90 tokens have a norm over 10 times the median"):
            assert evaluate(toy, **data, **options).n_massive == 1
    assert evaluate(toy, massive, massive_ratio=None, **options).n_massive == 0
