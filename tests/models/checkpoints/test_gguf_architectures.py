"""Every architecture: a random decoder, written by the `gguf` library, comes back bit for bit."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mi_jax as mi
from mi_jax.models import CheckpointError, Decoder, DecoderConfig, load_gguf, open_gguf, read_config
from mi_jax.models.checkpoints.gguf import ARCHITECTURES
from mi_jax.models.checkpoints.huggingface import load
from mi_jax.models.checkpoints.saving import save
from mi_jax.models.config import RopeScaling
from mi_jax.models.parameters import abstract_decoder
from mi_jax.models.rotary import rotations
from tests.models.checkpoints.gguf_convert import F32, write_decoder
from tests.models.gguf_files import Shape, metadata, tensors, write

_LLAMA = DecoderConfig(
    name="tiny", n_layers=2, d_model=8, n_heads=4, n_kv_heads=2, d_head=6, d_mlp=10, d_vocab=13, n_ctx=12
)


def _like_llama(**fields) -> DecoderConfig:
    return dataclasses.replace(_LLAMA, **fields)


_GEMMA = _like_llama(embed_scale=8**0.5, norm_offset=1.0, activation="gelu", norm_eps=1e-6)
CONFIGS = {
    "llama": _like_llama(rope_theta=500.0, tied=False, qkv_bias=True),
    "smollm3": _like_llama(n_layers=4, rope_layers=(True, True, True, False), rope_theta=2e6),
    "qwen2": _like_llama(qkv_bias=True, rope_theta=1e6),
    "qwen3": _like_llama(qk_norm="head", d_head=10),
    "qwen3moe": _like_llama(qk_norm="head", n_experts=3, n_active_experts=2, tied=False),
    "olmo2": _like_llama(qk_norm="whole", norms="output", tied=False),
    "phi3": _like_llama(rope_dim=4, windows=(3, 3), tied=False),
    "gpt2": _like_llama(
        n_kv_heads=4,
        d_head=2,
        positions="learned",
        norm="layer",
        activation="gelu",
        gated=False,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
    ),
    "gemma": _GEMMA,
    "gemma2": dataclasses.replace(_GEMMA, norms="sandwich", windows=(4, 0), score_softcap=50.0, logit_softcap=30.0),
    "gemma3": dataclasses.replace(
        _GEMMA,
        n_layers=7,
        norms="sandwich",
        qk_norm="head",
        windows=(4, 4, 4, 4, 4, 0, 4),
        rope_theta=1e6,
        rope_local_theta=1e4,
    ),
}


@functools.cache
def _random(config: DecoderConfig) -> Decoder:
    """Every parameter random, norms and biases included, in multiples of 2^-10 that float16 and 1 + w hold exactly."""
    leaves, treedef = jax.tree.flatten(abstract_decoder(config))
    rng = np.random.default_rng(0)
    rounded = [np.round(rng.normal(0, 0.5, x.shape) * 1024) / 1024 for x in leaves]
    return jax.tree.unflatten(treedef, [jnp.asarray(x.astype(np.float32)) for x in rounded])


def _assert_same(loaded: Decoder, model: Decoder) -> None:
    assert jax.tree.structure(loaded) == jax.tree.structure(model)
    for (path, x), y in zip(jax.tree.leaves_with_path(loaded), jax.tree.leaves(model), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=jax.tree_util.keystr(path))


def test_no_architecture_is_left_out():
    assert set(CONFIGS) == set(ARCHITECTURES)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_parameters_and_configuration_come_back(tmp_path, architecture):
    model = _random(CONFIGS[architecture])
    _assert_same(load_gguf(write_decoder(tmp_path / "tiny.gguf", model, architecture)), model)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3"])
def test_logits_come_back(tmp_path, architecture):
    """Sequences longer than the window, so that all of a configuration has its part in them."""
    model = _random(CONFIGS[architecture])
    loaded = load_gguf(write_decoder(tmp_path / "tiny.gguf", model, architecture))
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, 13, jnp.int32)
    logits = mi.jit(model)(tokens)
    assert float(jnp.std(logits)) > 0.1
    np.testing.assert_array_equal(np.asarray(mi.jit(loaded)(tokens)), np.asarray(logits))


@pytest.mark.parametrize("architecture", ["llama", "phi3", "gemma3"])
def test_what_came_from_gguf_is_saved_as_any_other_model(tmp_path, architecture):
    """Through a Hugging Face directory, whose norms are without Gemma's 1 and whose heads are not interleaved."""
    model = load_gguf(write_decoder(tmp_path / "tiny.gguf", _random(CONFIGS[architecture]), architecture))
    save(model, tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert dataclasses.replace(again.config, name="tiny") == model.config
    for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(model), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_shards_hold_the_same_values(tmp_path, architecture, mesh):
    config = dataclasses.replace(CONFIGS[architecture], d_head=4, d_mlp=16, d_vocab=16)
    model = _random(config)
    loaded = load_gguf(write_decoder(tmp_path / "tiny.gguf", model, architecture), mesh=mesh)
    _assert_same(loaded, model)
    assert len(loaded.blocks.attn.q.sharding.device_set) == 8
    assert loaded.blocks.attn.q.addressable_shards[0].data.size < model.blocks.attn.q.size


def test_the_dtype_is_that_asked_for(tmp_path):
    model = _random(CONFIGS["qwen3"])
    path = write_decoder(tmp_path / "tiny.gguf", model, "qwen3", kind=F32)
    low = load_gguf(path, dtype=jnp.bfloat16)
    _assert_same(low, jax.tree.map(lambda x: x.astype(jnp.bfloat16), model))
    _assert_same(load_gguf(path, dtype=None), model)


def test_gemmas_norms_are_stored_with_their_one(tmp_path):
    """What the tests above would not see if writer and loader both left the 1 out."""
    model = _random(CONFIGS["gemma3"])
    file = open_gguf(write_decoder(tmp_path / "tiny.gguf", model, "gemma3"))
    np.testing.assert_array_equal(file.read("output_norm.weight"), 1 + np.asarray(model.final_norm.weight))
    np.testing.assert_array_equal(load_gguf(file).final_norm.weight, model.final_norm.weight)
    assert load_gguf(file).final_norm.offset == 1.0


def _with_factors(tmp_path, factors: np.ndarray):
    model = _random(_like_llama(d_head=16, rope_theta=500_000.0, n_ctx=131_072))
    path = write_decoder(tmp_path / "tiny.gguf", model, "llama", extra={"rope_freqs.weight": factors})
    return load_gguf(path)


def _llama3_factors(factor: float) -> np.ndarray:
    """The converter's table, from the definition in wavelengths."""
    factors = []
    for i in range(8):
        wavelength = 2 * np.pi * 500_000.0 ** (i / 8)
        smooth = np.clip((8192 / wavelength - 1) / (4 - 1), 0, 1)
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.asarray(factors, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_a_table_of_rotary_factors_becomes_the_scaling_it_came_from(tmp_path, factor):
    config = _with_factors(tmp_path, _llama3_factors(factor)).config
    assert config.rope_scaling == RopeScaling("llama3", factor, 8192)
    plain = rotations(dataclasses.replace(config, rope_scaling=None))[0][0]
    scaled = rotations(config)[0][0]
    np.testing.assert_allclose(plain / scaled, _llama3_factors(factor), rtol=1e-5)


def test_a_table_on_top_of_another_scaling_is_refused(tmp_path):
    fields = metadata(Shape(d_head=4)) | {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    for factors, accepted in (([1, 1], True), ([1, 8], False)):
        weights = tensors(Shape(d_head=4)) | {"rope_freqs.weight": np.asarray(factors, np.float32)}
        file = open_gguf(write(tmp_path / "tiny.gguf", fields, weights))
        if accepted:
            assert read_config(file).rope_scaling == RopeScaling("linear", 2.0)
        else:
            with pytest.raises(CheckpointError, match="are not those of a Llama 3 scaling alone"):
                read_config(file)


def test_a_table_has_no_place_where_nothing_turns(tmp_path):
    factors = {"rope_freqs.weight": np.ones(1, np.float32)}
    path = write_decoder(tmp_path / "tiny.gguf", _random(CONFIGS["gpt2"]), "gpt2", extra=factors)
    with pytest.raises(CheckpointError, match=r"no place for tensors 'rope_freqs.weight'"):
        load_gguf(path)


def test_factors_of_one_change_nothing(tmp_path):
    assert _with_factors(tmp_path, np.ones(8, np.float32)).config.rope_scaling is None


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        (np.linspace(1, 8, 8), r"the rotary factors in 'rope_freqs.weight' \(1 to 8\) are not those of a Llama 3"),
        (np.arange(8), r"the rotary factors in 'rope_freqs.weight' \(0 to 7\)"),
        (np.full(8, np.nan), r"the rotary factors in 'rope_freqs.weight' \(nan to nan\)"),
        (np.ones(3), r"tensor 'rope_freqs.weight' has shape \(3,\), expected \(8,\)"),
    ],
)
def test_other_tables_of_factors_are_refused(tmp_path, factors, message):
    with pytest.raises(CheckpointError, match=message):
        _with_factors(tmp_path, factors.astype(np.float32))


def _read_scaling(tmp_path, **fields):
    rope = {f"llama.rope.{name.replace('__', '.')}": value for name, value in fields.items()}
    path = write(tmp_path / "tiny.gguf", metadata(Shape()) | rope, tensors(Shape()))
    return read_config(open_gguf(path)).rope_scaling


def test_linear_and_yarn_scaling_are_read(tmp_path):
    assert _read_scaling(tmp_path, scaling__type="linear", scaling__factor=4.0) == RopeScaling("linear", 4.0)
    # without a type, and under the older name
    assert _read_scaling(tmp_path, scaling__factor=4.0) == RopeScaling("linear", 4.0)
    assert _read_scaling(tmp_path, scale_linear=2.0) == RopeScaling("linear", 2.0)
    assert _read_scaling(tmp_path, scale_linear=2.0, scaling__factor=4.0) == RopeScaling("linear", 4.0)
    assert _read_scaling(tmp_path, scaling__type="linear", scale_linear=2.0) == RopeScaling("linear", 2.0)
    for nothing in ({}, {"scaling__factor": 0.0}, {"scaling__factor": 1.0}, {"scale_linear": 1.0}):
        assert _read_scaling(tmp_path, **nothing) is None
    assert _read_scaling(tmp_path, scaling__type="none", scaling__factor=4.0) is None
    for wrong in ({"scaling__factor": -1.0}, {"scaling__factor": 4.0, "scaling__attn_factor": 0.5}):
        with pytest.raises(CheckpointError, match="rotary scaling 'linear' with factor"):
            _read_scaling(tmp_path, **wrong)
    assert _read_scaling(tmp_path, scaling__type="none") is None
    yarn = {"scaling__type": "yarn", "scaling__factor": 4.0, "scaling__original_context_length": 8}
    assert _read_scaling(tmp_path, **yarn, scaling__finetuned=1) == RopeScaling("yarn", 4.0, 8)
    more = {"scaling__yarn_beta_fast": 16.0, "scaling__attn_factor": 0.5}
    gain = _read_scaling(tmp_path, **yarn, **more)
    assert gain == RopeScaling("yarn", 4.0, 8, beta_fast=16.0, attention_factor=0.5 * (0.1 * math.log(4.0) + 1))


@pytest.mark.parametrize(("architecture", "largest"), [("gemma2", 46), ("gemma3", 62)])
def test_the_largest_gemmas_scale_scores_by_width_over_heads(tmp_path, architecture, largest):
    """Their files do not say so: 46 and 62 layers are how their reader knows them."""
    fields = {name.replace("llama.", f"{architecture}."): value for name, value in metadata(Shape(d_head=4)).items()}
    fields |= {f"{architecture}.attention.sliding_window": 4}
    for n_layers, expected in ((largest, 0.5**0.5), (largest - 1, None)):
        weights = {f"blk.{layer}.attn_norm.weight": np.ones(16, np.float32) for layer in range(n_layers)}
        weights["token_embd.weight"] = tensors(Shape())["token_embd.weight"]
        fields[f"{architecture}.block_count"] = n_layers
        path = write(tmp_path / "tiny.gguf", fields, weights, architecture=architecture)
        assert read_config(open_gguf(path)).attn_scale == expected
    fields[f"{architecture}.attention.scale"] = 0.125
    path = write(tmp_path / "tiny.gguf", fields, weights, architecture=architecture)
    assert read_config(open_gguf(path)).attn_scale == 0.125


def test_the_pattern_of_windows_may_be_listed(tmp_path):
    fields = {name.replace("llama.", "gemma3."): value for name, value in metadata(Shape()).items()}
    for pattern, expected in (([True, False], (4, 0)), (1, (0, 0)), (2, (4, 0))):
        fields |= {"gemma3.attention.sliding_window": 4, "gemma3.attention.sliding_window_pattern": pattern}
        path = write(tmp_path / "tiny.gguf", fields, tensors(Shape()), architecture="gemma3")
        assert read_config(open_gguf(path)).windows == expected
