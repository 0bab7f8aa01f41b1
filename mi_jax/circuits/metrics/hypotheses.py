"""Tests of the hypothesis that a circuit explains a model, as statistics of scores that have been measured.

The five of Shi et al. 2024, "Hypothesis Testing the Circuit Hypothesis in LLMs", and a test of equivalence.

Scores are the task's metric on each prompt. The distance of a circuit from the model is the mean over prompts of
`|m_C − m_M|`; what is claimed about chance compares with random circuits of the same size, which are random paths from
the input to the logits as in the paper, or single edges (`draw` of `hypothesis_tests`).

Where this differs from the published code:
- Non-equivalence needs P(m_C > m_M); the code puts the mean difference of the scores in its place.
- Independence gives each variable a bandwidth of its own, the median distance among its values, and counts the observed
  order as one of the permutations, so that no p-value is 0; the code has one bandwidth, of distances across the two.
- Minimality corrects for the number of edges (Holm), and rejects one edge or none by the corrected p-values.
- Ties with random circuits count half. The code counts them for the circuit in one test and against it in another.
"""

import dataclasses

import numpy as np
import scipy.stats
from jaxtyping import Array, Float

from mi_jax.circuits.metrics.multiple import holm
from mi_jax.decomposition.evaluation.estimates import generator

ALPHA = 0.05


@dataclasses.dataclass(frozen=True)
class HypothesisTest:
    """A test and its outcome.

    Attributes:
      null: the null hypothesis, in words.
      compares: the numbers behind the statistic, in words.
      meaning: what follows from the decision.
    """

    name: str
    null: str
    compares: str
    statistic: float
    p_value: float
    alpha: float = ALPHA
    meaning: str = ""

    @property
    def rejects(self) -> bool:
        return self.p_value < self.alpha


def binomial(name: str, wins: float, n: int, quantile: float, alpha: float, null: str, compares: str, meaning: str):
    """P(at least so many wins of n), each won with probability `quantile`: the largest under H0: p ≤ quantile."""
    p = scipy.stats.binom.sf(np.floor(wins) - 1, n, quantile)
    return HypothesisTest(name, null, compares, wins / n, float(p), alpha, meaning)


def sufficiency_test(
    distance: float, random: Float[np.ndarray, " circuit"], *, quantile: float = 0.9, alpha: float = ALPHA
) -> HypothesisTest:
    """Is the circuit closer to the model than a fraction `quantile` of random circuits? Rejecting H0 says it is.

    Args:
      distance: of the circuit from the model.
      random: of random circuits of the same size from the model.
    """
    return binomial(
        "sufficiency",
        _wins(random - distance),
        len(random),
        quantile,
        alpha,
        f"the circuit is closer to the model than at most {quantile:g} of random circuits",
        "|m_C − m_M| of the circuit and of random circuits of its size",
        "rejected: sufficient beyond chance",
    )


def partial_necessity_test(
    distance: float, random: Float[np.ndarray, " circuit"], *, quantile: float = 0.9, alpha: float = ALPHA
) -> HypothesisTest:
    """Does ablating the circuit move the model further than ablating random circuits? Rejecting H0 says it does.

    Args:
      distance: of the model without the circuit from the model.
      random: of the model without random circuits of the same size.
    """
    return binomial(
        "partial necessity",
        _wins(distance - random),
        len(random),
        quantile,
        alpha,
        f"ablating the circuit moves the model further than ablating at most {quantile:g} of random circuits",
        "|m_(M∖C) − m_M| of the circuit and of random circuits of its size",
        "rejected: necessary beyond chance",
    )


def _wins(margin: np.ndarray) -> float:
    return float((margin > 0).sum() + 0.5 * (margin == 0).sum())


def non_equivalence_test(
    difference: Float[np.ndarray, " batch"], *, epsilon: float = 0.1, alpha: float = ALPHA
) -> HypothesisTest:
    """H0: `|P(m_C > m_M) − 1/2| ≤ ε`. Rejecting says that the circuit does better, or worse, than the model.

    Args:
      difference: m_C − m_M of every prompt; equal scores count half.
    """
    n, wins = len(difference), _wins(difference)
    far = abs(wins - n / 2)
    tails = scipy.stats.binom(n, 0.5 + epsilon)
    # both tails where the null is nearest to being false; by symmetry the same at 1/2 − ε
    p = tails.sf(np.ceil(n / 2 + far) - 1) + tails.cdf(np.floor(n / 2 - far)) if far else 1.0
    return HypothesisTest(
        "non-equivalence",
        f"the circuit outscores the model on {0.5 - epsilon:g} to {0.5 + epsilon:g} of prompts",
        "signs of m_C − m_M over prompts",
        wins / n,
        float(min(p, 1.0)),
        alpha,
        "rejected: not equivalent",
    )


def equivalence_test(
    difference: Float[np.ndarray, " batch"], *, epsilon: float = 0.1, alpha: float = ALPHA
) -> HypothesisTest:
    """H0: `|P(m_C > m_M) − 1/2| ≥ ε`, by two one-sided tests. Rejecting says that the circuit is equivalent.

    Failing to reject non-equivalence proves nothing; this test does.
    """
    n, wins = len(difference), _wins(difference)
    above = scipy.stats.binom.sf(np.floor(wins) - 1, n, 0.5 - epsilon)
    below = scipy.stats.binom.cdf(np.ceil(wins), n, 0.5 + epsilon)
    return HypothesisTest(
        "equivalence",
        f"the circuit outscores the model on fewer than {0.5 - epsilon:g} or more than {0.5 + epsilon:g} of prompts",
        "signs of m_C − m_M over prompts",
        wins / n,
        float(max(above, below)),
        alpha,
        "rejected: equivalent",
    )


def independence_test(
    a: Float[np.ndarray, " batch"],
    b: Float[np.ndarray, " batch"],
    *,
    key: Array,
    permutations: int = 1000,
    alpha: float = ALPHA,
) -> HypothesisTest:
    """H0: the scores of model and complement are independent, by permutations of the Hilbert–Schmidt criterion.

    `HSIC = tr(K H L H) / (n − 1)²` with Gaussian kernels (Gretton et al. 2007). Rejecting says that something of the
    task is left outside the circuit. A variable that is constant is independent of everything: p = 1.
    """
    first, second = (_centred_kernel(np.asarray(x, np.float64)) for x in (a, b))
    n = len(first)
    observed = (first * second).sum()
    rng = generator(key)
    drawn = np.empty(permutations)
    for i in range(permutations):
        order = rng.permutation(n)
        drawn[i] = (first * second[order][:, order]).sum()
    # rounding must not make the very same value look smaller than itself
    as_large = (drawn >= observed - 1e-12 * abs(observed)).sum()
    return HypothesisTest(
        "independence",
        "without the circuit, the scores say nothing about the model's",
        "HSIC of m_(M∖C) and m_M over prompts, and over permuted prompts",
        float(observed / (n - 1) ** 2),
        float((1 + as_large) / (1 + permutations)),
        alpha,
        "rejected: the complement still does part of the task",
    )


def _centred_kernel(x: np.ndarray) -> np.ndarray:
    distance = np.abs(x[:, None] - x[None, :])
    width = np.median(distance[np.triu_indices(len(x), 1)])
    kernel = np.exp(-0.5 * (distance / width) ** 2) if width > 0 else (distance == 0).astype(np.float64)
    return kernel - kernel.mean(0)[None, :] - kernel.mean(1)[:, None] + kernel.mean()


@dataclasses.dataclass(frozen=True)
class MinimalityTest:
    """The test of every edge.

    Attributes:
      names, p_values: of the edges; corrected for their number (Holm).
      overall: rejects where any edge does.
    """

    names: tuple[str, ...]
    quantiles: Float[np.ndarray, " edge"]
    p_values: Float[np.ndarray, " edge"]
    overall: HypothesisTest

    @property
    def superfluous(self) -> list[str]:
        return [n for n, p in zip(self.names, self.p_values, strict=True) if p < self.overall.alpha]


def minimality_test(
    names: tuple[str, ...],
    effects: Float[np.ndarray, " edge"],
    random: Float[np.ndarray, " circuit"],
    *,
    quantile: float = 0.9,
    alpha: float = ALPHA,
) -> MinimalityTest:
    """H0: every edge matters more than a fraction `quantile` of the edges that a random addition would bring.

    Rejecting for an edge says that it is no better than many a random edge: the circuit is not minimal. The smallest
    p-value that n random edges allow is `(1 − quantile)ⁿ` times the number of edges that are tested.

    Args:
      effects: `|m_(C∖e) − m_C|`, mean over prompts, for each edge e of the circuit.
      random: `|m_(C∪P) − m_(C∪P∖e′)|` for something random P, a path or an edge, and one edge e′ that it brings.
    """
    wins = np.array([_wins(e - random) for e in effects])
    raw = scipy.stats.binom.cdf(np.ceil(wins), len(random), quantile)
    p = holm(raw)
    weakest = int(np.argmin(p)) if len(p) else 0
    return MinimalityTest(
        names,
        wins / len(random),
        p,
        HypothesisTest(
            "minimality",
            f"every edge matters more than {quantile:g} of random edges",
            "effect of removing each edge, and of removing a random edge from the circuit with that edge added",
            float(wins[weakest] / len(random)),
            float(p[weakest]),
            alpha,
            "rejected: not minimal",
        ),
    )
