"""Probes on codes whose best latents are known; examples of several tokens; nulls."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mi_jax.core.errors import InputError
from mi_jax.decomposition.evaluation import Examples, one_vs_rest, sparse_probing
from mi_jax.decomposition.evaluation.pooling import class_means, codes_at, mean_activations
from mi_jax.decomposition.evaluation.sparse_probing import best_latents
from tests.decomposition.evaluation.toy import aligned_toy

D = 8
KEY = jax.random.key(0)
TOY = aligned_toy(np.eye(D))


def examples(seed: int, n: int = 120) -> Examples:
    """Concept 0 is coordinate 2; concept 1 is told by coordinates 5 and 6 together; the others are noise."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(0, 1, size=(n, D))
    labels = rng.uniform(size=(n, 2)) < 0.4
    x[:, 2] += 2 * labels[:, 0]
    x[:, 5] += 0.7 * labels[:, 1]
    x[:, 6] += 0.6 * labels[:, 1]
    return Examples(x.astype(np.float32), labels)


def test_the_latents_of_a_concept_are_found_and_tell_it():
    got = sparse_probing(TOY, examples(0), examples(1), key=KEY, ks=(1, 2), batch_size=50)
    assert got.latents[0, 0] == 2
    assert set(got.latents[1].tolist()) == {5, 6}
    assert got.per_concept[0, 0] == pytest.approx(1)
    assert got.per_concept[1, 1] > got.per_concept[0, 1] + 0.03
    for accuracy, null, row in zip(got.accuracy, got.null, got.per_concept, strict=True):
        assert accuracy.value == pytest.approx(row.mean())
        assert accuracy.ci_low <= accuracy.value <= accuracy.ci_high
        assert null.mean < accuracy.value - 0.1
    assert got.activations.value > 0.85


def test_accuracy_is_balanced():
    # one positive in ten: guessing "no" is right nine times, and half of the balanced accuracy
    rng = np.random.default_rng(0)
    noise = rng.uniform(size=(400, D)).astype(np.float32)
    labels = (np.arange(400) % 10 == 0)[:, None]
    got = sparse_probing(TOY, Examples(noise, labels), Examples(noise[::-1].copy(), labels), key=KEY, ks=(1,))
    assert got.accuracy[0].value == pytest.approx(0.5, abs=0.15)


def test_codes_are_pooled_over_real_tokens_only():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(7, 3, D)).astype(np.float32)
    mask = np.arange(3)[None, :] < np.array([3, 1, 2, 3, 2, 1, 3])[:, None]
    labels = np.arange(7)[:, None] % 2 == np.arange(2)[None, :]
    batch = Examples(x, labels, mask)
    codes = np.stack([np.maximum(row[m], 0).mean(0) for row, m in zip(x, mask, strict=True)])
    positive, negative = class_means(TOY, batch, 3)
    np.testing.assert_allclose(positive, [codes[::2].mean(0), codes[1::2].mean(0)], rtol=1e-5)
    np.testing.assert_allclose(negative, positive[::-1], rtol=1e-5)
    np.testing.assert_allclose(codes_at(TOY, batch, np.array([[3, 1]]), 3)[:, 0], codes[:, [3, 1]], rtol=1e-5)
    want = np.stack([row[m].mean(0) for row, m in zip(x, mask, strict=True)])
    np.testing.assert_allclose(mean_activations(batch, 4), want, rtol=1e-5, atol=1e-6)


def test_latents_that_speak_against_a_concept_count_unless_signed():
    difference = np.array([[0.1, -3.0, 2.0]])
    assert best_latents(difference, 2).tolist() == [[1, 2]]
    assert best_latents(difference, 2, signed=True).tolist() == [[2, 0]]
    with pytest.raises(InputError, match="from 1 to d_sae=3, got 4"):
        best_latents(difference, 4)


def test_examples_are_checked():
    x = jnp.zeros((4, D))
    with pytest.raises(InputError, match=r"with it are \[4, 2\]"):
        Examples(x, np.array([[True, True], [True, True], [True, False], [True, False]]))
    with pytest.raises(InputError, match="one row of labels each"):
        Examples(x, np.ones((3, 1), bool))
    np.testing.assert_array_equal(one_vs_rest(np.array([1, 0])), [[False, True], [True, False]])
