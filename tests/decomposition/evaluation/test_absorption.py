"""Absorption formulas on cases worked out by hand, then on a dictionary that was built to absorb."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mi_jax.core.errors import InputError
from mi_jax.decomposition.evaluation import AbsorptionThresholds, Examples, feature_absorption
from mi_jax.decomposition.evaluation.absorption import absorption_scores, n_split
from tests.decomposition.evaluation.toy import Toy, aligned_toy

KEY = jax.random.key(0)


class Given(Toy):
    """Its codes are its input."""

    def encode(self, x):
        return x[..., : self.w_dec.shape[0]]


def scores(codes, cosines, total, main=(0,)):
    """Scores with codes and cosines given: latent j has direction cos_j u + sin_j v, and ⟨x, u⟩ is `total`."""
    cosines = np.asarray(cosines, np.float64)
    n = len(cosines)
    w_dec = np.zeros((n, n + 1), np.float32)
    w_dec[:, n] = cosines
    w_dec[np.arange(n), np.arange(n)] = np.sqrt(1 - cosines**2)
    toy = Given(*(jnp.zeros(s) for s in ((n, n + 1), (n,))), jnp.asarray(w_dec), jnp.zeros(n + 1))
    x = np.concatenate([np.asarray(codes, np.float64), [total]]).astype(np.float32)
    mask = np.isin(np.arange(n), main)
    direction = jnp.zeros(n + 1).at[n].set(3.0)
    fraction, full = absorption_scores(
        toy, toy.w_dec, jnp.asarray(x)[None], direction, jnp.asarray(mask), AbsorptionThresholds()
    )
    return float(fraction[0]), bool(full[0])


@pytest.mark.parametrize(
    ("codes", "cosines", "total", "want"),
    [
        # the main latent carries it all
        ((2.0, 1.0), (0.5, 0.5), 1.0, (0.0, False)),
        # silent, and one aligned latent carries half of the projection
        ((0.0, 1.0), (0.5, 0.5), 1.0, (1.0, True)),
        # silent, but the other carries too little
        ((0.0, 0.7), (0.5, 0.5), 1.0, (0.0, False)),
        # the main latent carries 0.25, the other 0.5: 0.5 / 0.75
        ((0.5, 1.0), (0.5, 0.5), 1.0, (2 / 3, False)),
        # no more than what is missing counts: min(0.9, 0.75) / (0.75 + 0.25)
        ((0.5, 1.8), (0.5, 0.5), 1.0, (0.75, False)),
        # aligned enough for full absorption, not for the fraction
        ((0.0, 10.0), (0.5, 0.05), 1.0, (0.0, True)),
        # aligned too little for both
        ((0.0, 50.0), (0.5, 0.02), 1.0, (0.0, False)),
        # three absorb together, none of them alone; the fourth is not needed
        ((0.0, 0.3, 0.3, 0.3, 0.3), (0.5,) * 5, 1.0, (1.0, False)),
        # three of 0.12 are not enough, though four would be
        ((0.0, 0.24, 0.24, 0.24, 0.24), (0.5,) * 5, 1.0, (0.0, False)),
        # the probe is not active
        ((0.0, 1.0), (0.5, 0.5), -1.0, (0.0, False)),
    ],
)
def test_cases_by_hand(codes, cosines, total, want):
    fraction, full = scores(codes, cosines, total)
    assert fraction == pytest.approx(want[0], rel=1e-5)
    assert full == want[1]


def test_splitting_stops_at_the_first_small_gain():
    assert n_split(np.array([0.5, 0.6, 0.62, 0.9])) == 2
    assert n_split(np.array([0.9, 0.91])) == 1
    assert n_split(np.array([0.1, 0.2, 0.3])) == 3


def words(seed: int, n: int = 300):
    """A concept along axis 0; a quarter of its examples are one word, along axis 1 too; the rest is another concept."""
    rng = np.random.default_rng(seed)
    concept = rng.uniform(size=n) < 0.5
    word = concept & (rng.uniform(size=n) < 0.25)
    x = 0.01 * rng.normal(size=(n, 4))
    x[:, 0] += concept
    x[:, 1] += word
    x[:, 2] += ~concept
    return Examples(x.astype(np.float32), np.stack([concept, ~concept], 1)), word


def test_an_absorbing_dictionary_is_told_from_an_honest_one():
    (train, _), (test, word) = words(0), words(1)
    honest = aligned_toy(np.eye(4), threshold=0.2)
    # the word's latent holds the concept's direction, and the concept's latent is silent on it
    enc = jnp.asarray([[1.0, -1.0, 0, 0], [0, 1.0, 0, 0], [0, 0, 1.0, 0], [0, 0, 0, 1.0]])
    dec = jnp.asarray([[1.0, 0, 0, 0], [1.0, 1.0, 0, 0], [0, 0, 1.0, 0], [0, 0, 0, 1.0]])
    absorbing = Toy(enc, jnp.full(4, -0.2), dec, jnp.zeros(4))
    thresholds = AbsorptionThresholds(max_k=1)
    good, bad = (feature_absorption(d, train, test, key=KEY, thresholds=thresholds) for d in (honest, absorbing))
    assert good.fraction.value == 0
    assert good.full_rate.value == 0
    share = word.sum() / np.asarray(test.labels)[:, 0].sum()
    assert bad.latents[0] == (0,)
    np.testing.assert_allclose(bad.full_rates, [share, 0], atol=1e-6)
    np.testing.assert_allclose(bad.fractions, [share, 0], atol=1e-6)
    assert bad.full_rate.value == pytest.approx(share / 2)
    assert bad.full_rate.ci_low < share / 2 < bad.full_rate.ci_high
    assert bad.splits == 0
    # with one more latent the word is a part of the concept, split and not absorbed
    split = feature_absorption(absorbing, train, test, key=KEY, thresholds=AbsorptionThresholds(max_k=2))
    assert set(split.latents[0]) == {0, 1}
    assert split.full_rates[0] == 0
    assert split.splits == 0.5


def test_token_axes_are_refused():
    one = words(0)[0]
    text = Examples(np.asarray(one.x)[:, None], one.labels)
    with pytest.raises(InputError, match="single activations"):
        feature_absorption(aligned_toy(np.eye(4)), text, text, key=KEY)
