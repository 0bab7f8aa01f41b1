"""The probe is at its optimum, the pattern moves its score by one, streaming is offline, thresholds cover."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mi_jax.applications import (
    Monitor,
    SetScore,
    auroc_interval,
    conformal_threshold,
    fit_probe,
    lead,
    rate,
    roc,
    sequence_scores,
)
from mi_jax.core.errors import InputError
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
    everywhere = SetScore(probe, jnp.asarray(-2.0), jnp.asarray(-jnp.inf), probe.pattern, jnp.asarray(1.0))(data[0])
    np.testing.assert_allclose(probe(everywhere), -2.0, atol=1e-3)
    half = SetScore(probe, jnp.asarray(-2.0), jnp.asarray(-jnp.inf), probe.pattern, jnp.asarray(0.5))(data[0])
    np.testing.assert_allclose(probe(half), (np.asarray(probe(data[0])) - 2.0) / 2, atol=1e-3)
    some = SetScore(probe, jnp.asarray(-2.0), jnp.asarray(0.0), probe.pattern, jnp.asarray(1.0))(data[0])
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
    np.testing.assert_array_equal(sequence_scores(running, np.array([0, 1])), [-np.inf, 0.0])
    for end in (-1, 5):
        with pytest.raises(InputError, match="end at 0 to 4"):
            sequence_scores(running, np.array([end, 4]))
    found = lead(running > 4, np.array([3, 3]), np.array([1, 1]))
    # the second alarm comes with the event, which is too late
    assert found.values == (1,)
    assert found.median == 1.0


@given(st.data())
@settings(deadline=None)
def test_a_lead_lies_between_the_cause_and_the_event(data):
    n = data.draw(st.integers(2, 8))
    cause = data.draw(st.integers(0, n - 1))
    event = data.draw(st.integers(cause + 1, n))
    first = data.draw(st.integers(0, n))
    found = lead(np.arange(n)[None, :] >= first, np.array([event]), np.array([cause]))
    assert found.values == ((event - first,) if cause <= first < event else ())
    assert (found.premature, found.n) == (int(first < cause), 1)


def test_a_cause_comes_before_its_event():
    with pytest.raises(InputError, match="a cause comes before its event"):
        lead(np.zeros((1, 4), bool), np.array([2]), np.array([2]))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_threshold_that_would_never_alarm_is_refused(bad):
    scores = np.arange(200.0)
    scores[3] = bad
    with pytest.raises(InputError, match="1 of 200 benign scores are NaN or infinite"):
        conformal_threshold(scores, 0.01)


def test_a_score_that_is_not_a_number_raises_the_alarm(probe):
    x = jnp.ones((1, 5, D)).at[0, 2].set(jnp.nan)
    monitor = Monitor(probe, jnp.asarray(1e6))
    for running in (monitor.stream(x), monitor.offline(x)):
        np.testing.assert_array_equal(monitor.alarms(running)[0], [False, False, True, True, True])


def test_one_class_is_no_probe(data):
    x, labels = data
    for same in (jnp.ones_like(labels), jnp.zeros_like(labels)):
        with pytest.raises(InputError, match="tells two classes apart"):
            fit_probe(x, same)
    with pytest.raises(InputError, match="1 of 600 activations are not finite"):
        fit_probe(x.at[4, 2].set(jnp.nan), labels)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_fitted_and_read_in_float32(data, dtype):
    x, labels = data[0].astype(dtype), data[1]
    narrow, wide = fit_probe(x, labels), fit_probe(x.astype(jnp.float32), labels)
    assert narrow.weight.dtype == jnp.float32
    for a, b in zip(jax.tree.leaves(narrow), jax.tree.leaves(wide), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(narrow(x), wide(x.astype(jnp.float32)))
    monitor = Monitor(narrow, jnp.asarray(0.0))
    rows = x[:12].reshape(3, 4, D)
    np.testing.assert_allclose(monitor.stream(rows), monitor.offline(rows), atol=1e-5)
    edit = SetScore(narrow, jnp.asarray(-2.0), jnp.asarray(-jnp.inf), narrow.pattern, jnp.asarray(1.0))
    assert edit(x).dtype == dtype


def test_the_interval_of_separated_classes_is_not_a_point():
    for n in (5, 50, 500):
        scores, labels = np.arange(2 * n) * 1.0, np.arange(2 * n) >= n
        value, low, high = auroc_interval(scores, labels)
        assert (value, high) == (1.0, 1.0)
        # no more certain than all of n hits are about their rate, by Wilson
        assert low < 1 - 1e-9
        assert low == pytest.approx(1 - (stats.norm.ppf(0.975) ** 2) / n, abs=3 / n)
        value, low, high = auroc_interval(-scores, labels)
        assert (value, low) == (0.0, 0.0)
        assert high > 1e-9


@pytest.mark.parametrize("theta", [0.5, 0.8, 0.95, 0.995])
@pytest.mark.parametrize(("m", "n", "spread"), [(20, 20, 1.0), (60, 15, 0.5), (15, 60, 2.0), (30, 60, 2.0)])
def test_the_interval_covers(theta, m, n, spread):
    rng = np.random.default_rng(0)
    shift, labels = stats.norm.ppf(theta) * np.hypot(1, spread), np.arange(m + n) < m
    covered = 0
    for _ in range(200):
        scores = np.concatenate([rng.normal(shift, spread, m), rng.normal(0, 1, n)])
        _, low, high = auroc_interval(scores, labels)
        covered += low <= theta <= high
    # 95 % of 200, less three standard errors
    assert covered >= 180
