"""Cross-layer transcoders find features that write to later layers; transcoders of single layers cannot."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mi_jax.core import sharding
from mi_jax.core.errors import InputError
from mi_jax.decomposition import Objective, TrainConfig, architecture, fit
from mi_jax.decomposition.cross_layer_config import CrossLayerConfig, init_cross_layer
from mi_jax.decomposition.initial import unit_rows
from mi_jax.decomposition.training.cross_layer import fit_cross_layer

N, LAYERS, D, FEATURES, D_SAE, K = 2048, 3, 12, 12, 16, 2
SIZES = (1.0, 30.0, 5.0)
TRAIN = TrainConfig(
    steps=400,
    batch_size=256,
    learning_rate=1e-2,
    warmup_steps=10,
    decoder="free",
    steps_per_call=40,
    dead_after=30 * 256,
)
AUXK = Objective(auxiliary="auxk", k_aux=4)


@pytest.fixture(scope="module")
def planted():
    """Every layer has features of its own, 2 of 12 at a time, that write to its output and to all later ones."""
    keys = jax.random.split(jax.random.key(3), 4)
    reads = jax.vmap(unit_rows)(jax.random.normal(keys[0], (LAYERS, FEATURES, D)))
    writes = jax.random.normal(keys[1], (LAYERS, LAYERS, FEATURES, D))
    writes = writes * jnp.triu(jnp.ones((LAYERS, LAYERS)))[:, :, None, None]
    score = jax.random.uniform(keys[2], (N, LAYERS, FEATURES))
    active = score >= jax.lax.top_k(score, K)[0][..., -1:]
    codes = jnp.where(active, jax.random.uniform(keys[3], score.shape, minval=0.5, maxval=1.5), 0.0)
    x = jnp.einsum("nlf,lfd->nld", codes, reads)
    y = jnp.einsum("nlf,ltfd->ntd", codes, writes) * jnp.asarray(SIZES)[None, :, None] + 2.0
    return 10.0 * x, y, reads, writes


def unexplained(y, guess):
    """Per layer, and the mean over layers."""
    rest, centred = y - guess, y - y.mean(0)[None]
    return np.asarray((rest**2).sum((0, 2)) / (centred**2).sum((0, 2)))


@pytest.fixture(scope="module")
def trained(planted):
    saved = []

    def save(state, metrics):
        saved.append((jax.tree.map(jnp.copy, state), metrics))

    config = CrossLayerConfig(D, D_SAE, LAYERS, k=K)
    found = fit_cross_layer(*planted[:2], config, AUXK, TRAIN, key=jax.random.key(0), progress=save)
    return *found, saved


def test_finds_features_that_write_to_later_layers(planted, trained):
    x, y, _, writes = planted
    transcoder, history, _ = trained
    ours = unexplained(y, transcoder(x))
    assert (ours < 0.1).all()
    assert history[-1]["fvu"] == pytest.approx(ours.mean(), rel=0.3, abs=0.02)
    assert history[-1]["l0"] <= K
    start = init_cross_layer(CrossLayerConfig(D, D_SAE, LAYERS, k=K), key=jax.random.key(9))
    for i in range(LAYERS):
        # one latent of the same layer for a planted feature, whose decoders point along all that the feature writes
        sizes = jnp.asarray(SIZES[i:])[None, :, None]
        truth = unit_rows(writes[i, i:].swapaxes(0, 1).reshape(FEATURES, -1))
        found = (truth @ unit_rows((transcoder.w_dec[i] / sizes).reshape(D_SAE, -1)).T).max(1)
        null = (truth @ unit_rows(start.w_dec[i].reshape(D_SAE, -1)).T).max(1)
        assert float(jnp.median(found)) > 0.85 > float(jnp.median(null)) + 0.2
    frozen, _ = fit_cross_layer(
        x, y, CrossLayerConfig(D, D_SAE, LAYERS, k=K), AUXK, TRAIN, key=jax.random.key(0), frozen_decoder=True
    )
    assert (unexplained(y, frozen(x)) > 3 * ours).all()


@pytest.mark.slow
def test_beats_a_transcoder_per_layer_where_features_write_to_later_layers(planted, trained):
    x, y, _, _ = planted
    config, objective = architecture("topk", D, D_SAE, k=K, transcoder=True, objective={"k_aux": 4})
    single = [fit(x[:, i], config, objective, TRAIN, key=jax.random.key(0), targets=y[:, i])[0] for i in range(LAYERS)]
    alone = unexplained(y, jnp.stack([t(x[:, i]) for i, t in enumerate(single)], 1))
    ours = unexplained(y, trained[0](x))
    # equal in the first layer, which no other writes to
    assert alone[0] < 0.1
    assert (alone[1:] > 0.3).all()
    assert (ours[1:] < 0.3 * alone[1:]).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("activation", "objective", "fields"),
    [
        ("batchtopk", AUXK, {"k": K}),
        ("relu", Objective(penalty="tanh", sparsity=0.3, auxiliary="preactivation", aux_coefficient=3e-2), {}),
        (
            "jumprelu",
            Objective(penalty="tanh", sparsity=0.3, auxiliary="preactivation", aux_coefficient=3e-2),
            {"threshold": 0.1, "bandwidth": 0.5},
        ),
    ],
)
def test_other_activations_learn(planted, activation, objective, fields):
    x, y, _, _ = planted
    config = CrossLayerConfig(D, D_SAE, LAYERS, activation, **fields)
    transcoder, history = fit_cross_layer(x, y, config, objective, TRAIN, key=jax.random.key(0))
    assert unexplained(y, transcoder(x)).mean() < 0.15
    assert history[-1]["l0"] < 2 * K
    # codes outside training are those of training, which BatchTopK's threshold has to give
    assert float((transcoder.encode(x) != 0).sum(-1).mean()) == pytest.approx(history[-1]["l0"], rel=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("tying", ["per_source", "per_target"])
def test_tied_transcoders_learn_what_is_tied(planted, tying):
    x, _, reads, writes = planted
    codes = jnp.einsum("nld,ldf->nlf", x, jnp.linalg.pinv(reads)) / 10

    def written(t):
        return sum(codes[:, i] @ writes[(i, i) if tying == "per_source" else (t, t)] for i in range(t + 1))

    y = jnp.stack([written(t) for t in range(LAYERS)], 1)
    train = dataclasses.replace(TRAIN, decoder="unit")
    errors = {}
    for own in ("per_source", "per_target"):
        config = CrossLayerConfig(D, D_SAE, LAYERS, k=K, tying=own)
        transcoder, _ = fit_cross_layer(x, y, config, AUXK, train, key=jax.random.key(0))
        errors[own] = unexplained(y, transcoder(x)).mean()
        np.testing.assert_allclose(jnp.linalg.norm(transcoder.w_dec[0][:, 0], axis=1), 1, rtol=1e-5)
    other = errors["per_target" if tying == "per_source" else "per_source"]
    assert errors[tying] < 0.1
    assert other > 3 * errors[tying]


def test_resumes_to_the_same_numbers(planted, trained):
    transcoder, history, saved = trained
    config = CrossLayerConfig(D, D_SAE, LAYERS, k=K)
    resumed, rest = fit_cross_layer(*planted[:2], config, AUXK, TRAIN, key=jax.random.key(0), state=saved[-3][0])
    assert rest == history[-2:]
    jax.tree.map(np.testing.assert_array_equal, resumed, transcoder)


@pytest.mark.slow
def test_a_mesh_of_eight_equals_one_device(planted):
    mesh = sharding.make_mesh(data=2, fsdp=2, model=2)
    # the places of batchtopk are chosen over the tokens and latents of all devices
    config = CrossLayerConfig(D, D_SAE, 2, "batchtopk", k=4)
    train = dataclasses.replace(TRAIN, steps=3, batch_size=8, steps_per_call=2)
    x, y = planted[0][:24, :2], planted[1][:24, :2]
    one, many = (
        fit_cross_layer(x, y, config, Objective(), train, key=jax.random.key(0), mesh=m)[0] for m in (None, mesh)
    )
    for leaf in (many.w_enc, many.w_dec[0]):
        assert not leaf.sharding.is_fully_replicated
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_faults_are_named(planted):
    x, y, _, _ = planted
    config, key = CrossLayerConfig(D, D_SAE, LAYERS, k=K), jax.random.key(0)

    def fit_with(x=x, y=y, train=TRAIN):
        fit_cross_layer(x, y, config, AUXK, train, key=key)

    with pytest.raises(InputError, match=r"targets must have shape \[n=2048, layer=3, width=12\], got \(2048, 3, 11\)"):
        fit_with(y=y[:, :, 1:])
    with pytest.raises(InputError, match="1 of 2048 rows of inputs are not finite"):
        fit_with(x=x.at[3, 1, 2].set(jnp.nan))
    with pytest.raises(InputError, match="1 of 2048 rows have, in some layer, an input with a norm over 10 times"):
        fit_with(x=x.at[3, 1].multiply(1000.0))
    with pytest.raises(InputError, match="100 rows do not fill one batch of batch_size=256"):
        fit_with(x=x[:100], y=y[:100])
    with pytest.raises(InputError, match="no k_start and no resampling"):
        fit_with(train=TrainConfig(batch_size=64, k_start=4))
