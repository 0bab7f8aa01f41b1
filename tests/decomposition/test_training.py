"""Training on data with known features; resuming, many at once and a mesh of 8 devices give the same numbers."""

import importlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mi_jax.core import sharding
from mi_jax.core.errors import InputError
from mi_jax.decomposition import (
    ARCHITECTURES,
    DictionaryConfig,
    Knobs,
    Objective,
    TrainConfig,
    architecture,
    fit,
    fit_many,
    init,
    train_step,
)
from mi_jax.decomposition.baselines import fit_pca, fit_random_decoder
from mi_jax.decomposition.initial import unit_rows
from mi_jax.decomposition.massive import massive
from mi_jax.decomposition.training import InMemory, default_knobs, init_state, train_steps
from mi_jax.decomposition.training.resample import resample

fit_module = importlib.import_module("mi_jax.decomposition.training.fit")
N, D_MODEL, D_SAE, K = 2048, 16, 32, 3
CONFIG, OBJECTIVE = architecture("topk", D_MODEL, D_SAE, k=K, objective={"k_aux": 8})
TRAIN = TrainConfig(
    steps=200, batch_size=256, learning_rate=1e-2, warmup_steps=10, dead_after=20 * 256, steps_per_call=5
)


@pytest.fixture(scope="module")
def planted():
    """Sums of 3 of 24 unit directions with positive coefficients, off the origin and in odd units."""
    k_direction, k_place, k_size = jax.random.split(jax.random.key(3), 3)
    directions = unit_rows(jax.random.normal(k_direction, (24, D_MODEL)))
    score = jax.random.uniform(k_place, (N, 24))
    active = score >= jax.lax.top_k(score, K)[0][:, -1:]
    codes = jnp.where(active, jax.random.uniform(k_size, (N, 24), minval=0.5, maxval=1.5), 0.0)
    return 40.0 * (codes @ directions) + 7.0, directions


def unexplained(model, x):
    return float(jnp.sum((x - model(x)) ** 2) / jnp.sum((x - x.mean(0)[None, :]) ** 2))


@pytest.fixture(scope="module")
def trained(planted):
    saved = []

    def save(state, metrics):
        saved.append((jax.tree.map(jnp.copy, state), metrics))

    before = train_steps._cache_size()
    sae, history = fit(planted[0], CONFIG, OBJECTIVE, TRAIN, key=jax.random.key(0), progress=save)
    # calls of 5, 3 and 4 steps are one program
    assert train_steps._cache_size() == before + 1
    return sae, history, saved


def test_finds_planted_directions_and_beats_its_nulls(planted, trained):
    x, directions = planted
    sae, history, _ = trained
    np.testing.assert_allclose(jnp.linalg.norm(sae.w_dec, axis=1), 1, rtol=1e-5)
    random, _ = fit_random_decoder(x, CONFIG, OBJECTIVE, TRAIN, key=jax.random.key(0))
    ours, null, pca = (unexplained(m, x) for m in (sae, random, fit_pca(x, K)))
    assert ours < 0.1
    assert null > 3 * ours
    assert pca > 3 * ours
    best = (directions @ sae.w_dec.T).max(1)
    assert float(jnp.median(best)) > 0.95
    assert history[-1]["step"] == TRAIN.steps
    assert history[-1]["l0"] <= K
    assert history[-1]["fvu"] == pytest.approx(ours, rel=0.2)


LEARNS = {
    # what each needs to be sparse on this data: λ and rate
    "relu": ({"sparsity": 1.0}, {}),
    "p_annealed": ({"sparsity": 1.0}, {}),
    "gated": ({"sparsity": 4.0}, {}),
    "jumprelu": ({"sparsity": 0.3}, {"threshold": 0.3, "bandwidth": 0.5}),
    "jumprelu_tanh": ({"sparsity": 0.5}, {"threshold": 0.3, "bandwidth": 0.5}),
    "jumprelu_quadratic": ({"sparsity": 1.0, "target_l0": 3.0}, {"threshold": 0.3, "bandwidth": 0.5}),
    # prefixes shorter than the number of features must hold mixtures of them
    "matryoshka": ({"prefixes": (24, 32)}, {}),
    "switch": ({}, {"n_experts": 2}),
}


QUICK = ("topk", "batchtopk", "jumprelu", "gated")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES]
)
def test_every_architecture_finds_most_planted_directions(planted, name):
    x, directions = planted
    objective, fields = LEARNS.get(name, ({}, {}))
    config, objective = architecture(name, D_MODEL, D_SAE, k=K, objective=objective, **fields)
    train = TrainConfig(steps=300, batch_size=256, learning_rate=1e-2, warmup_steps=10, dead_after=20 * 256)
    dictionary, history = fit(x, config, objective, train, key=jax.random.key(0))
    found = jnp.abs(directions @ unit_rows(dictionary.w_dec).T).max(1)
    null = jnp.abs(directions @ init(config, key=jax.random.key(9)).w_dec.T).max(1)
    assert float(jnp.median(found)) > 0.9 > float(jnp.median(null)) + 0.2
    assert history[-1]["fvu"] < 0.35
    assert history[-1]["l0"] < 2.5 * K
    assert unexplained(dictionary, x) == pytest.approx(history[-1]["fvu"], abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("optimiser", ["signum", "muon"])
def test_other_optimisers_learn(planted, optimiser):
    rate = {"signum": 1e-2, "muon": 5e-2}[optimiser]
    train = TrainConfig(steps=300, batch_size=256, learning_rate=rate, warmup_steps=10, optimiser=optimiser, clip=1.0)
    dictionary, _ = fit(planted[0], CONFIG, OBJECTIVE, train, key=jax.random.key(0))
    assert unexplained(dictionary, planted[0]) < 0.2


@pytest.mark.slow
def test_a_skip_transcoder_learns_a_map_with_features(planted):
    x, directions = planted
    codes = jax.nn.relu((x - 7.0) @ directions.T / 40 - 0.3)
    y = codes @ jax.random.normal(jax.random.key(4), (24, 5)) + 2.0 * x[:, :5] / 40
    config, objective = architecture("topk", D_MODEL, 64, k=6, transcoder=True, d_out=5, skip=True)
    train = TrainConfig(steps=400, batch_size=256, learning_rate=1e-2, warmup_steps=10)
    dictionary, _ = fit(x, config, objective, train, key=jax.random.key(0), targets=y)
    error = float(((y - dictionary(x)) ** 2).sum() / ((y - y.mean(0)[None, :]) ** 2).sum())
    assert error < 0.15
    linear = np.linalg.lstsq(np.asarray(x - x.mean(0)[None, :]), np.asarray(y - y.mean(0)[None, :]))
    assert error < 0.7 * float(linear[1].sum() / ((y - y.mean(0)[None, :]) ** 2).sum())


def test_random_decoder_is_never_trained(planted):
    train = TrainConfig(steps=4, batch_size=256, steps_per_call=2)
    drawn = init(CONFIG, key=jax.random.split(jax.random.key(5))[0])
    sae, _ = fit_random_decoder(planted[0], CONFIG, OBJECTIVE, train, key=jax.random.key(5))
    np.testing.assert_array_equal(sae.w_dec, drawn.w_dec)
    assert jnp.abs(sae.w_enc - drawn.w_enc).max() > 1e-4


def test_resumes_to_the_same_numbers(planted, trained):
    sae, history, saved = trained
    state, metrics = saved[-4]
    assert metrics["step"] % (N // TRAIN.batch_size) != 0
    resumed, rest = fit(planted[0], CONFIG, OBJECTIVE, TRAIN, key=jax.random.key(0), state=state)
    assert rest == history[-3:]
    jax.tree.map(np.testing.assert_array_equal, resumed, sae)


def test_one_step_alone_equals_one_of_many(planted):
    x = planted[0] / 40
    sae = init(CONFIG, key=jax.random.key(1), mean=x.mean(0))
    static = {"objective": OBJECTIVE, "train": TRAIN}

    def fresh():
        return init_state(sae, CONFIG, OBJECTIVE, TRAIN)

    alone, metrics = train_step(fresh(), x[: TRAIN.batch_size], **static)
    one = jnp.ones(())
    source = InMemory(x, None, jnp.arange(N), one, one, TRAIN.batch_size)
    knobs = default_knobs(CONFIG, OBJECTIVE, TRAIN)
    looped, curves = train_steps(fresh(), source, jnp.ones((), jnp.int32), knobs=knobs, **static)
    first = {name: curve[0] for name, curve in curves.items()}
    for a, b in zip(jax.tree.leaves((alone, metrics)), jax.tree.leaves((looped, first)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("together", "in_a_program"), [(True, 8), (False, 8), (False, 2)])
def test_many_at_once_are_each_alone(planted, monkeypatch, together, in_a_program):
    monkeypatch.setattr(fit_module, "MOST_IN_TURN", in_a_program)
    config, objective = architecture("topk", D_MODEL, D_SAE, k=4, objective={"k_aux": 8})
    train = TrainConfig(steps=20, batch_size=256, steps_per_call=20, warmup_steps=2)
    keys = list(jax.random.split(jax.random.key(0), 3))
    knobs = default_knobs(config, objective, train)
    many = eqx.tree_at(lambda k: (k.k, k.learning_rate), knobs, (jnp.array([2, 3, 4]), jnp.array([1e-2, 1e-2, 3e-3])))
    dictionaries, histories = fit_many(planted[0], config, objective, train, keys=keys, knobs=many, together=together)
    assert [d.k for d in dictionaries] == [2, 3, 4]
    assert [h[-1]["l0"] for h in histories] == pytest.approx([2, 3, 4], abs=0.3)
    # the third alone, in the order that the first key draws
    alone_config, _ = architecture("topk", D_MODEL, D_SAE, k=4)
    source, (_, k_order) = fit_module._prepare(planted[0], None, config, objective, train, keys[0], None)
    state = fit_module.start(source, alone_config, objective, train, key=jax.random.split(keys[2])[0])
    own = eqx.tree_at(lambda k: k.learning_rate, knobs, jnp.float32(3e-3))
    state, _ = fit_module.run_steps(state, source, k_order, own, objective, train)
    alone = fit_module.finished(state, own, source.scale_x, None)
    np.testing.assert_allclose(dictionaries[2].w_dec, alone.w_dec, atol=1e-4)


def test_the_controller_reaches_its_target(planted):
    objective = Objective(penalty="l1", sparsity=0.01, target_l0=4.0)
    config = DictionaryConfig(D_MODEL, D_SAE, "relu")
    train = TrainConfig(steps=600, batch_size=256, learning_rate=1e-2, control=0.05, decay_fraction=0.2)
    _, history = fit(planted[0], config, objective, train, key=jax.random.key(0))
    assert np.mean([h["l0"] for h in history[-3:]]) == pytest.approx(4.0, rel=0.15)
    # without the controller, λ is far off
    _, free = fit(
        planted[0], config, objective, TrainConfig(steps=600, batch_size=256, learning_rate=1e-2), key=jax.random.key(0)
    )
    assert free[-1]["l0"] > 6


def test_k_falls_along_its_schedule(planted):
    train = TrainConfig(steps=40, batch_size=256, steps_per_call=1, k_start=10, k_steps=20)
    dictionary, history = fit(planted[0], CONFIG, OBJECTIVE, train, key=jax.random.key(0))
    l0 = [h["l0"] for h in history]
    assert l0[0] > 8
    assert max(l0[21:]) <= K
    assert dictionary.k == K


def test_batchtopks_threshold_gives_its_l0_outside_training(planted):
    config, objective = architecture("batchtopk", D_MODEL, D_SAE, k=K)
    train = TrainConfig(steps=300, batch_size=256, learning_rate=1e-2, threshold_rate=0.05)
    dictionary, _ = fit(planted[0], config, objective, train, key=jax.random.key(0))
    l0 = float((dictionary.encode(planted[0]) > 0).sum(1).mean())
    assert l0 == pytest.approx(K, rel=0.1)


def test_resampling_gives_dead_latents_the_directions_of_bad_tokens(planted):
    x = planted[0][:64] / 40
    train = TrainConfig(steps=100, batch_size=64, dead_after=10, resample_every=5, resample_until=0.5)
    dead = np.arange(D_SAE) < 6
    fresh = init_state(init(CONFIG, key=jax.random.key(1), mean=x.mean(0)), CONFIG, OBJECTIVE, train)
    state = eqx.tree_at(
        lambda s: (s.step, s.since_fired, s.dictionary.b_enc, s.optimiser.mu.w_dec),
        fresh,
        (jnp.int32(10), jnp.where(dead, 10, 3), jnp.ones(D_SAE), jnp.ones((D_SAE, D_MODEL))),
    )
    for step in (11, 55):
        other = eqx.tree_at(lambda s: s.step, state, jnp.int32(step))
        jax.tree.map(np.testing.assert_array_equal, resample(other, x, x, OBJECTIVE, train), other)
    new = resample(state, x, x, OBJECTIVE, train)
    old, d = state.dictionary, new.dictionary
    rest = unit_rows(x - old(x))
    # each is the direction of one token's remainder
    np.testing.assert_allclose((d.w_dec[dead] @ rest.T).max(1), 1, rtol=1e-5)
    alive = jnp.linalg.norm(old.w_enc[~dead], axis=1).mean()
    np.testing.assert_allclose(d.w_enc[dead], 0.2 * alive * d.w_dec[dead], rtol=1e-4, atol=1e-6)
    for leaf in (d.b_enc, new.optimiser.mu.w_dec, new.since_fired):
        assert (leaf[dead] == 0).all()
        assert (leaf[~dead] != 0).all()
    np.testing.assert_array_equal(d.w_dec[~dead], old.w_dec[~dead])
    np.testing.assert_array_equal(d.w_enc[~dead], old.w_enc[~dead])


def test_places_that_run_out_change_no_number(planted):
    objective = {"sparsity": 0.3}
    train = TrainConfig(steps=30, batch_size=256, steps_per_call=10, learning_rate=3e-3)
    found = {}
    for places in (None, 4):
        config, full = architecture(
            "jumprelu", D_MODEL, D_SAE, objective=objective, threshold=0.5, bandwidth=0.5, max_active=places
        )
        found[places] = fit(planted[0], config, full, train, key=jax.random.key(0))
    assert max(h["overflow"] for h in found[4][1]) > 0
    np.testing.assert_allclose(found[4][0].w_dec, found[None][0].w_dec, atol=2e-4)


@pytest.mark.parametrize("name", ["topk", "batchtopk", "jumprelu"])
def test_mesh_of_eight_equals_one_device(planted, name):
    mesh = sharding.make_mesh(data=2, fsdp=2, model=2)
    config, objective = architecture(name, D_MODEL, D_SAE, k=K)
    train = TrainConfig(steps=3, batch_size=8, steps_per_call=2)
    x = planted[0][:24] / 40
    (one, _), (many, _) = (fit(x, config, objective, train, key=jax.random.key(0), mesh=m) for m in (None, mesh))
    assert not many.w_dec.sharding.is_fully_replicated
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_massive_activations_are_refused(planted):
    x = planted[0].at[7].multiply(1000.0)
    np.testing.assert_array_equal(jnp.flatnonzero(massive(x)), [7])
    with pytest.raises(InputError, match="1 of 2048 activations have a norm over 10 times the median"):
        fit(x, CONFIG, OBJECTIVE, TRAIN, key=jax.random.key(0))


def test_faults_are_named(planted):
    x, key = planted[0], jax.random.key(0)
    with pytest.raises(InputError, match="d_in=16, the activations have width 15"):
        fit(x[:, 1:], CONFIG, OBJECTIVE, TRAIN, key=key)
    with pytest.raises(InputError, match="100 activations do not fill one batch of batch_size=256"):
        fit(x[:100], CONFIG, OBJECTIVE, TRAIN, key=key)
    with pytest.raises(InputError, match="2 of 2048 activations are not finite"):
        fit(x.at[3, 3].set(jnp.nan).at[5, 1].set(jnp.inf), CONFIG, OBJECTIVE, TRAIN, key=key)
    with pytest.raises(InputError, match="an autoencoder has none"):
        fit(x, CONFIG, OBJECTIVE, TRAIN, key=key, targets=x)
    with pytest.raises(InputError, match="topk does not combine with penalty='l0'"):
        fit(x, CONFIG, Objective(penalty="l0"), TRAIN, key=key)
    with pytest.raises(InputError, match="controller needs the objective's target_l0"):
        fit(x, CONFIG, OBJECTIVE, TrainConfig(steps=2, batch_size=8, control=0.1), key=key)
    knobs = default_knobs(CONFIG, OBJECTIVE, TRAIN)
    more: Knobs = eqx.tree_at(lambda k: k.k, knobs, jnp.array([3, 4]))
    with pytest.raises(InputError, match="goes to 4, the configuration has k=3 places"):
        fit_many(x, CONFIG, OBJECTIVE, TRAIN, keys=list(jax.random.split(key)), knobs=more)
    with pytest.raises(ValueError, match="n_components must be from 1 to d_model=16, got 17"):
        fit_pca(x, 17)
