"""Safetensors files: read and written as the format's own library does it, and every kind of bad file."""

import json
import os
import struct

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy as library

from mi_jax.core.errors import InputError
from mi_jax.models.checkpoints.directory import INDEX, WEIGHTS, open_directory
from mi_jax.models.checkpoints.errors import CheckpointError
from mi_jax.models.checkpoints.safetensors import DTYPES, open_safetensors
from mi_jax.models.checkpoints.writer import Described, write_safetensors, write_weights

_RNG = np.random.default_rng(0)


def _tensors() -> dict[str, np.ndarray]:
    out = {}
    for code, dtype in DTYPES.items():
        raw = _RNG.integers(0, 2 if code == "BOOL" else 256, 24 * dtype.itemsize, np.uint8)
        out[f"t.{code}"] = raw.view(dtype).reshape(2, 3, 4)
    return out | {"scalar": np.asarray(3.5, np.float32), "none": np.zeros((3, 0, 2), np.float16)}


def _bytes(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def _described(tensors: dict[str, np.ndarray]) -> list[Described]:
    return [Described(name, value.dtype, value.shape) for name, value in tensors.items()]


def test_every_type_of_a_file_of_the_library_is_read_bit_for_bit(tmp_path):
    tensors = _tensors()
    path = tmp_path / "a.safetensors"
    library.save_file({n: v for n, v in tensors.items() if v.dtype != ml_dtypes.float8_e5m2}, path, {"format": "pt"})
    file = open_safetensors(path)
    assert file.metadata == {"format": "pt"}
    assert set(file.names()) == set(tensors) - {"t.F8_E5M2"}
    for name in file.names():
        assert file.shape(name) == tensors[name].shape
        assert file.dtype(name) == file.read(name).dtype == tensors[name].dtype
        assert file.read(name).tobytes() == tensors[name].tobytes()


def test_rows_are_read_alone(tmp_path):
    x = np.arange(60, dtype=np.float32).reshape(5, 4, 3)
    library.save_file({"pad": np.ones(7, np.float32), "x": x}, tmp_path / "a.safetensors")
    file = open_safetensors(tmp_path / "a.safetensors")
    for start, stop in [(0, 5), (1, 3), (4, 5), (2, None), (2, 2), (-2, None)]:
        np.testing.assert_array_equal(file.read("x", start, stop), x[start:stop])


def test_the_library_reads_what_is_written_with_every_tensor_aligned_to_its_type(tmp_path):
    tensors = _tensors()
    path = tmp_path / "a.safetensors"
    asked = []
    write_safetensors(str(path), _described(tensors), lambda n: (asked.append(n), tensors[n])[1], {"format": "pt"})
    assert sorted(asked) == sorted(tensors)
    read = dict(safetensors.deserialize(path.read_bytes()))
    assert {n: bytes(each["data"]) for n, each in read.items()} == {n: v.tobytes() for n, v in tensors.items()}
    assert {n: each["dtype"] for n, each in read.items()} == {
        n: next(code for code, dtype in DTYPES.items() if dtype == v.dtype) for n, v in tensors.items()
    }
    for entry in open_safetensors(path).entries.values():
        assert entry.start % entry.dtype.itemsize == 0


def test_what_is_written_is_checked_against_what_was_announced(tmp_path):
    def write(dtype, shape, value):
        write_safetensors(str(tmp_path / "a"), [Described("x", np.dtype(dtype), shape)], lambda _: value, {})

    with pytest.raises(InputError, match=r"'x' is float32 \(2,\), it was to be"):
        write(np.float32, (3,), np.zeros(2, np.float32))
    with pytest.raises(InputError, match="'x' is complex64, which safetensors cannot hold"):
        write(np.complex64, (2,), np.zeros(2, np.complex64))


@pytest.mark.parametrize(("limit", "files"), [(1e9, 1), (100, 3), (1, 6)])
def test_weights_above_the_limit_are_sharded_with_an_index(tmp_path, limit, files):
    tensors = {f"t{i}": np.full((12,), i, np.float32) for i in range(6)}
    write_weights(str(tmp_path), _described(tensors), tensors.__getitem__, limit)
    written = sorted(os.listdir(tmp_path))
    assert len([name for name in written if name.endswith(".safetensors")]) == files
    if files == 1:
        assert written == [WEIGHTS]
    else:
        index = json.loads((tmp_path / INDEX).read_text())
        assert index["metadata"] == {"total_size": 6 * 48}
        assert sorted(set(index["weight_map"].values())) == [
            f"model-{i:05}-of-{files:05}.safetensors" for i in range(1, files + 1)
        ]
        assert all(os.path.getsize(tmp_path / name) < limit + 700 or limit == 1 for name in written)
    source = open_directory(tmp_path)
    assert sorted(source.names()) == sorted(tensors)
    for name, value in tensors.items():
        assert (source.shape(name), source.dtype(name)) == ((12,), np.float32)
        np.testing.assert_array_equal(source.read(name, 2, 5), value[2:5])


_DUPLICATE = b'{"a":' + json.dumps(_entry()).encode() + b',"a":' + json.dumps(_entry()).encode() + b"}"


_BAD = [
    (struct.pack("<Q", 2**63) + b"{}", "announces a header of 9223372036854775808 bytes and has 10 bytes"),
    (struct.pack("<Q", 3) + b"{}", "announces a header of 3 bytes"),
    (_bytes(b"\x80\x04\x95pickle"), "damaged header .it begins with"),
    (_bytes(b'{"a": \xff}'), "damaged header"),
    (_bytes(b'{"a":' + b"[" * 100_000), "damaged header"),
    (_bytes([1]), "it begins with"),
    (_bytes(_DUPLICATE, bytes(8)), "'a' is there twice"),
    (_bytes({"a": _entry("Q4")}, bytes(8)), "type 'Q4', which is not read; F64, F32"),
    (_bytes({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)), "lacks its dtype, shape or data_offsets"),
    (_bytes({"a": _entry(shape=[2.0])}, bytes(8)), "has shape .2.0."),
    (_bytes({"a": _entry(shape=[-2], offsets=[8, 0])}, bytes(8)), "has shape .-2."),
    (_bytes({"a": _entry(shape=[True, 2])}, bytes(8)), "has shape .True, 2."),
    (_bytes({"a": _entry(shape=[3])}, bytes(8)), "takes 12 bytes, its offsets are 0 to 8"),
    (_bytes({"a": _entry(shape=[2**40, 2**40])}, bytes(8)), "larger than any file"),
    (_bytes({"a": _entry(shape=[0, 2**62], offsets=[0, 0])}), "larger than any file"),
    (_bytes({"a": _entry(shape=[1] * 40, offsets=[0, 4])}, bytes(4)), "damaged header: tensor 'a' has shape"),
    (_bytes({"a": _entry(), "b": _entry(offsets=[4, 12])}, bytes(12)), "'b' overlaps 'a'"),
    (_bytes({"a": _entry(), "b": _entry(offsets=[12, 20])}, bytes(20)), "'b' leaves a gap after 'a'"),
    (_bytes({"a": _entry(offsets=[8, 16])}, bytes(16)), "'a' leaves a gap after 'the header'"),
    (_bytes({"a": _entry()}, bytes(7)), "truncated: its tensors end at byte"),
    (_bytes({"a": _entry()}, bytes(9)), "1 bytes after its last tensor belong to none"),
    (_bytes({"__metadata__": {"a": 1}}), "__metadata__ is not an object of strings"),
]
# the library keeps the last tensor of a name, and reads axes that no array can have
_ACCEPTED_THERE = ("'a' is there twice", "damaged header: tensor 'a' has shape", "larger than any file")


@pytest.mark.parametrize(("content", "message"), _BAD, ids=[message for _, message in _BAD])
def test_a_bad_file_is_refused_by_its_fault(tmp_path, content, message):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_safetensors(path)
    assert str(caught.value).startswith(str(path))
    if message not in _ACCEPTED_THERE:
        with pytest.raises(safetensors.SafetensorError):
            safetensors.deserialize(content)


def test_every_truncation_of_a_file_is_refused(tmp_path):
    whole = library.save({"x": np.arange(5, dtype=np.float32), "y": np.ones(3, np.float16)})
    for size in range(len(whole)):
        path = tmp_path / f"{size}.safetensors"
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="truncated"):
            open_safetensors(path)


def test_a_file_that_shrinks_or_vanishes_while_it_is_open_is_an_error(tmp_path):
    path = tmp_path / "a.safetensors"
    library.save_file({"x": np.ones(50, np.float32)}, path)
    file = open_safetensors(path)
    with pytest.raises(CheckpointError, match="no tensor 'y'; it has x"):
        file.read("y")
    os.truncate(path, 120)
    with pytest.raises(CheckpointError, match="'x' ends early"):
        file.read("x")
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        file.read("x")
    with pytest.raises(CheckpointError, match="No such file"):
        open_safetensors(path)


def _sharded(folder, **changes) -> None:
    library.save_file({"a": np.ones(2, np.float32)}, folder / "model-1.safetensors")
    weight_map = {"a": "model-1.safetensors"} | changes
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"b": "model-2.safetensors"}, "names 'model-2.safetensors', which is not there"),
        ({"b": "model-1.safetensors"}, "'model-1.safetensors' holds 'b', which it does not"),
        ({"b": "../model-1.safetensors"}, "shards are .safetensors files beside it"),
        ({"b": "/etc/x.safetensors"}, "shards are .safetensors files beside it"),
        ({"b": "..\\x.safetensors"}, "shards are .safetensors files beside it"),
        ({"b": "model-1.bin"}, "shards are .safetensors files beside it"),
        ({"b": 3}, "the index names 3"),
    ],
)
def test_a_bad_index_is_refused_by_its_fault(tmp_path, changes, message):
    _sharded(tmp_path)
    assert open_directory(tmp_path).names() == ["a"]
    _sharded(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        open_directory(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"weight_map": []}', '{"weight_map": {}}', "{}", "[" * 100_000])
def test_an_index_that_is_no_index_is_refused(tmp_path, text):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=INDEX.replace(".", r"\.")):
        open_directory(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_refused_with_the_command_that_converts(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(CheckpointError, match=rf"{name}, not safetensors.*architectures.*safe_serialization=True"):
        open_directory(tmp_path)


def test_a_directory_without_weights_says_what_it_holds(tmp_path):
    with pytest.raises(CheckpointError, match="it holds nothing"):
        open_directory(tmp_path)
    (tmp_path / "adapter.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"neither {WEIGHTS} nor {INDEX}; it holds adapter.safetensors"):
        open_directory(tmp_path)
    with pytest.raises(CheckpointError, match="no such directory"):
        open_directory(tmp_path / "absent")


def test_bfloat16_is_the_type_of_jax(tmp_path):
    x = jnp.asarray([1.0, -2.5], jnp.bfloat16)
    library.save_file({"x": np.asarray(x)}, tmp_path / "a.safetensors")
    assert open_safetensors(tmp_path / "a.safetensors").read("x").dtype == x.dtype
