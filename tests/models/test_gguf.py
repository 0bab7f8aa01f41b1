"""GGUF files: loaded models against the oracle, and every kind of bad file."""

import gguf
import jax.numpy as jnp
import numpy as np
import pytest

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


def test_another_architecture_is_named(tmp_path):
    path = write(tmp_path / "tiny.gguf", metadata(Shape()), tensors(Shape()), architecture="mamba")
    with pytest.raises(CheckpointError, match=r"tiny.gguf: architecture 'mamba' is not read; llama, .*gemma3 are"):
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
        ({"attention.head_count": 0}, "metadata 'llama.attention.head_count' is 0, expected at least 1"),
        ({"attention.head_count": [4, 2]}, r"is \[4, 2\], expected a whole number, the same in all layers"),
        ({"attention.head_count_kv": 0}, "'llama.attention.head_count_kv' is 0, expected at least 1"),
        ({"attention.head_count_kv": 3}, "do not describe a decoder: n_heads=4 is not a multiple of n_kv_heads=3"),
        ({"attention.value_length": 3}, "'llama.attention.value_length' is 3, expected the key length, 2"),
        ({"attention.layer_norm_rms_epsilon": "small"}, "epsilon' is 'small', expected a finite number"),
        ({"attention.layer_norm_rms_epsilon": float("nan")}, "epsilon' is nan, expected a finite number"),
        ({"attention.sliding_window": 4}, r"'llama.attention.sliding_window' \(1 such\) are not known for llama"),
        ({"embedding_length": "eight"}, "'llama.embedding_length' is 'eight', expected a whole number"),
        ({"embedding_length": 16}, r"tensor 'token_embd.weight' has shape \[\d+, 8\], the metadata say \[\d+, 16\]"),
        ({"block_count": 2**32 - 1}, "4294967295 layers announced, tensors of 2 there"),
        ({"feed_forward_length": 2**32 - 1}, "announce 4294967295 values, the largest tensor has"),
        ({"expert_count": 8}, "8 experts in architecture 'llama' are not read; 'qwen3moe' has them"),
        ({"rope.freq_base": 0.0}, "'llama.rope.freq_base' is 0.0, expected positive"),
        ({"attention.causal": 1}, "'llama.attention.causal' is 1, expected true or false"),
        ({"rope.scaling.type": 3}, "'llama.rope.scaling.type' is 3, expected a string"),
        ({"rope.scaling.type": "longrope"}, "rotary scaling 'longrope' with factor 0, .* is not read; 'linear' and"),
        ({"rope.scaling.type": "linear"}, "rotary scaling 'linear' with factor 0, .* is not read"),
        ({"rope.dimension_count": 4}, "the metadata do not describe a decoder: .*at most d_head=2"),
    ],
)
def test_metadata_that_do_not_fit_are_named(tmp_path, fields, message):
    fields = metadata(Shape()) | {f"llama.{name}": value for name, value in fields.items()}
    path = write(tmp_path / "tiny.gguf", fields, tensors(Shape()))
    with pytest.raises(CheckpointError, match=f"tiny.gguf: .*{message}"):
        load_gguf(path)


def test_turning_part_of_an_interleaved_head_is_refused(tmp_path):
    shape = Shape(d_head=4)
    path = write(tmp_path / "tiny.gguf", metadata(shape) | {"llama.rope.dimension_count": 2}, tensors(shape))
    with pytest.raises(CheckpointError, match="rotary positions on 2 of 4 dimensions are not read"):
        load_gguf(path)


def test_a_part_of_a_model_is_refused(tmp_path):
    path = write(tmp_path / "tiny.gguf", metadata(Shape()) | {"split.count": 3}, tensors(Shape()))
    with pytest.raises(CheckpointError, match="one of the 3 parts of a model; join them with `llama-gguf-split"):
        load_gguf(path)


@pytest.mark.parametrize("name", ["token_embd", "output_norm", "blk.1.attn_k", "blk.0.ffn_down"])
def test_tensors_of_wrong_shape_and_missing_ones_are_named(tmp_path, name):
    weights, name = tensors(Shape()), f"{name}.weight"
    wrong = weights | {name: weights[name][:-1]}
    with pytest.raises(CheckpointError, match=rf"tiny.gguf: tensor '{name}' has shape \[.*\], the .* \["):
        load_gguf(write(tmp_path / "tiny.gguf", metadata(Shape()), wrong))
    del weights[name]
    with pytest.raises(CheckpointError, match=f"tiny.gguf: missing tensors '{name}'"):
        load_gguf(write(tmp_path / "tiny.gguf", metadata(Shape()), weights))
    with pytest.raises(CheckpointError, match=f"tiny.gguf: no tensor '{name}'; it has "):
        open_gguf(tmp_path / "tiny.gguf").read(name)


def test_transposed_weights_are_not_taken(tmp_path):
    shape = Shape(d_head=4)
    weights = tensors(shape)
    weights["blk.0.attn_q.weight"] = weights["blk.0.attn_q.weight"].T.copy()
    with pytest.raises(CheckpointError, match=r"'blk.0.attn_q.weight' has shape \[8, 16\], .* \[16, 8\]"):
        load_gguf(write(tmp_path / "tiny.gguf", metadata(shape), weights))


@pytest.mark.parametrize("name", ["blk.1.attn_q.bias", "rope_factors_long.weight", "blk.0.attn_q_norm.weight"])
def test_a_tensor_that_would_go_unread_is_named(tmp_path, name):
    weights = tensors(Shape()) | {name: np.zeros(8, np.float32)}
    with pytest.raises(CheckpointError, match=f"tiny.gguf: no place for tensors '{name}'"):
        load_gguf(write(tmp_path / "tiny.gguf", metadata(Shape()), weights))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named_unless_they_are_wanted(tmp_path, value):
    weights = tensors(Shape())
    weights["blk.1.ffn_up.weight"][3, 2] = value
    path = write(tmp_path / "tiny.gguf", metadata(Shape()), weights)
    with pytest.raises(CheckpointError, match=r"tiny.gguf: tensor 'blk.1.ffn_up.weight' holds NaN or infinity"):
        load_gguf(path)
    np.testing.assert_array_equal(load_gguf(path, allow_nan=True).blocks.mlp.up[1, 2, 3], value)
