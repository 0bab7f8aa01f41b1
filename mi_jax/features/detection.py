"""Is an explanation right? Detection: predict from the text alone where a latent fires, on text it was not made from.

The explanation is a rule over tokens that can be read: how often the latent fires at each token, and after each
token. Its prediction is the naive Bayes log-odds of the two. A rule cannot say what depends on more of the context, so
the score is a lower bound on how well a latent can be explained. The null gives a latent another latent's rule.
"""

import dataclasses
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import rankdata


@dataclasses.dataclass(frozen=True)
class TokenRule:
    """Log-odds of firing at a token and after a token, relative to the latent's base rate; 0 for tokens never seen."""

    here: Float[np.ndarray, " d_vocab"]
    after: Float[np.ndarray, " d_vocab"]

    def predict(self, tokens: Int[np.ndarray, "context pos"]) -> Float[np.ndarray, "context pos_minus_1"]:
        """Score of every position but the first."""
        return self.here[tokens[:, 1:]] + self.after[tokens[:, :-1]]

    def triggers(self, n: int) -> list[int]:
        """The n tokens at which the latent fires most readily."""
        return np.argsort(-self.here)[:n].tolist()


def fit_rule(
    tokens: Int[np.ndarray, "context pos"],
    fires: Bool[np.ndarray, "context pos"],
    *,
    d_vocab: int,
    prior_count: float = 2.0,
) -> TokenRule:
    """Counts firings per token and per preceding token, with `prior_count` pseudo-observations at the base rate."""
    fired = fires[:, 1:].ravel().astype(float)
    base = (fired.sum() + 1) / (len(fired) + 2)

    def log_odds(at: np.ndarray) -> np.ndarray:
        n = np.bincount(at, minlength=d_vocab)
        hits = np.bincount(at, weights=fired, minlength=d_vocab)
        p = np.clip((hits + prior_count * base) / (n + prior_count), 1e-6, 1 - 1e-6)
        return np.log(p / (1 - p)) - np.log(base / (1 - base))

    return TokenRule(log_odds(tokens[:, 1:].ravel()), log_odds(tokens[:, :-1].ravel()))


def auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Probability that a positive scores above a negative, ties counting half.

    Raises:
      ValueError: only one class is there.
    """
    labels = np.asarray(labels, bool).ravel()
    n_pos, n_neg = int(labels.sum()), int((~labels).sum())
    if not n_pos or not n_neg:
        raise ValueError(f"AUROC needs both classes, got {n_pos} positives and {n_neg} negatives")
    ranks = rankdata(np.asarray(scores).ravel())
    return float((ranks[labels].sum() - n_pos * (n_pos + 1) / 2) / (n_pos * n_neg))


def average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Σ (R_n − R_{n−1}) P_n over the distinct scores from the highest down; precision P, recall R.

    Chance gives the share of positives. An AUROC is high where a rare event is among the thousand highest scores of a
    million; its average precision is not.

    Raises:
      ValueError: no positive is there.
    """
    scores, labels = np.asarray(scores).ravel(), np.asarray(labels, bool).ravel()
    if not labels.any():
        raise ValueError("average precision needs a positive, got none")
    # equal scores are one threshold: their positives and negatives come together
    values, place = np.unique(-scores, return_inverse=True)
    hits = np.cumsum(np.bincount(place, labels, minlength=len(values)))
    precision = hits / np.cumsum(np.bincount(place, minlength=len(values)))
    return float((np.diff(hits, prepend=0.0) * precision).sum() / labels.sum())


@dataclasses.dataclass(frozen=True)
class Detection:
    """Held-out scores of each latent's own rule and of the others' rules; NaN where the latent fires too rarely.

    Attributes:
      own, other: AUROC, which chance puts at 0.5 and which is high for rare events that are hardly found.
      own_precision, other_precision: average precision.
      base_rate: the share of tokens on which the latent fires: the average precision of chance.
    """

    own: Float[np.ndarray, " latent"]
    other: Float[np.ndarray, " latent"]
    own_precision: Float[np.ndarray, " latent"]
    other_precision: Float[np.ndarray, " latent"]
    base_rate: Float[np.ndarray, " latent"]

    def summary(
        self, *, seed: int, n_boot: int = 2000, metric: Literal["auroc", "average_precision"] = "auroc"
    ) -> tuple[float, float, float, float]:
        """Mean, 95 % bootstrap interval over latents, and the mean null."""
        pair = (self.own, self.other) if metric == "auroc" else (self.own_precision, self.other_precision)
        own, other = (values[~np.isnan(values)] for values in pair)
        draws = np.random.default_rng(seed).choice(own, (n_boot, len(own))).mean(1)
        low, high = np.quantile(draws, [0.025, 0.975])
        return float(own.mean()), float(low), float(high), float(other.mean())


def detection(
    rules: list[TokenRule],
    tokens: Int[np.ndarray, "context pos"],
    fires: Bool[np.ndarray, "latent context pos"],
    *,
    min_firings: int = 5,
) -> Detection:
    """Scores every rule on held-out text, against its own latent and against all others."""
    own, other, own_precision, other_precision, base = np.full((5, len(rules)), np.nan)
    predictions = [rule.predict(tokens) for rule in rules]
    for i in range(len(rules)):
        labels = fires[i][:, 1:]
        if labels.sum() < min_firings or labels.all():
            continue
        others = [p for j, p in enumerate(predictions) if j != i]
        base[i] = labels.mean()
        own[i], own_precision[i] = auroc(predictions[i], labels), average_precision(predictions[i], labels)
        # a rule alone has no null
        if others:
            other[i] = np.mean([auroc(p, labels) for p in others])
            other_precision[i] = np.mean([average_precision(p, labels) for p in others])
    return Detection(own, other, own_precision, other_precision, base)
