"""The probe is at its optimum, the pattern moves its score by one, streaming is offline, thresholds cover."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mi_jax.applications import Monitor, SetScore, conformal_threshold, fit_probe, lead, rate, roc, sequence_scores
from mi_jax.features import auroc

N, D = 600, 6


@pytest.fixture(scope="module")
def data():
    k_mix, k_x, k_y = jax.random.split(jax.random.key(0), 3)
    mix = jax.random.normal(k_mix, (D, D))
    labels = jax.random.bernoulli(k_y, 0.3, (N,))
    direction = mix[0]
    shift = 1.5 * labels.astype(jnp.float32)[:, None] * direction[None, :]
    x = jax.random.normal(k_x, (N, D)) @ mix + shift + 4.0
    return x, labels


@pytest.fixture(scope="module")
def probe(data):
    return fit_probe(*data)


def test_the_penalised_loss_has_no_slope_at_the_fit(data, probe):
    x, labels = (np.asarray(a, np.float64) for a in data)
    mean, scale = x.mean(0), x.std(0)
    z = (x - mean) / scale
    w = np.asarray(probe.weight, np.float64) * scale
    b = float(probe.bias) + float(np.asarray(probe.weight, np.float64) @ mean)
    residual = 1 / (1 + np.exp(-(z @ w + b))) - labels
    np.testing.assert_allclose(z.T @ residual / N + 1e-2 * w, 0, atol=1e-4)
    assert abs(residual.mean()) < 1e-4


def test_the_pattern_is_the_difference_of_the_class_means_per_unit_of_score(data, probe):
    x, labels = np.asarray(data[0], np.float64), np.asarray(data[1])
    difference = x[labels].mean(0) - x[~labels].mean(0)
    score = np.asarray(probe(data[0]), np.float64)
    expected = difference / (score[labels].mean() - score[~labels].mean())
    np.testing.assert_allclose(probe.pattern, expected, rtol=1e-3, atol=1e-4)


def test_moving_along_the_pattern_sets_the_score(data, probe):
    everywhere = SetScore(probe, jnp.asarray(-2.0), jnp.asarray(-jnp.inf), probe.pattern)(data[0])
    np.testing.assert_allclose(probe(everywhere), -2.0, atol=1e-3)
    some = SetScore(probe, jnp.asarray(-2.0), jnp.asarray(0.0), probe.pattern)(data[0])
    over = np.asarray(probe(data[0])) > 0
    assert 0 < over.sum() < N
    np.testing.assert_allclose(np.asarray(probe(some))[over], -2.0, atol=1e-3)
    np.testing.assert_array_equal(np.asarray(some)[~over], np.asarray(data[0])[~over])


def test_streaming_offline_and_a_loop_agree(probe):
    x = jax.random.normal(jax.random.key(3), (5, 9, D)) + 4.0
    monitor = Monitor(probe, jnp.asarray(0.5))
    offline = np.asarray(monitor.offline(x))
    np.testing.assert_allclose(jax.jit(Monitor.stream)(monitor, x), offline, atol=1e-5)
    state = monitor.start(5)
    for t in range(9):
        state, score = monitor.update(state, x[:, t])
        np.testing.assert_allclose(score, offline[:, t], atol=1e-5)
    np.testing.assert_array_equal(monitor.alarms(jnp.asarray(offline)), offline > 0.5)


def test_a_threshold_holds_its_rate_on_average():
    rng = np.random.default_rng(0)
    rates = [(rng.normal(size=400) > conformal_threshold(rng.normal(size=199), 0.05)).mean() for _ in range(400)]
    assert np.mean(rates) == pytest.approx(0.05, abs=0.005)


@pytest.mark.parametrize(("n", "alpha", "rank"), [(99, 0.01, 99), (199, 0.01, 198), (1000, 0.01, 991), (19, 0.05, 19)])
def test_the_threshold_is_the_conformal_rank(n, alpha, rank):
    assert conformal_threshold(np.arange(1, n + 1), alpha) == rank


def test_too_few_benign_sequences_are_refused():
    with pytest.raises(ValueError, match="needs 99 benign sequences, got 98"):
        conformal_threshold(np.zeros(98), 0.01)
    with pytest.raises(ValueError, match=r"must be in \(0, 1\), got 1"):
        conformal_threshold(np.zeros(98), 1.0)


def test_no_alarm_in_299_sequences_bounds_the_rate():
    seen = rate(np.zeros(299, bool))
    assert seen.value == 0
    # one-sided 97.5 %: 1 − 0.025^(1/299)
    assert seen.ci_high == pytest.approx(1 - 0.025 ** (1 / 299), rel=1e-6)


@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=2, max_size=40))
@settings(deadline=None)
def test_the_area_under_the_curve_is_auroc(rows):
    scores, labels = np.array([r[0] for r in rows], float), np.array([r[1] for r in rows])
    if labels.all() or not labels.any():
        return
    fpr, tpr = roc(scores, labels)
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)
    assert np.trapezoid(tpr, fpr) == pytest.approx(auroc(scores, labels))


def test_only_what_comes_before_the_event_counts():
    running = np.array([[0.0, 1.0, 5.0, 9.0], [0.0, 0.0, 0.0, 9.0]])
    np.testing.assert_array_equal(sequence_scores(running, np.array([3, 4])), [5.0, 9.0])
    found = lead(running > 4, np.array([3, 3]))
    # the second alarm comes with the event, which is too late
    assert found.values == (1,)
    assert found.median == 1.0
