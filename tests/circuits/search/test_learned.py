"""Gates against their closed forms, and trained masks against the edges of a model that was built edge by edge."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mi_jax.circuits.search.gates import hard_concrete, hard_concrete_open, uniform_gradient
from mi_jax.circuits.search.learned import MaskTraining, learn_mask
from mi_jax.core.errors import InputError
from mi_jax.validation import load_organism
from tests.circuits.tiny_task import model, task


def test_hard_concrete_gates_are_open_as_often_as_the_formula_says(key):
    for logit in (-2.0, 0.0, 1.5):
        logits = jnp.full(20_000, logit)
        drawn = hard_concrete(logits, key=key)
        assert float((drawn > 0).mean()) == pytest.approx(float(hard_concrete_open(logits)[0]), abs=0.015)
        assert drawn.min() >= 0
        assert drawn.max() <= 1
    assert 0.1 < float(((drawn > 0) & (drawn < 1)).mean()) < 0.9


def test_uniform_gradient_sampling_has_the_gradient_of_the_expected_loss(key):
    """For one gate and a loss f, the expectation with P(gate = 1) = p has the slope p(1 − p)(f(1) − f(0))."""
    logits, p = jnp.full(60_000, 0.7), float(jax.nn.sigmoid(0.7))
    slope = jax.grad(lambda x: jnp.exp(uniform_gradient(x, key=key)).sum())(logits).mean()
    assert float(slope) == pytest.approx(p * (1 - p) * (np.e - 1), rel=0.02)
    drawn = uniform_gradient(logits, key=key)
    assert float(((drawn > 0) & (drawn < 1)).mean()) == pytest.approx(p * (1 - p), abs=0.01)


@pytest.mark.parametrize(
    "method", ["edge-pruning", *(pytest.param(m, marks=pytest.mark.slow) for m in ("subnetwork-probing", "ugs"))]
)
def test_the_edges_that_were_built_in_have_the_largest_logits(method):
    organism = load_organism()
    task = organism.tasks(16, key=jax.random.key(3))["induction"]
    built = organism.designed("induction")
    n = int(built.sum())
    found = learn_mask(
        organism.model,
        task,
        method=method,
        n_edges=n if method == "edge-pruning" else None,
        config=MaskTraining(steps=200),
        key=jax.random.key(0),
    )
    assert (found.mask(n) == built).all()
    assert (found.mask() & built).sum() == n
    assert found.mask().sum() < organism.graph.n_edges / 2
    assert found.kept[-1] < 0.3 < 0.8 < found.kept[0]
    assert found.losses.shape == (200,)
    # the median, because a draw that misses a built-in edge costs several nats
    assert np.median(found.losses[-20:]) < 0.1


def test_the_same_key_gives_the_same_mask_and_positions_have_gates_of_their_own(key):
    config = MaskTraining(steps=3, by_position=True, batch_size=1, samples=2)
    first, again = (learn_mask(model(), task(), method="ugs", config=config, key=key) for _ in range(2))
    np.testing.assert_array_equal(first.scores, again.scores)
    assert first.scores.shape == (*first.graph.edges.shape, task().clean.shape[1])
    assert np.isneginf(first.scores[~first.graph.edges]).all()
    assert first.mask(7).sum() == 7


def test_what_does_not_fit_is_named(key):
    with pytest.raises(InputError, match="edge-pruning needs n_edges"):
        learn_mask(model(), task(), key=key)
    with pytest.raises(InputError, match="the task has 2 prompts"):
        learn_mask(model(), task(), method="ugs", config=MaskTraining(batch_size=3), key=key)
    with pytest.raises(InputError, match="warmup is a share"):
        MaskTraining(warmup=0.0)
