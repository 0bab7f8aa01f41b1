"""When can sparse codes be recovered at all? Bounds from the size of a dictionary and from its coherence.

The model is x = Σ_{j∈S} z_j d_j with n unit directions d_j in d dimensions, the rows of D, and s = |S|.

Sources: Donoho and Elad 2003; Tropp 2004, "Greed is good" (coherence and Babel function);
Wainwright 2009 (random designs); Donoho and Tanner 2009 (phase transition; here by the statistical
dimension of Amelunxen et al. 2014).
"""

import dataclasses
import math

import numpy as np
from jaxtyping import Float
from scipy.optimize import minimize_scalar

from mi_jax.core.errors import InputError
from mi_jax.decomposition.coherence import Coherence, welch_bound


@dataclasses.dataclass(frozen=True)
class RecoveryLadder:
    """The largest s at which recovery is sure, or succeeds on random dictionaries; from the strictest rung upwards.

    Attributes:
      coherence: every support, basis pursuit and OMP: s < (1 + 1/μ) / 2. None without a dictionary.
      babel: every support: μ₁(s) + μ₁(s − 1) < 1. None without a dictionary.
      one_step_worst_case: every support, a tied encoder with one threshold: z_min/z_max > s μ⁺ + (s − 1) μ⁻. None
        without a dictionary.
      welch: what coherence could certify at most, for any dictionary of this size.
      one_step: most supports, a tied encoder of a random dictionary.
      wainwright: most supports, l1 on a random dictionary: d > 2 s ln(n − s) + s + 1.
      donoho_tanner, donoho_tanner_nonnegative: most supports, l1 without noise, at the phase transition.
    """

    coherence: int | None
    babel: int | None
    one_step_worst_case: int | None
    welch: int
    one_step: int
    wainwright: int
    donoho_tanner: int
    donoho_tanner_nonnegative: int


def coherence_sparsity(mutual: float) -> float:
    """(1 + 1/μ) / 2: basis pursuit and OMP recover every support of fewer directions (Donoho and Elad 2003)."""
    return math.inf if mutual == 0 else 0.5 * (1 + 1 / mutual)


def babel_sparsity(babel: Float[np.ndarray, " order"]) -> int:
    """The largest s with μ₁(s) + μ₁(s − 1) < 1, among the orders that are given (Tropp 2004)."""
    ok = np.asarray(babel) + np.concatenate([[0.0], np.asarray(babel)[:-1]]) < 1
    return len(ok) if ok.all() else int(np.argmin(ok))


def one_step_worst_case(positive: float, negative: float, z_ratio: float = 1.0) -> int:
    """The largest s with z_min/z_max > s μ⁺ + (s − 1) μ⁻.

    Then one threshold on D x finds every support of s codes between z_min and z_max: directions outside S reach at
    most s μ⁺ z_max, those inside at least z_min − (s − 1) μ⁻ z_max.

    Args:
      z_ratio: z_min / z_max.
    """
    if positive <= 0 and negative <= 0:
        return 2**31 - 1
    s = (z_ratio + negative) / (positive + negative)
    # strict: at equality a direction outside ties with one inside
    return max(0, math.ceil(s - 1e-12) - 1)


def one_step_sparsity(d_model: int, n: int, z_ratio: float = 1.0) -> int:
    """The largest s with √(s/d)·√(2 ln(n − s)) + √((s − 1)/d)·√(2 ln s) ≤ z_ratio, for random directions.

    Args:
      z_ratio: z_min / √E[z²], 1 for equal amplitudes.
    """

    def interference(s):
        return math.sqrt(2 * s / d_model * math.log(n - s)) + math.sqrt(2 * (s - 1) / d_model * math.log(s))

    return _largest(lambda s: interference(s) <= z_ratio, n - 1)


def wainwright_sparsity(d_model: int, n: int) -> int:
    """The largest s with d ≥ 2 s ln(n − s) + s + 1."""
    return _largest(lambda s: 2 * s * math.log(n - s) + s + 1 <= d_model, n - 1)


def donoho_tanner_psi(rho: float, *, nonnegative: bool = False) -> float:
    """ψ(ρ) = inf_τ ρ(1 + τ²) + (1 − ρ)·c·[(1 + τ²)Q(τ) − τφ(τ)], c = 2, or 1 for codes that cannot be negative.

    l1 recovers most supports of s = ρ n iff d > n ψ(ρ).
    """

    def value(tau):
        density = math.exp(-tau * tau / 2) / math.sqrt(2 * math.pi)
        tail = (1 + tau * tau) * 0.5 * math.erfc(tau / math.sqrt(2)) - tau * density
        return rho * (1 + tau * tau) + (1 - rho) * (1 if nonnegative else 2) * tail

    found = minimize_scalar(value, bounds=(0, 40), method="bounded", options={"xatol": 1e-10})
    return float(value(found["x"]))  # type: ignore[index]


def donoho_tanner_sparsity(d_model: int, n: int, *, nonnegative: bool = False) -> float:
    """The s (not rounded) at which n ψ(s/n) = d; n where there are as many dimensions as directions."""
    if d_model >= n:
        return float(n)
    low, high = 0.0, float(d_model)
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (
            (middle, high) if n * donoho_tanner_psi(middle / n, nonnegative=nonnegative) < d_model else (low, middle)
        )
    return low


def recovery_ladder(
    d_model: int, n: int, coherence: Coherence | None = None, *, z_ratio: float = 1.0
) -> RecoveryLadder:
    """All bounds for n directions in d_model dimensions.

    Args:
      coherence: of the dictionary, for the rungs that hold for every support.
      z_ratio: smallest code over largest (or over the root mean square, for `one_step`).

    Raises:
      InputError: fewer than three directions.
    """
    if n < 3 or d_model < 1:
        raise InputError(f"a ladder needs d_model ≥ 1 and three or more directions, got d_model={d_model}, n={n}")
    welch = welch_bound(d_model, n)
    c = coherence
    return RecoveryLadder(
        coherence=None if c is None else min(n, _below(coherence_sparsity(c.mutual))),
        babel=None if c is None else babel_sparsity(c.babel),
        one_step_worst_case=None if c is None else min(n, one_step_worst_case(c.positive, c.negative, z_ratio)),
        welch=min(n, _below(coherence_sparsity(welch))),
        one_step=one_step_sparsity(d_model, n, z_ratio),
        wainwright=wainwright_sparsity(d_model, n),
        donoho_tanner=int(donoho_tanner_sparsity(d_model, n)),
        donoho_tanner_nonnegative=int(donoho_tanner_sparsity(d_model, n, nonnegative=True)),
    )


def _below(bound: float) -> int:
    return 2**31 - 1 if math.isinf(bound) else math.ceil(bound - 1e-12) - 1


def _largest(holds, limit: int) -> int:
    """The largest s ≤ limit for which a condition that can only be lost holds, 0 for none."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low
