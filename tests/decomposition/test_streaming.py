"""Trainings on a stream: resumed after a stop they are equal bit for bit, on more devices up to rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mi_jax as mi
from mi_jax.core import sharding
from mi_jax.core.errors import InputError
from mi_jax.data.activations import Activations, ActivationStream
from mi_jax.decomposition import TrainConfig, architecture
from mi_jax.decomposition.training import Checkpoints, Training, fit_stream
from mi_jax.decomposition.training.streaming import with_weight
from tests.models.tiny import tiny

STEPS, BATCH, WIDTH = 24, 32, 8
TRAIN = TrainConfig(
    steps=STEPS, batch_size=BATCH, steps_per_call=5, warmup_steps=3, learning_rate=1e-2, dead_after=4 * BATCH
)
SITES = ("resid_post", "mlp_out")


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def tokens(model):
    return np.random.default_rng(0).integers(0, model.config.d_vocab, (60, 8)).astype(np.int32)


def stream_of(model, tokens, mesh=None):
    sites = [mi.at(site, layers=1) for site in SITES]
    options = {"batch_size": BATCH, "buffer_size": 4 * BATCH, "contexts_per_chunk": 8, "outlier_ratio": None}
    return ActivationStream(model, tokens, sites, key=jax.random.key(3), mesh=mesh, **options)


def trainings(**fields):
    topk, aims = architecture("topk", WIDTH, 32, k=3)
    batch, more = architecture("batchtopk", WIDTH, 32, k=3, transcoder=True)
    cross, rest = architecture("jumprelu", 2 * WIDTH, 32, n_sites=2)
    return {
        "topk": Training(topk, aims, TRAIN, reads=("resid_post",)),
        "transcoder": Training(batch, more, TRAIN, reads=("resid_post",), writes=("mlp_out",), seed=1),
        "crosscoder": Training(cross, rest, TRAIN, reads=SITES, seed=2),
        "null": Training(topk, aims, TRAIN, reads=("resid_post",), frozen_decoder=True, seed=3),
    }


class Stopped(Exception):
    pass


def run(model, tokens, folder=None, *, names=None, stop=None, mesh=None, every=4):
    def progress(step, metrics):
        if stop is not None and step >= stop:
            raise Stopped

    checkpoints = None if folder is None else Checkpoints(folder)
    stream = stream_of(model, tokens, mesh)
    chosen = {name: training for name, training in trainings().items() if names is None or name in names}
    return fit_stream(stream, chosen, checkpoints=checkpoints, checkpoint_every=every, progress=progress, mesh=mesh)


@pytest.fixture(scope="module")
def whole(model, tokens):
    return run(model, tokens)


def test_all_learn_from_one_pass(whole):
    dictionaries, curves = whole
    assert set(dictionaries) == set(trainings())
    for name, curve in curves.items():
        assert len(curve["loss"]) == STEPS
        assert curve["fvu"][-4:].mean() < curve["fvu"][:2].mean(), name
    assert dictionaries["crosscoder"].d_in == 2 * WIDTH


@pytest.mark.parametrize("stop", [1, 9, pytest.param(17, marks=pytest.mark.slow)])
def test_a_stopped_run_goes_on_bit_for_bit(model, tokens, whole, tmp_path, stop):
    with pytest.raises(Stopped):
        run(model, tokens, tmp_path / "run", stop=stop)
    dictionaries, curves = run(model, tokens, tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, curves, whole[1])
    jax.tree.map(np.testing.assert_array_equal, dictionaries, whole[0])


def test_a_finished_run_is_read_and_not_run_again(model, tokens, tmp_path):
    first = run(model, tokens, tmp_path / "run")
    again = run(model, tokens, tmp_path / "run", stop=0)
    jax.tree.map(np.testing.assert_array_equal, again, first)


def test_a_run_goes_on_on_eight_devices_to_equal_numbers(model, tokens, whole, tmp_path):
    with pytest.raises(Stopped):
        run(model, tokens, tmp_path / "run", names=("topk", "transcoder"), stop=9)
    mesh = sharding.make_mesh(data=2, fsdp=2, model=2)
    dictionaries, curves = run(model, tokens, tmp_path / "run", names=("topk", "transcoder"), mesh=mesh)
    assert set(curves) == {"topk", "transcoder"}
    for name, curve in curves.items():
        np.testing.assert_allclose(curve["loss"], whole[1][name]["loss"], rtol=1e-5, err_msg=name)
    assert not dictionaries["topk"].w_dec.sharding.is_fully_replicated


def test_rows_without_weight_are_replaced_by_others_of_the_batch():
    values = np.arange(6.0, dtype=np.float32)[:, None]
    valid, numbers = jnp.array([0, 1, 0, 1, 1, 0], bool), jnp.arange(6)
    got = np.asarray(with_weight(Activations({"a": jnp.asarray(values)}, valid, numbers, numbers)).values["a"])[:, 0]
    np.testing.assert_array_equal(got[[1, 3, 4]], [1, 3, 4])
    assert set(got[[0, 2, 5]]) <= {1, 3, 4}
    assert len(set(got[[0, 2, 5]])) == 3


def test_faults_are_named(model, tokens, tmp_path):
    stream, all_of_them = stream_of(model, tokens), trainings()
    topk = all_of_them["topk"]
    other = TrainConfig(steps=STEPS, batch_size=16, steps_per_call=5)
    config, objective = architecture("topk", WIDTH + 1, 32, k=3)
    for training, message in (
        (Training(topk.config, topk.objective, topk.train, reads=("embed",)), "wants site 'embed'; the stream has"),
        (Training(topk.config, topk.objective, other, reads=("resid_post",)), "batch_size=16, the stream 32"),
        (Training(config, objective, topk.train, reads=("resid_post",)), "have width 8, the config says 9"),
    ):
        with pytest.raises(InputError, match=message):
            fit_stream(stream, {"a": training})
    with pytest.raises(Stopped):
        run(model, tokens, tmp_path / "run", stop=5)
    with pytest.raises(InputError, match=r"is of another training: .* use another folder"):
        fit_stream(stream, {"topk": topk}, checkpoints=Checkpoints(tmp_path / "run"))
