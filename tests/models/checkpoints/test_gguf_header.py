"""The header of a GGUF file: counts, types and places that cannot be, each refused with its reason and at no cost."""

import struct
import tracemalloc

import gguf
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize

from mi_jax.models import CheckpointError, load_gguf, open_gguf
from tests.models.gguf_files import Shape, metadata, tensors, write, write_tiny

KINDS = GGMLQuantizationType


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _tensor(name: str = "a", shape=(4,), kind: int = 0, offset: int = 0) -> bytes:
    return _string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def _file(tmp_path, *, fields=(), described=(), n_fields=None, n_tensors=None, version=3, data=bytes(256)):
    counts = (
        len(described) if n_tensors is None else n_tensors,
        len(fields) if n_fields is None else n_fields,
    )
    header = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(fields) + b"".join(described)
    path = tmp_path / "made.gguf"
    path.write_bytes(header + bytes(-len(header) % 32) + data)
    return path


def test_a_header_made_by_hand_is_read(tmp_path):
    fields = [
        _string("text") + struct.pack("<I", 8) + _string("é"),
        _string("small") + struct.pack("<Ib", 1, -3),
        _string("long") + struct.pack("<Iq", 11, -(2**40)),
        _string("yes") + struct.pack("<I?", 7, True),
        _string("halves") + struct.pack("<IIQ2d", 9, 12, 2, 0.5, 1.5),
        _string("names") + struct.pack("<IIQ", 9, 8, 2) + _string("b") + _string(""),
    ]
    data = np.arange(6, dtype=np.float32).tobytes() + bytes(8) + np.arange(3, dtype=np.float16).tobytes()
    path = _file(tmp_path, fields=fields, described=[_tensor("w", (3, 2)), _tensor("h", (3,), 1, 32)], data=data)
    file = open_gguf(path)
    assert [file.field(name) for name in ("text", "small", "long", "yes")] == ["é", -3, -(2**40), True]
    assert file.field("halves") == [0.5, 1.5]
    assert file.field("names") == ["b", ""]
    np.testing.assert_array_equal(file.read("w"), [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(file.read("w", 1), [[3, 4, 5]])
    np.testing.assert_array_equal(file.read("h", 1, 3), np.float32([1, 2]))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({"version": 1}, r"GGUF version 1 is not read; \(2, 3\) are"),
        ({"version": 0}, "GGUF version 0 is not read"),
        ({"version": 3 << 24}, r"a big-endian GGUF file is not read; run `gguf-convert-endian .* little`"),
        ({"n_tensors": 2**60}, f"{2**60} tensors announced"),
        ({"n_fields": 2**60}, f"{2**60} metadata announced"),
        ({"fields": [struct.pack("<Q", 2**60) + bytes(8)]}, f"metadata 0: {2**60} bytes announced"),
        ({"fields": [_string("a") + struct.pack("<IIQ", 9, 8, 2**60)]}, f"{2**60} strings of 'a' announced"),
        ({"fields": [_string("a") + struct.pack("<IIQ", 9, 12, 2**60)]}, f"a: {2**63} bytes announced"),
        ({"fields": [_string("a") + struct.pack("<IIQ", 9, 9, 1)]}, "'a' are an array of arrays, which is not read"),
        ({"fields": [_string("a") + struct.pack("<I", 13)]}, "'a' have the unknown type 13"),
        ({"fields": [_string("a") + struct.pack("<IB", 7, 2)]}, "'a' have the truth value 2"),
        ({"fields": [_string("a") + struct.pack("<Ib", 1, 2)] * 2}, "metadata 'a' appear twice"),
        ({"fields": [struct.pack("<Q", 1) + b"\xff" + bytes(5)]}, "the name of metadata 0"),
        ({"fields": [_string("general.alignment") + struct.pack("<II", 4, 24)]}, "an alignment of 24, not a power"),
        ({"fields": [_string("general.alignment") + struct.pack("<If", 6, 32)]}, "an alignment of 32.0, not a power"),
        ({"described": [_tensor(shape=())]}, "tensor 'a' has 0 dimensions"),
        ({"described": [_tensor(shape=(1,) * 5)]}, "tensor 'a' has 5 dimensions"),
        ({"described": [_tensor(shape=(4, 0))]}, r"tensor 'a' has shape \(0, 4\)"),
        ({"described": [_tensor(shape=(2**40, 2**40))]}, "truncated: tensor 'a' ends at byte"),
        ({"described": [_tensor(kind=999)]}, "tensor 'a' has the unknown type 999; a newer `gguf` may know it"),
        ({"described": [_tensor(kind=4)]}, "tensor 'a' has the unknown type 4"),
        ({"described": [_tensor(shape=(33,), kind=8)]}, "33 wide, are not whole Q8_0 blocks"),
        ({"described": [_tensor(offset=16)]}, "tensor 'a' begins at 16, not a multiple of 32"),
        ({"described": [_tensor(offset=256)]}, "truncated: tensor 'a' ends at byte"),
        ({"described": [_tensor(), _tensor()]}, "tensor 'a' appears twice"),
        ({"described": [_tensor("a", (9,)), _tensor("b", offset=32)]}, "tensors 'a' and 'b' overlap"),
        ({"described": [_tensor("a"), _tensor("b")]}, "tensors 'a' and 'b' overlap"),
    ],
)
def test_headers_that_cannot_be_are_refused_at_no_cost(tmp_path, made, message):
    path = _file(tmp_path, **made)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=f"made.gguf: .*{message}"):
            open_gguf(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def _readable(kind: KINDS) -> bool:
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _raw_file(tmp_path, raw: np.ndarray, kind: KINDS) -> str:
    writer = gguf.GGUFWriter(str(tmp_path / "raw.gguf"), "llama")
    writer.add_tensor("w", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(tmp_path / "raw.gguf")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if _readable(kind)], ids=lambda kind: kind.name)
def test_every_quantisation_that_the_library_knows_is_dequantised(tmp_path, kind):
    """Random blocks, whole and in slices of rows; 300 rows are more than one piece."""
    rng = np.random.default_rng(0)
    per_block, n_bytes = GGML_QUANT_SIZES[kind]
    row = -(-1024 // per_block) * n_bytes
    raw = rng.integers(0, 256, (300, row), np.uint8)
    with np.errstate(all="ignore"):
        expected = dequantize(raw, kind)
        file = open_gguf(_raw_file(tmp_path, raw, kind))
        assert file.shape("w") == expected.shape
        assert file.dtype("w") == np.float32
        np.testing.assert_array_equal(file.read("w"), expected)
        np.testing.assert_array_equal(file.read("w", 7, 290), expected[7:290])
        assert file.read("w", 5, 5).shape == (0, expected.shape[1])


@pytest.mark.parametrize(
    "kind",
    [KINDS.Q4_0, KINDS.Q4_1, KINDS.Q5_0, KINDS.Q5_1, KINDS.Q8_0, KINDS.BF16, KINDS.F16],
    ids=lambda kind: kind.name,
)
def test_a_quantised_model_has_the_quantised_values(tmp_path, kind):
    shape = Shape(n_layers=1, d_model=32, n_heads=2, n_kv_heads=1, d_head=16, d_mlp=64, tied=False)
    weights = tensors(shape)
    model = load_gguf(write_tiny(tmp_path / "tiny.gguf", shape, kind))
    rounded = {name: dequantize(quantize(w, kind), kind) for name, w in weights.items() if w.ndim == 2}
    np.testing.assert_array_equal(model.embed, rounded["token_embd.weight"])
    np.testing.assert_array_equal(model.unembed, rounded["output.weight"])
    np.testing.assert_array_equal(model.blocks.mlp.down[0], rounded["blk.0.ffn_down.weight"].T)
    np.testing.assert_array_equal(model.blocks.attn.v[0].reshape(32, 16), rounded["blk.0.attn_v.weight"].T)
    np.testing.assert_array_equal(model.final_norm.weight, weights["output_norm.weight"])
    assert np.abs(rounded["output.weight"] - weights["output.weight"]).max() > 0


def test_a_type_that_the_library_cannot_dequantise_is_named(tmp_path):
    weights = tensors(Shape())
    writer = gguf.GGUFWriter(str(tmp_path / "tiny.gguf"), "llama")
    for name, value in metadata(Shape()).items():
        if isinstance(value, str | list):
            (writer.add_string if isinstance(value, str) else writer.add_array)(name, value)
        else:
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(name, value)
    for name, value in weights.items():
        writer.add_tensor(name, value.astype(np.float64) if name.endswith("attn_v.weight") else value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"'blk.0.attn_v.weight' has type F64, which is not read; these are: F32"):
        load_gguf(tmp_path / "tiny.gguf")


def test_a_file_that_shrinks_after_it_was_opened_is_refused(tmp_path):
    path = tmp_path / "tiny.gguf"
    file = open_gguf(write(path, metadata(Shape()), tensors(Shape())))
    path.write_bytes(path.read_bytes()[: file.tensors["token_embd.weight"].start + 5])
    with pytest.raises(CheckpointError, match=r"truncated in tensor 'token_embd.weight' since it was opened"):
        file.read("token_embd.weight")
