"""BatchTopK's threshold: outside training a dictionary has the L0 that it was trained to, however it was trained."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mi_jax as mi
from mi_jax.data.activations import ActivationStream
from mi_jax.decomposition import TrainConfig, architecture, fit, fit_many
from mi_jax.decomposition.cross_layer_config import CrossLayerConfig
from mi_jax.decomposition.initial import unit_rows
from mi_jax.decomposition.training import Training, default_knobs, fit_stream
from mi_jax.decomposition.training.cross_layer import fit_cross_layer
from mi_jax.decomposition.training.end_to_end import fit_end_to_end
from mi_jax.decomposition.training.end_to_end_loss import EndToEnd
from mi_jax.decomposition.training.threshold import running
from tests.models.tiny import tiny

TOLERANCE = 0.02
N, D, D_SAE, K = 8192, 16, 64, 4
CONFIG, OBJECTIVE = architecture("batchtopk", D, D_SAE, k=K, objective={"auxiliary": "none"})


@pytest.fixture(scope="module")
def planted():
    k_direction, k_place, k_size = jax.random.split(jax.random.key(0), 3)
    directions = unit_rows(jax.random.normal(k_direction, (48, D)))
    places = jax.lax.top_k(jax.random.uniform(k_place, (N, 48)), K)[1]
    sizes = jax.random.uniform(k_size, (N, K), minval=0.5, maxval=1.5)
    return 30.0 * jnp.einsum("nk,nkd->nd", sizes, directions[places])


def l0(dictionary, x) -> float:
    return float((dictionary.encode(x) != 0).sum(-1).mean())


# (first k, part of the steps over which it falls); None: k from the start
SCHEDULES = {
    "constant": {},
    "falls early": {"k_start": 16, "part": 0.5},
    "falls to the end": {"k_start": 16, "part": 1},
}
QUICK = [(120, "constant"), (120, "falls to the end"), (300, "falls early")]


@pytest.mark.parametrize(
    ("steps", "schedule"),
    [pytest.param(n, s, marks=() if (n, s) in QUICK else pytest.mark.slow) for n in (120, 300, 976) for s in SCHEDULES],
)
def test_l0_outside_training_is_that_of_training(planted, steps, schedule):
    fields = dict(SCHEDULES[schedule])
    k_steps = int(steps * fields.pop("part", 0))
    train = TrainConfig(steps=steps, batch_size=256, k_steps=k_steps, **fields)
    dictionary, history = fit(planted, CONFIG, OBJECTIVE, train, key=jax.random.key(0))
    assert l0(dictionary, planted) == pytest.approx(K, rel=TOLERANCE)
    if schedule == "constant":
        assert history[-1]["l0"] == pytest.approx(K, rel=1e-3)


def test_several_with_their_own_k(planted):
    config, objective = architecture("batchtopk", D, D_SAE, k=6, objective={"auxiliary": "none"})
    train = TrainConfig(steps=60, batch_size=256, steps_per_call=60)
    knobs = default_knobs(config, objective, train)
    knobs = eqx.tree_at(lambda k: k.k, knobs, jnp.array([2, 6]))
    found, _ = fit_many(planted, config, objective, train, keys=jax.random.split(jax.random.key(0)), knobs=knobs)
    assert [l0(d, planted) for d in found] == pytest.approx([2, 6], rel=TOLERANCE)


def test_of_a_stream_and_of_a_resumed_model():
    model, width = tiny(), 8
    tokens = np.random.default_rng(0).integers(0, model.config.d_vocab, (96, 9)).astype(np.int32)
    config, objective = architecture("batchtopk", width, 32, k=3, objective={"auxiliary": "none"})
    train = TrainConfig(steps=30, batch_size=32, steps_per_call=30, massive_ratio=None)
    sites = [mi.at("resid_post", layers=1)]
    stream = ActivationStream(
        model, tokens, sites, key=jax.random.key(3), batch_size=32, buffer_size=128, contexts_per_chunk=8
    )
    found, _ = fit_stream(stream, {"sae": Training(config, objective, train, reads=("resid_post",))})
    rows = mi.jit(mi.capture(model, *sites))(tokens)[1]["resid_post"].reshape(96, 9, width)[:, 1:]
    assert l0(found["sae"], rows) == pytest.approx(3, rel=TOLERANCE)
    train = TrainConfig(steps=30, batch_size=8, steps_per_call=30, massive_ratio=None)
    end_to_end, _ = fit_end_to_end(
        model, tokens, config, EndToEnd(objective), train, site="resid_post", layer=1, key=jax.random.key(0)
    )
    assert l0(end_to_end, rows) == pytest.approx(3, rel=TOLERANCE)


def test_of_a_cross_layer_transcoder(planted):
    x = planted.reshape(-1, 2, D)
    config = CrossLayerConfig(D, D_SAE, 2, activation="batchtopk", k=K)
    train = TrainConfig(steps=60, batch_size=256, steps_per_call=60, decoder="free")
    transcoder, _ = fit_cross_layer(x, 2 * x, config, OBJECTIVE, train, key=jax.random.key(0))
    assert l0(transcoder, x) == pytest.approx(K, rel=TOLERANCE)


def test_the_running_mean_is_a_weighted_mean_from_the_first_step_on():
    seen, rate, mean = [3.0, 5.0, np.inf, 1.0], 0.1, jnp.zeros(())
    for step, smallest in enumerate(seen):
        mean = running(mean, jnp.float32(smallest), jnp.int32(step), rate)
        held = [(s, 0.9 ** (step - i)) for i, s in enumerate(seen[: step + 1]) if np.isfinite(s)]
        if len(held) == step + 1:
            np.testing.assert_allclose(mean, sum(s * w for s, w in held) / sum(w for _, w in held), rtol=1e-6)
    assert 1 < float(mean) < 5
