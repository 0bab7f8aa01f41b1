"""Trainings on a stream: resumed after a stop they are equal bit for bit, on more devices up to rounding."""

import dataclasses
import shutil

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mi_jax as mi
from mi_jax.core import sharding
from mi_jax.core.errors import InputError
from mi_jax.data.activations import ActivationStream
from mi_jax.decomposition import TrainConfig, architecture
from mi_jax.decomposition.training import Checkpoints, Training, default_knobs, fit_stream
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


def run(model, tokens, folder=None, *, names=None, stop=None, mesh=None, every=4, say=lambda _: None):
    def progress(step, metrics):
        if stop is not None and step >= stop:
            raise Stopped

    checkpoints = None if folder is None else Checkpoints(folder)
    stream = stream_of(model, tokens, mesh)
    chosen = {name: training for name, training in trainings().items() if names is None or name in names}
    return fit_stream(
        stream, chosen, checkpoints=checkpoints, checkpoint_every=every, progress=progress, mesh=mesh, say=say
    )


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
    heard = []
    again = run(model, tokens, tmp_path / "run", stop=0, say=heard.append)
    assert heard == [f"{tmp_path / 'run'} has step {STEPS} of {STEPS}: all are done"]
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


def test_the_last_batch_of_an_epoch_has_the_weight_of_its_rows(model, tokens):
    # 55 contexts of 7 usable tokens: 12 batches of 32 and one row
    _, curves = run(model, tokens[:55], names=("topk", "crosscoder"))
    short = 12
    for name, curve in curves.items():
        assert curve["rows"][short] == 1
        assert (np.delete(curve["rows"], short) == BATCH).all()
        # of one row about its own mean it was 10¹²
        assert 0 < curve["fvu"][short] < 5, name
        # the step of one row changes the dictionary less than a whole step does
        assert np.abs(curve["fvu"][short + 1 : short + 4] - curve["fvu"][short - 3 : short]).max() < 0.5, name


def test_each_layer_of_one_stream_trains_as_from_a_stream_of_its_own(model, tokens, whole):
    topk = trainings()["topk"]
    options = {"batch_size": BATCH, "buffer_size": 4 * BATCH, "contexts_per_chunk": 8, "outlier_ratio": None}
    stream = ActivationStream(model, tokens, mi.at("resid_post", layers=(0, 1)), key=jax.random.key(3), **options)
    each = {f"{n}": dataclasses.replace(topk, reads=(mi.at("resid_post", layers=n),)) for n in (0, 1)}
    found, _ = fit_stream(stream, each)
    # the other stream has layer 1 alone
    np.testing.assert_allclose(found["1"].w_dec, whole[0]["topk"].w_dec, atol=1e-4)
    assert np.abs(np.asarray(found["0"].w_dec - found["1"].w_dec)).max() > 0.1


def test_a_layer_that_the_stream_lacks_is_named(model, tokens):
    config, objective = architecture("topk", WIDTH, 32, k=3)
    stream = stream_of(model, tokens)
    for layers in (0, (0, 1)):
        training = Training(config, objective, TRAIN, reads=(mi.at("resid_post", layers=layers),))
        with pytest.raises(InputError, match=r"wants site 'resid_post' at layer 0.*; the stream has layer 1 of it"):
            fit_stream(stream, {"a": training})


@pytest.fixture(scope="module")
def finished_folder(model, tokens, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(model, tokens, folder, names=("topk",))
    return folder


def _knobs(**fields):
    topk = trainings()["topk"]
    knobs = default_knobs(topk.config, topk.objective, TRAIN)
    return eqx.tree_at(lambda k: tuple(getattr(k, name) for name in fields), knobs, tuple(fields.values()))


# what is asked for of a folder, and the field that the refusal names
OTHERS = {
    "seed": ({"seed": 7}, {}, "trainings.topk.seed: 0 in the folder, 7 asked for"),
    "objective": ({"objective": {"aux_coefficient": 0.5}}, {}, "trainings.topk.objective.aux_coefficient: 0.2"),
    "k": ({"config": {"k": 4}}, {}, "trainings.topk.config.k: 3 in the folder, 4 asked for"),
    "rate": ({"train": {"learning_rate": 0.5}}, {}, "trainings.topk.train.learning_rate: 0.01 in the folder, 0.5"),
    "fewer steps": ({"train": {"steps": 12}}, {}, "trainings.topk.train.steps: 24 in the folder, 12 asked for"),
    "more steps": ({"train": {"steps": 48}}, {}, "trainings.topk.train.steps: 24 in the folder, 48 asked for"),
    "knobs": ({"knobs": _knobs(k=jnp.int32(2))}, {}, "trainings.topk.knobs"),
    "site": ({"reads": ("mlp_out",)}, {}, "trainings.topk.reads"),
    "decoder": ({"frozen_decoder": True}, {}, "trainings.topk.frozen_decoder: False"),
    "corpus": ({}, {"tokens": 1}, "stream.tokens: .* asked for"),
    "weights": ({}, {"weights": 1}, "stream.weights: .* asked for"),
    "layer": ({}, {"layers": 2}, "stream.sites.resid_post: 1 in the folder, 2 asked for"),
    "shuffle": ({}, {"key": 4}, "stream.key"),
    "buffer": ({}, {"buffer_size": 5 * BATCH}, None),
    "outliers": ({}, {"outlier_ratio": 9.0}, "stream.outlier_ratio: None in the folder, 9.0 asked for"),
    # neither changes a number
    "calls": ({"train": {"steps_per_call": 3, "massive_ratio": None}}, {}, None),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_folder_answers_for_its_own_training_alone(model, tokens, finished_folder, case):
    changes, other, message = OTHERS[case]
    training = trainings()["topk"]
    fields = {
        name: dataclasses.replace(getattr(training, name), **value) if isinstance(value, dict) else value
        for name, value in changes.items()
    }
    training = dataclasses.replace(training, **fields)
    if "weights" in other:
        # the smallest change that there is, in one number
        value = model.blocks.attn.o.reshape(-1)[0]
        near = jnp.nextafter(value, jnp.inf)
        model = eqx.tree_at(lambda m: m.blocks.attn.o, model, model.blocks.attn.o.at[(0,) * 4].set(near))
    if "tokens" in other:
        tokens = np.where(np.arange(8) == 7, (tokens + 1) % model.config.d_vocab, tokens).astype(np.int32)
    sites = [mi.at(site, layers=other.get("layers", 1)) for site in SITES]
    stream = ActivationStream(
        model,
        tokens,
        sites,
        key=jax.random.key(other.get("key", 3)),
        batch_size=BATCH,
        buffer_size=other.get("buffer_size", 4 * BATCH),
        contexts_per_chunk=8,
        outlier_ratio=other.get("outlier_ratio"),
    )

    def answer():
        return fit_stream(stream, {"topk": training}, checkpoints=Checkpoints(finished_folder), say=lambda _: None)

    if message is None:
        # buffers are rounded down to whole blocks: this is the same one
        assert len(answer()[1]["topk"]["loss"]) == STEPS
    else:
        with pytest.raises(InputError, match=f"(?s)of another training.*{message}.*use another folder"):
            answer()


def test_a_folder_without_a_checkpoint_is_free_and_one_without_a_name_is_refused(finished_folder, tmp_path):
    Checkpoints(tmp_path / "new").claim({"a": 1})
    Checkpoints(tmp_path / "new").claim({"a": 2})
    shutil.copytree(finished_folder, tmp_path / "old")
    (tmp_path / "old" / "training.json").unlink()
    with pytest.raises(InputError, match=r"has checkpoints but no training\.json.*use another folder"):
        Checkpoints(tmp_path / "old").claim({"a": 1})


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
    with pytest.raises(InputError, match="holds checkpoints of another training"):
        fit_stream(stream, {"topk": topk}, checkpoints=Checkpoints(tmp_path / "run"))
