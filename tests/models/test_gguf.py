"""GGUF files: loaded models against the oracle, and every kind of bad file."""

import contextlib
import dataclasses

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mi_jax as mi
from mi_jax.models import CheckpointError, load_gguf, open_gguf
from mi_jax.models.oracle import Oracle
from tests.models.gguf_files import F16, F32, TOKENS, Shape, metadata, tensors, write, write_tiny

TOLERANCE = 1e-5
TYPES = gguf.GGMLQuantizationType
PROMPT = np.random.default_rng(1).integers(0, len(TOKENS), 9)


def _parity(path) -> float:
    logits = mi.jit(load_gguf(path))(jnp.asarray(PROMPT[None], jnp.int32))[0]
    return float(np.abs(np.asarray(logits) - Oracle(path)(PROMPT)).max())


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        (Shape(), F32),
        (Shape(n_kv_heads=4, d_head=4, tied=False), F16),
        (Shape(n_layers=1, d_model=32, n_heads=2, n_kv_heads=1, d_head=16, d_mlp=64), TYPES.Q8_0),
        (Shape(n_layers=1, d_model=32, n_heads=2, n_kv_heads=2, d_head=32, d_mlp=32), TYPES.Q4_1),
    ],
    ids=["f32", "f16-untied", "q8_0", "q4_1"],
)
def test_the_loaded_model_equals_the_oracle(tmp_path, shape, kind):
    path = write_tiny(tmp_path / "tiny.gguf", shape, kind)
    assert _parity(path) < TOLERANCE
    if kind == F32:
        np.testing.assert_array_equal(load_gguf(path).embed, tensors(shape)["token_embd.weight"])


def test_the_oracle_sees_a_change_of_any_tensor(tmp_path):
    """The parity above would mean nothing if the oracle left a tensor out."""
    shape = Shape(n_layers=1, tied=False)
    weights = tensors(shape)
    path = write(tmp_path / "tiny.gguf", metadata(shape), weights)
    before = Oracle(path)(PROMPT)
    for name in weights:
        changed = weights | {name: weights[name][::-1] * 1.5}
        after = Oracle(write(tmp_path / "changed.gguf", metadata(shape), changed))(PROMPT)
        assert np.abs(after - before).max() > 1e-3, name


def test_the_oracle_takes_several_prompts_at_once(tmp_path):
    oracle = Oracle(write_tiny(tmp_path / "tiny.gguf"))
    prompts = [PROMPT[:3], PROMPT, PROMPT[4:5]]
    for prompt, logits in zip(prompts, oracle.many(prompts), strict=True):
        np.testing.assert_allclose(logits, oracle(prompt), atol=1e-12)
    with pytest.raises(ValueError, match=r"a prompt is a row of tokens of shape \[pos\]"):
        oracle(PROMPT[None])


def test_metadata_become_the_configuration(tmp_path):
    config = load_gguf(write_tiny(tmp_path / "tiny.gguf", Shape(tied=False))).config
    assert (config.n_layers, config.d_model, config.n_heads, config.n_kv_heads) == (2, 8, 4, 2)
    assert (config.d_head, config.d_mlp, config.d_vocab, config.n_ctx) == (2, 12, len(TOKENS), 16)
    assert (config.rope_theta, config.tied, config.name) == (500.0, False, "tiny.gguf")
    assert config.norm_eps == pytest.approx(1e-5)


def test_optional_metadata_have_the_formats_defaults(tmp_path):
    shape = Shape(n_kv_heads=4)
    optional = ("llama.attention.head_count_kv", "llama.attention.key_length", "llama.rope.freq_base")
    fields = {name: value for name, value in metadata(shape).items() if name not in optional}
    path = write(tmp_path / "tiny.gguf", fields, tensors(shape))
    config = load_gguf(path).config
    assert (config.n_kv_heads, config.d_head, config.rope_theta) == (4, 2, 10_000.0)
    assert _parity(path) < TOLERANCE


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    for path in (tmp_path / "absent.gguf", tmp_path):
        with pytest.raises(CheckpointError, match=f"{path}: no such file"):
            load_gguf(path)


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04 a pickle in a zip", b"\x80\x04\x95pickle", b"FUGG" * 40])
def test_another_kind_of_file_is_named(tmp_path, content):
    path = tmp_path / "other.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"other.gguf: not a GGUF file \(starts with"):
        open_gguf(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("gguf") / "whole.gguf", Shape(n_layers=1))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_truncation_is_a_checkpoint_error(whole, data):
    with open(whole, "rb") as file:
        content = file.read()
    # the writer pads the last tensor to the alignment; cutting only padding loses nothing
    end = max(t.data_offset + t.n_bytes for t in gguf.GGUFReader(whole).tensors)
    size = data.draw(st.integers(0, int(end) - 1))
    path = f"{whole}.cut"
    with open(path, "wb") as file:
        file.write(content[:size])
    with pytest.raises(CheckpointError, match=r"whole.gguf.cut: "):
        load_gguf(path)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_damaged_byte_is_a_checkpoint_error_or_another_number(whole, data):
    with open(whole, "rb") as file:
        content = bytearray(file.read())
    # past the magic and the two counts, which a damaged file could make astronomically large
    place = data.draw(st.integers(24, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    path = f"{whole}.damaged"
    with open(path, "wb") as file:
        file.write(content)
    with contextlib.suppress(CheckpointError):
        load_gguf(path)


def test_another_architecture_is_named(tmp_path):
    path = write(tmp_path / "tiny.gguf", metadata(Shape()), tensors(Shape()), architecture="qwen2")
    with pytest.raises(CheckpointError, match=r"tiny.gguf: architecture 'qwen2' is not read; only 'llama' is"):
        load_gguf(path)


@pytest.mark.parametrize("name", [n for n in metadata(Shape()) if n.startswith("llama") and "_kv" not in n])
def test_missing_metadata_are_named(tmp_path, name):
    fields = metadata(Shape())
    del fields[name]
    path = write(tmp_path / "tiny.gguf", fields, tensors(Shape()))
    if name in ("llama.attention.key_length", "llama.rope.freq_base"):
        load_gguf(path)
    else:
        with pytest.raises(CheckpointError, match=f"tiny.gguf: no metadata '{name}'"):
            load_gguf(path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"llama.attention.head_count": 0}, "the metadata do not describe a decoder"),
        ({"llama.attention.head_count_kv": 3}, "n_heads=4 is not a multiple of n_kv_heads=3"),
        ({"llama.embedding_length": "eight"}, "the metadata do not describe a decoder"),
        ({"llama.rope.scaling.type": "yarn"}, "rotary scaling 'yarn' is not read"),
        ({"llama.rope.dimension_count": 4}, "rotary positions on 4 of 2 dimensions are not read"),
    ],
)
def test_metadata_that_do_not_fit_are_named(tmp_path, fields, message):
    path = write(tmp_path / "tiny.gguf", metadata(Shape()) | fields, tensors(Shape()))
    with pytest.raises(CheckpointError, match=message):
        load_gguf(path)


@pytest.mark.parametrize("name", ["token_embd", "output_norm", "blk.1.attn_k", "blk.0.ffn_down"])
def test_tensors_of_wrong_shape_and_missing_ones_are_named(tmp_path, name):
    weights, name = tensors(Shape()), f"{name}.weight"
    wrong = weights | {name: weights[name][:-1]}
    with pytest.raises(CheckpointError, match=rf"tiny.gguf: tensor '{name}' has shape \(.*\), expected \("):
        load_gguf(write(tmp_path / "tiny.gguf", metadata(Shape()), wrong))
    del weights[name]
    with pytest.raises(CheckpointError, match=f"tiny.gguf: no tensor '{name}'; it has "):
        load_gguf(write(tmp_path / "tiny.gguf", metadata(Shape()), weights))


def test_transposed_weights_are_not_taken(tmp_path):
    shape = dataclasses.replace(Shape(), d_head=4)
    weights = tensors(shape)
    weights["blk.0.attn_q.weight"] = weights["blk.0.attn_q.weight"].T.copy()
    with pytest.raises(CheckpointError, match=r"'blk.0.attn_q.weight' has shape \(8, 16\), expected \(16, 8\)"):
        load_gguf(write(tmp_path / "tiny.gguf", metadata(shape), weights))


def test_a_tensor_that_would_go_unread_is_named(tmp_path):
    weights = tensors(Shape()) | {"blk.0.attn_q.bias": np.zeros(8, np.float32)}
    with pytest.raises(CheckpointError, match=r"tiny.gguf: no place for tensor 'blk.0.attn_q.bias'"):
        load_gguf(write(tmp_path / "tiny.gguf", metadata(Shape()), weights))


def test_a_tensor_type_that_is_not_read_is_named(tmp_path, monkeypatch):
    file = open_gguf(write_tiny(tmp_path / "tiny.gguf"))

    def unknown(data, kind):
        raise NotImplementedError(kind)

    monkeypatch.setattr("mi_jax.models.checkpoints.gguf.dequantize", unknown)
    with pytest.raises(CheckpointError, match=r"tiny.gguf: tensor 'token_embd.weight' has type F32, which is not read"):
        file.tensor("token_embd.weight")
