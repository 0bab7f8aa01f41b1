"""TPP and SCR against ablations done one by one on the activations, and on dictionaries that separate or mix."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mi_jax.core.errors import InputError
from mi_jax.decomposition.evaluation import (
    Examples,
    one_vs_rest,
    spurious_correlation_removal,
    targeted_probe_perturbation,
)
from mi_jax.decomposition.evaluation.logistic import fit_probes
from tests.decomposition.evaluation.toy import Toy, aligned_toy, random_toy

KEY = jax.random.key(0)
D = 6


def classes(seed: int, n: int = 150) -> Examples:
    """Three classes along the first three axes."""
    rng = np.random.default_rng(seed)
    number = rng.integers(0, 3, n)
    x = 0.2 * rng.normal(size=(n, D))
    x[np.arange(n), number] += 1
    return Examples(x.astype(np.float32), one_vs_rest(number))


def balanced_accuracy(logits, labels):
    right = (np.asarray(logits) > 0) == labels
    return 0.5 * (right[labels].mean() + right[~labels].mean())


def test_tpp_is_ablation_by_hand():
    train, test, toy = classes(0), classes(1), random_toy(0, D, 16)
    got = targeted_probe_perturbation(toy, train, test, key=KEY, n_values=(1, 4), null_draws=2, batch_size=64)
    probes = fit_probes(jnp.asarray(train.x), jnp.asarray(train.labels))
    weight, bias = np.asarray(probes.weight), np.asarray(probes.bias)
    codes, labels = np.asarray(toy.encode(jnp.asarray(train.x))), np.asarray(train.labels)
    test_codes, test_labels = np.asarray(toy.encode(jnp.asarray(test.x))), np.asarray(test.labels)
    w_dec, x = np.asarray(toy.w_dec), np.asarray(test.x)
    clean = [balanced_accuracy(x @ weight[c] + bias[c], test_labels[:, c]) for c in range(3)]
    np.testing.assert_allclose(got.clean_accuracy, clean, rtol=1e-6)
    for v, n in enumerate((1, 4)):
        falls = np.zeros((3, 3))
        for c in range(3):
            difference = codes[labels[:, c]].mean(0) - codes[~labels[:, c]].mean(0)
            effect = np.maximum(difference, 0) * (w_dec @ weight[c])
            chosen = np.argsort(-effect, kind="stable")[: min(n, (effect != 0).sum())]
            np.testing.assert_array_equal(got.latents[c, : len(chosen)], chosen)
            ablated = x - test_codes[:, chosen] @ w_dec[chosen]
            for other in range(3):
                accuracy = balanced_accuracy(ablated @ weight[other] + bias[other], test_labels[:, other])
                falls[c, other] = clean[other] - accuracy
        intended = np.trace(falls) / 3
        unintended = (falls.sum() - np.trace(falls)) / 6
        assert got.intended[v].value == pytest.approx(intended, abs=1e-5)
        assert got.unintended[v].value == pytest.approx(unintended, abs=1e-5)
        assert got.score[v].value == pytest.approx(intended - unintended, abs=1e-5)
        assert got.score[v].ci_low <= got.score[v].value <= got.score[v].ci_high


def test_tpp_rewards_latents_of_one_class():
    aligned = aligned_toy(np.eye(D))
    got = targeted_probe_perturbation(aligned, classes(0), classes(1), key=KEY, n_values=(1, 500))
    assert got.n_values == (1,)
    assert got.score[0].value > 0.4
    assert got.unintended[0].value < 0.05
    assert got.null[0].largest < got.score[0].value


def attributes(seed: int, n: int = 400) -> Examples:
    """Two independent attributes; the second is written larger, so a probe of both reads it."""
    rng = np.random.default_rng(seed)
    labels = rng.uniform(size=(n, 2)) < 0.5
    x = 0.3 * rng.normal(size=(n, D))
    x[:, 0] += labels[:, 0]
    x[:, 1] += 2.0 * labels[:, 1]
    return Examples(x.astype(np.float32), labels)


def test_scr_frees_the_probe_of_the_louder_attribute():
    train, test, toy = attributes(0), attributes(1), aligned_toy(np.eye(D))
    got = spurious_correlation_removal(toy, train, test, key=KEY, n_values=(1, 2))
    assert got.kept == 0
    agree = np.asarray(train.labels)[:, 0] == np.asarray(train.labels)[:, 1]
    x, labels = np.asarray(train.x), np.asarray(train.labels)
    biased = fit_probes(jnp.asarray(x[agree]), jnp.asarray(labels[agree, :1]))
    clean = fit_probes(jnp.asarray(x), jnp.asarray(labels))
    held, wanted = np.asarray(test.x), np.asarray(test.labels)[:, 0]
    original = balanced_accuracy(held @ np.asarray(biased.weight[0]) + float(biased.bias[0]), wanted)
    oracle = balanced_accuracy(held @ np.asarray(clean.weight[0]) + float(clean.bias[0]), wanted)
    # the latent of the second attribute is its coordinate, where that is positive
    ablated = held - np.maximum(held, 0) * (np.arange(D) == 1)[None, :]
    changed = balanced_accuracy(ablated @ np.asarray(biased.weight[0]) + float(biased.bias[0]), wanted)
    assert got.original_accuracy == pytest.approx(original)
    assert got.clean_accuracy == pytest.approx(oracle)
    assert got.changed_accuracy[0] == pytest.approx(changed)
    assert got.score[0].value == pytest.approx((changed - original) / (oracle - original), rel=1e-6)
    assert got.score[0].ci_low < got.score[0].value < got.score[0].ci_high


def test_scr_is_zero_where_a_clean_probe_is_no_better():
    # the second attribute is not written at all: neither probe can read it
    labels = np.tile([[False, False], [False, True], [True, False], [True, True]], (25, 1))
    x = np.zeros((100, D), np.float32)
    x[:, 0] = labels[:, 0]
    same = Examples(x, labels)
    got = spurious_correlation_removal(aligned_toy(np.eye(D)), same, same, key=KEY, n_values=(1,))
    assert (got.kept, got.clean_accuracy, got.original_accuracy) == (1, pytest.approx(0.5), pytest.approx(0.5))
    assert got.score[0].value == 0


def test_what_has_no_directions_or_no_classes_is_named():
    train, toy = classes(0), aligned_toy(np.eye(D))
    with pytest.raises(InputError, match="fixed decoder directions"):
        targeted_probe_perturbation(Headless(), train, train, key=KEY)
    one = dataclasses.replace(train, labels=np.asarray(train.labels)[:, :1])
    with pytest.raises(InputError, match="two or more"):
        targeted_probe_perturbation(toy, one, one, key=KEY, n_values=(1,))
    with pytest.raises(InputError, match="all four combinations"):
        spurious_correlation_removal(toy, train, train, key=KEY, n_values=(1,))
    with pytest.raises(InputError, match="from 1 to d_sae=6"):
        targeted_probe_perturbation(toy, train, train, key=KEY, n_values=(7,))


class Headless(Toy):
    def __init__(self):
        self.w_enc = self.b_enc = self.b_dec = jnp.zeros(1)
        self.w_dec = None
        self.n_sites = 1
