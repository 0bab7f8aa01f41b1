"""Bounds against published values and dense oracles, and against what recovery does on real dictionaries."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mi_jax.core.errors import InputError
from mi_jax.decomposition.coherence import coherence
from mi_jax.decomposition.evaluation.pursuit import orthogonal_matching_pursuit
from mi_jax.decomposition.recovery import (
    babel_sparsity,
    coherence_sparsity,
    donoho_tanner_psi,
    donoho_tanner_sparsity,
    one_step_worst_case,
    recovery_ladder,
)


def unit(seed: int, n: int, d: int) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(n, d))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("d", "n", "welch", "one_step", "wainwright", "transition", "nonnegative"),
    [(256, 2048, 9, 7, 15, 52, 67), (768, 16384, 14, 17, 37, 116, 142), (2304, 65536, 24, 41, 99, 324, 390)],
)
def test_the_ladder_of_common_sizes(d, n, welch, one_step, wainwright, transition, nonnegative):
    got = recovery_ladder(d, n)
    assert (got.welch, got.one_step, got.wainwright) == (welch, one_step, wainwright)
    assert (got.donoho_tanner, got.donoho_tanner_nonnegative) == (transition, nonnegative)
    assert got.coherence is None
    # the defining conditions hold at s and fail at s + 1
    s = got.wainwright
    assert 2 * s * math.log(n - s) + s + 1 <= d < 2 * (s + 1) * math.log(n - s - 1) + s + 2


@pytest.mark.parametrize(("delta", "signed", "nonnegative"), [(0.5, 0.385, 0.558), (0.1, 0.189, None)])
def test_the_transition_is_the_published_one(delta, signed, nonnegative):
    n = 10_000
    d = int(delta * n)
    assert donoho_tanner_sparsity(d, n) / d == pytest.approx(signed, abs=1.5e-3)
    if nonnegative is not None:
        assert donoho_tanner_sparsity(d, n, nonnegative=True) / d == pytest.approx(nonnegative, abs=1.5e-3)
    assert donoho_tanner_sparsity(n, n) == n


def test_psi_is_the_infimum_over_a_fine_grid():
    from scipy.stats import norm

    tau = np.linspace(0, 8, 20_001)
    for rho in (0.01, 0.2, 0.7):
        for c in (1, 2):
            tail = (1 + tau**2) * norm.sf(tau) - tau * norm.pdf(tau)
            want = (rho * (1 + tau**2) + (1 - rho) * c * tail).min()
            assert donoho_tanner_psi(rho, nonnegative=c == 1) == pytest.approx(want, rel=1e-6)


def test_rungs_of_a_frame_and_of_a_basis():
    simplex = coherence(np.eye(4) - 0.25)
    # four directions in three dimensions, every pair at −1/3
    assert simplex.mutual == pytest.approx(1 / 3, rel=1e-5)
    assert coherence_sparsity(1 / 3) == pytest.approx(2)
    assert babel_sparsity(np.array([1 / 3, 2 / 3, 1.0])) == 1
    ladder = recovery_ladder(3, 4, simplex)
    assert (ladder.coherence, ladder.babel) == (1, 1)
    # μ⁺ = 0, μ⁻ = 1/3: 1 > (s − 1) / 3
    assert ladder.one_step_worst_case == 3
    basis = recovery_ladder(5, 5, coherence(np.eye(5)))
    assert (basis.coherence, basis.one_step_worst_case, basis.welch) == (5, 5, 5)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), d=st.integers(6, 40), n=st.integers(4, 50), ratio=st.floats(0.2, 1.0))
def test_the_one_step_bound_is_never_violated(seed, d, n, ratio):
    rows = unit(seed, n, d)
    gram = rows @ rows.T - np.eye(n)
    positive, negative = max(gram.max(), 0), max(-gram.min(), 0)
    s = min(one_step_worst_case(positive, negative, ratio), n - 1)
    rng = np.random.default_rng(seed)
    for _ in range(20):
        support = rng.choice(n, s, replace=False)
        codes = rng.uniform(ratio, 1, size=s)
        h = rows @ (codes @ rows[support])
        outside = np.delete(h, support)
        assert s == 0 or h[support].min() > outside.max() - 1e-9


def test_the_one_step_bound_is_tight():
    # two directions in the support pull the third up and each other down as far as μ⁺ and μ⁻ allow
    positive, negative = 0.4, 0.3
    gram = np.array([[1, -negative, positive], [-negative, 1, positive], [positive, positive, 1]])
    rows = np.linalg.cholesky(gram)
    critical = 2 * positive + negative

    def margin(ratio):
        # both codes at the largest pull the outside one to 2 μ⁺; one at the smallest stands at ratio − μ⁻
        outside = (rows @ (rows[0] + rows[1]))[2]
        inside = (rows @ (ratio * rows[0] + rows[1]))[0]
        return inside - outside

    assert margin(1.0) < 0
    assert critical > 1
    assert one_step_worst_case(positive, negative, 1.0) == 1
    # with weaker interference s = 2 is allowed just as long as the condition says
    positive, negative = 0.2, 0.1
    gram = np.array([[1, -negative, positive], [-negative, 1, positive], [positive, positive, 1]])
    rows = np.linalg.cholesky(gram)
    for ratio, allowed in ((2 * positive + negative + 1e-6, 2), (2 * positive + negative - 1e-6, 1)):
        assert one_step_worst_case(positive, negative, ratio) == allowed
        assert (margin(ratio) > 0) == (allowed == 2)


def test_below_the_coherence_bound_pursuit_and_basis_pursuit_never_fail():
    optimize = pytest.importorskip("scipy.optimize")
    # two orthonormal bases, as incoherent as they can be: μ = 1/√d
    d = 64
    hadamard = np.array([[1.0]])
    for _ in range(6):
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    rows = np.concatenate([np.eye(d), hadamard / d**0.5])
    ladder = recovery_ladder(d, 2 * d, coherence(rows))
    assert ladder.coherence == 4
    rng = np.random.default_rng(0)
    supports = np.stack([rng.choice(2 * d, 4, replace=False) for _ in range(64)])
    codes = rng.choice([-1.0, 1.0], size=(64, 4)) * rng.uniform(0.1, 1, size=(64, 4))
    x = np.einsum("bk,bkd->bd", codes, rows[supports])
    found = orthogonal_matching_pursuit(jnp.asarray(rows, jnp.float32), jnp.asarray(x, jnp.float32), 4)
    values, indices = map(np.asarray, found)
    np.testing.assert_array_equal(np.sort(indices, 1), np.sort(supports, 1))
    np.testing.assert_allclose(values[0][np.argsort(indices[0])], codes[0][np.argsort(supports[0])], atol=1e-4)
    for target, support in zip(x[:5], supports[:5], strict=True):
        problem = optimize.linprog(np.ones(4 * d), A_eq=np.concatenate([rows, -rows]).T, b_eq=target)
        z = problem.x[: 2 * d] - problem.x[2 * d :]
        assert set(np.flatnonzero(np.abs(z) > 1e-6)) == set(support)


def test_sizes_without_a_ladder_are_refused():
    with pytest.raises(InputError, match="three or more directions"):
        recovery_ladder(4, 2)
