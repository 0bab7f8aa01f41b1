"""The rate reaches its peak and falls to zero, and the numbers of a run are those that it was given."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mi_jax.core.errors import InputError
from mi_jax.decomposition import CrossLayerConfig, Objective, TrainConfig, architecture, fit, fit_cross_layer
from mi_jax.decomposition.training import default_knobs
from mi_jax.decomposition.training.config import rate

D, D_SAE = 6, 24
X = jax.random.normal(jax.random.key(0), (96, D))
TRAIN = TrainConfig(steps=6, batch_size=32, steps_per_call=3)


def closed_form(t, steps, warmup, decay):
    """Factors as they are said to be: a rise over `warmup`, 1, and a fall over the last `decay` steps to zero."""
    return np.minimum(np.minimum(t / warmup if warmup else 1.0, 1.0), (steps - t) / decay if decay else 1.0)


@pytest.mark.parametrize(
    ("steps", "warmup", "fraction", "decay"),
    [
        (100, 10, 0.5, 50),
        (100, 0, 1.0, 100),
        # the decay is what the warm-up leaves: it ended at 0.51
        (100, 50, 1.0, 50),
        (100, 60, 0.5, 40),
        (100, 99, 1.0, 1),
        (100, 10, 0.0, 0),
        (7, 3, 0.25, 2),
        (1, 0, 0.5, 0),
    ],
)
def test_rates_are_their_closed_form(steps, warmup, fraction, decay):
    schedule = rate(TrainConfig(steps=steps, warmup_steps=warmup, decay_fraction=fraction))
    found = np.array([schedule(t) for t in range(steps)])
    np.testing.assert_allclose(found, closed_form(np.arange(steps), steps, warmup, decay), atol=1e-6)
    assert found.max() == pytest.approx(1.0)
    if fraction:
        assert float(schedule(steps)) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("steps", [1, 4, 30, 199, 200, 1000])
def test_the_default_reaches_its_peak_however_few_the_steps(steps):
    train = TrainConfig(steps=steps)
    assert train.warmup == min(50, steps // 4)
    assert max(float(rate(train)(t)) for t in range(0, steps, max(1, steps // 200))) == pytest.approx(1.0, abs=0.05)


def test_schedules_that_contradict_themselves_are_refused():
    for options in ({"steps": 20, "warmup_steps": 50}, {"steps": 20, "warmup_steps": 20}, {"warmup_steps": -1}):
        with pytest.raises(InputError, match="the peak of the rate would never be reached"):
            TrainConfig(**options)
    with pytest.raises(InputError, match=r"decay_fraction=1\.5 is a fraction of the steps"):
        TrainConfig(decay_fraction=1.5)


def with_k(knobs, k):
    return eqx.tree_at(lambda n: n.k, knobs, jnp.int32(k))


@pytest.mark.parametrize("name", ["topk", "abstopk", "batchtopk", "switch", "matching_pursuit", "relu"])
def test_a_k_that_there_are_no_places_for_is_refused(name):
    config, objective = architecture(name, D, D_SAE, k=4, **({"n_experts": 4} if name == "switch" else {}))
    knobs = with_k(default_knobs(config, objective, TRAIN), 8)
    with pytest.raises(InputError, match=r"knobs\.k.*8.*k=4"):
        fit(X, config, objective, TRAIN, key=jax.random.key(0), knobs=knobs)


def test_a_k_below_one_is_refused_and_so_is_one_of_a_cross_layer_transcoder():
    config, objective = architecture("topk", D, D_SAE, k=4)
    knobs = default_knobs(config, objective, TRAIN)
    with pytest.raises(InputError, match=r"knobs\.k goes to 0"):
        fit(X, config, objective, TRAIN, key=jax.random.key(0), knobs=with_k(knobs, 0))
    y = X.reshape(-1, 2, D)
    with pytest.raises(InputError, match=r"knobs\.k=2, but a cross-layer transcoder has the configuration's k=4"):
        fit_cross_layer(
            y, y, CrossLayerConfig(D, D_SAE, 2, k=4), Objective(), TRAIN, key=jax.random.key(0), knobs=with_k(knobs, 2)
        )


def test_one_set_of_knobs_serves_several_trainings_and_k_is_what_is_trained():
    config, objective = architecture("topk", D, D_SAE, k=4, objective={"auxiliary": "none"})
    knobs = with_k(default_knobs(config, objective, TRAIN), 2)
    states = []

    def keep(state, _):
        states.append(jax.tree.map(jnp.copy, state))

    options = {"key": jax.random.key(0), "knobs": knobs}
    first, history = fit(X, config, objective, TRAIN, progress=keep, **options)
    again, _ = fit(X, config, objective, TRAIN, **options)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert first.k == 2
    assert history[-1]["l0"] <= 2
    assert int(knobs.k) == 2
    # a state has nothing of the knobs, and goes on with the same ones
    resumed, _ = fit(X, config, objective, TRAIN, state=states[0], **options)
    jax.tree.map(np.testing.assert_array_equal, resumed, first)
