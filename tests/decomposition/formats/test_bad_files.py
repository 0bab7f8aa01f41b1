"""Dictionaries that cannot be used: one error each, which names the file and the fault."""

import json
import pickle
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mi_jax.core.errors import InputError
from mi_jax.decomposition import formats
from mi_jax.models.checkpoints.errors import CheckpointError
from tests.decomposition.formats import sae_lens_layouts, scope_layouts, trainer_layouts


@pytest.fixture
def folder(tmp_path):
    return sae_lens_layouts.sae_lens_jumprelu(tmp_path / "sae").path


def change(folder, name="cfg.json", **fields):
    settings = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({k: v for k, v in (settings | fields).items() if v is not ...}))
    return folder


def change_tensors(path, **arrays):
    stored = load_file(path) | arrays
    save_file({name: value for name, value in stored.items() if value is not None}, path)


def test_what_was_looked_for_and_what_is_there(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(CheckpointError, match=r"no known format. Looked for sae_lens: cfg.json.*There is notes.txt"):
        formats.recognise(tmp_path)
    with pytest.raises(CheckpointError, match=r"the file 'notes\.txt'"):
        formats.load(tmp_path / "notes.txt")
    with pytest.raises(CheckpointError, match="no such file or folder"):
        formats.load(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"architecture": "temporal"}, r"cfg.json: architecture 'temporal' is not known here; known are standard"),
        ({"architecture": ...}, "no entry 'architecture'"),
        ({"architecture": 3}, "entry 'architecture' is 3, it was to be of type str"),
        ({"architecture": "gated"}, "no tensor 'b_gate'; it has W_dec, W_enc.*another architecture"),
        ({"architecture": "topk"}, "no entry 'k'"),
        ({"architecture": "topk", "k": 0}, "k is 0, it must be from 1 to the 12 latents"),
        ({"architecture": "topk", "k": 13}, "k is 13, it must be from 1 to the 12 latents"),
        ({"architecture": "transcoder", "normalize_activations": "layer_norm"}, "outputs of unknown scale"),
        ({"normalize_activations": "whiten"}, "normalize_activations is 'whiten', which is not known"),
        ({"normalize_activations": "covariance_whitening"}, "there is no activation_whitening.safetensors"),
        ({"metadata": {}, "activation_fn": "gelu"}, "activation_fn is 'gelu'"),
        ({"metadata": {}, "activation_fn": "topk"}, "activation_fn_kwargs has no k"),
    ],
)
def test_configurations_that_are_not_known(folder, fields, fault):
    with pytest.raises(CheckpointError, match=fault):
        formats.load(change(folder, **fields))


def test_tensors_that_do_not_fit(folder):
    path = folder / "sae_weights.safetensors"
    for arrays, fault in (
        (
            {"b_enc": np.zeros(5, np.float32)},
            r"sae_weights.safetensors: tensor 'b_enc' has shape \(5,\), it was to be 12",
        ),
        ({"b_enc": np.full(12, np.nan, np.float32)}, "tensor 'b_enc' has NaN"),
        ({"b_enc": None}, "no tensor 'b_enc'"),
        (
            {"W_dec": np.zeros((12, 5), np.float32), "b_enc": np.zeros(12, np.float32)},
            "reads width 6 and W_dec writes 5",
        ),
    ):
        change_tensors(path, **arrays)
        with pytest.raises(CheckpointError, match=fault):
            formats.load(folder)


def test_damaged_files(folder, tmp_path):
    path = folder / "sae_weights.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"sae_weights.safetensors: truncated"):
        formats.load(folder)
    (folder / "cfg.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"cfg.json: cannot be read as JSON"):
        formats.load(folder)

    params = scope_layouts.gemma_scope(tmp_path / "gemma").path / "params.npz"
    whole = params.read_bytes()
    params.write_bytes(whole[:-30])
    with pytest.raises(CheckpointError, match=r"params.npz: not a numpy archive, or truncated"):
        formats.load(params.parent)
    middle = bytearray(whole)
    middle[len(whole) // 2] ^= 255
    params.write_bytes(bytes(middle))
    with pytest.raises(CheckpointError, match=r"params.npz: array '.*' cannot be read"):
        formats.load(params)
    params.write_bytes(pickle.dumps({"W_enc": 1}))
    with pytest.raises(CheckpointError, match=r"params.npz: not a numpy archive"):
        formats.load(params)


def test_arrays_of_objects_are_never_read(tmp_path):
    folder = scope_layouts.gemma_scope(tmp_path / "gemma").path
    np.savez(folder / "params.npz", W_enc=np.array([[{"a": 1}]], dtype=object))
    with pytest.raises(CheckpointError, match=r"params.npz: array 'W_enc' cannot be read \(Object arrays"):
        formats.load(folder)


def test_pickles_are_never_read(tmp_path):
    folder = trainer_layouts.dictionary_learning_relu(tmp_path / "dl").path
    (folder / "ae.pt").write_bytes(pickle.dumps({"bias": 1}))
    with pytest.raises(CheckpointError, match=r"ae.pt: a plain pickle"):
        formats.load(folder)
    path = trainer_layouts.openai(tmp_path / "openai").path
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CheckpointError, match=r"6.pt: not a torch file, or truncated"):
        formats.load(path)


def test_dictionaries_of_classes_that_are_not_known(tmp_path):
    folder = trainer_layouts.dictionary_learning_topk(tmp_path / "dl").path
    (folder / "config.json").write_text(json.dumps({"trainer": {"dict_class": "IdentityDict"}}))
    with pytest.raises(CheckpointError, match="dict_class 'IdentityDict' is not known here; known are AutoEncoder"):
        formats.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="AutoEncoderTopK and BatchTopKSAE have the same tensors"):
        formats.load(folder)
    for make in ("relu", "new", "gated", "jumprelu", "matryoshka"):
        told = getattr(trainer_layouts, f"dictionary_learning_{make}")(tmp_path / make).path
        with_config = formats.load(told)
        (told / "config.json").unlink()
        assert type(formats.load(told).activation) is type(with_config.activation)
        assert formats.load(told).centred == with_config.centred


def test_activations_that_are_not_known(tmp_path):
    sparse = change(trainer_layouts.sparsify(tmp_path / "a").path, activation="groupmax")
    with pytest.raises(CheckpointError, match="activation 'groupmax' is not known here; topk is"):
        formats.load(sparse)
    batch = change(scope_layouts.llamascopium(tmp_path / "b").path, "config.json", act_fn="batchtopk")
    with pytest.raises(CheckpointError, match="act_fn 'batchtopk' chooses over a whole batch"):
        formats.load(batch)
    glu = change(scope_layouts.llamascopium(tmp_path / "c").path, "config.json", use_glu_encoder=True)
    with pytest.raises(CheckpointError, match="gated linear unit"):
        formats.load(glu)
    lorsa = change(scope_layouts.llamascopium(tmp_path / "d").path, "config.json", sae_type="lorsa")
    with pytest.raises(CheckpointError, match="sae_type 'lorsa'"):
        formats.load(lorsa)
    uneven = change(scope_layouts.llamascopium_crosscoder(tmp_path / "e").path, "config.json", act_fn="topk")
    with pytest.raises(CheckpointError, match="each site of this crosscoder gates a latent"):
        formats.load(uneven)
    other = change(scope_layouts.gemma_scope_2(tmp_path / "f").path, "config.json", architecture="topk")
    with pytest.raises(CheckpointError, match="architecture 'topk' is not known here; jump_relu is"):
        formats.load(other)


def test_layers_that_are_missing_or_not_chosen(tmp_path):
    folder = trainer_layouts.circuit_tracer(tmp_path / "a").path
    with pytest.raises(CheckpointError, match="has transcoders of layers 3, 4: give layer="):
        formats.load(folder)
    with pytest.raises(CheckpointError, match="there is no layer 7; give layer="):
        formats.load(folder, layer=7)
    across = trainer_layouts.circuit_tracer_clt(tmp_path / "b").path
    with pytest.raises(InputError, match="layer= has no meaning for circuit_tracer_clt"):
        formats.load(across, layer=1)
    (across / "W_enc_1.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no W_enc file of layer 1; there are those of layers 0, 2"):
        formats.load(across)
    gemma = scope_layouts.gemma_scope_2_clt(tmp_path / "c").path
    with pytest.raises(CheckpointError, match="one layer of a cross-layer transcoder; load its folder"):
        formats.load(gemma / "params_layer_1.safetensors")
    trained = trainer_layouts.clt_training(tmp_path / "d").path
    with pytest.raises(CheckpointError, match="one layer of a cross-layer transcoder; load the folder above"):
        formats.load(trained / "h.9.mlp")
    shutil.rmtree(trained / "h.10.mlp")
    with pytest.raises(CheckpointError, match="n_targets is 3, but only 2 layers' folders follow"):
        formats.load(trained)


@pytest.mark.parametrize(
    ("name", "value", "fault"),
    [
        ("post_encs.1", np.ones(12, np.float32), "'post_encs.1' adds to codes"),
        ("W_skips.1", np.ones((6, 6), np.float32), "a skip to another layer, 'W_skips.1'"),
        ("W_decs.2", None, "no tensor 'W_decs.2'"),
    ],
)
def test_cross_layer_parts_that_have_no_place_here(name, value, fault, tmp_path):
    folder = trainer_layouts.clt_training(tmp_path / "a").path
    change_tensors(folder / "h.8.mlp" / "sae.safetensors", **{name: value})
    with pytest.raises(CheckpointError, match=fault):
        formats.load(folder)


def test_options_that_mean_nothing(folder):
    with pytest.raises(InputError, match="layer= has no meaning for sae_lens"):
        formats.load(folder, layer=1)
    with pytest.raises(InputError, match="scale= is for normalize_activations='expected_average_only_in' only"):
        formats.load(folder, scale=2.0)
    with pytest.raises(InputError, match="scale must be over 0"):
        formats.load(folder, scale=-1.0)
    with pytest.raises(InputError, match="no format 'sae'"):
        formats.load(folder, format="sae")
