"""Torch files: what is read equals what was written, and nothing in a file is ever run."""

import os
import pickle
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mi_jax.decomposition.formats.torch_file import open_torch, write_torch
from mi_jax.decomposition.formats.torch_pickle import parse
from mi_jax.models.checkpoints.errors import CheckpointError
from tests.decomposition.formats import torch_files

ARRAYS = {
    "weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "k": np.array(7, np.int32),
    "empty": np.zeros((0, 4), np.float32),
    "double": np.array([1.5, -2.0]),
}


@pytest.mark.parametrize("protocol", [2, 4])
def test_reads_what_pythons_pickler_writes(protocol, tmp_path):
    path = tmp_path / "a.pt"
    nested = {"k": 32, "name": "ReLU", "rate": 0.5, "on": True, "none": None, "sizes": [1, 2], "pair": (3, "x")}
    torch_files.save(path, ARRAYS | {"state": nested}, transposed=("weight",), protocol=protocol)
    tensors, plain = open_torch(path)
    assert set(tensors.names) == set(ARRAYS)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(tensors.read(name), array)
        assert tensors.read(name).dtype == array.dtype
    assert plain == {f"state.{name}": value for name, value in nested.items()}


@settings(max_examples=30, deadline=None)
@given(
    array=hnp.arrays(np.float32, hnp.array_shapes(min_dims=0, max_dims=3, max_side=4), elements={"allow_nan": False}),
    number=st.integers(-(2**62), 2**62),
    text=st.text(st.characters(exclude_categories=("Cs",)), max_size=8),
)
def test_reads_what_it_writes(array, number, text, tmp_path_factory):
    path = tmp_path_factory.mktemp("torch") / "a.pt"
    values = {"number": number, "text": text, "pair": (1.5, None, False)}
    write_torch(os.fspath(path), {"array": array, "plain": values})
    tensors, plain = open_torch(path)
    np.testing.assert_array_equal(tensors.read("array"), array)
    assert plain == {f"plain.{name}": value for name, value in values.items()}


class Runs:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def archive(path, data, **entries):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("model/data.pkl", data)
        for name, value in entries.items():
            file.writestr(f"model/data/{name}", value)
    return path


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_program_in_the_pickle_is_named_and_not_run(protocol, tmp_path):
    made = os.fspath(tmp_path / "made")
    path = archive(tmp_path / "a.pt", pickle.dumps({"weight": Runs(made)}, protocol))
    with pytest.raises(CheckpointError, match=r"a\.pt: it names posix\.mkdir \(instruction (GLOBAL|STACK_GLOBAL) at"):
        open_torch(path)
    assert not os.path.exists(made)
    pickle.loads(pickle.dumps(Runs(made), protocol))
    assert os.path.exists(made)


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"\x80\x02ctorch\ndevice\n.", r"it names torch\.device"),
        (b"\x80\x02cbuiltins\neval\n(X\x01\x00\x00\x001tR.", r"it names builtins\.eval"),
        (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "the instruction NEWOBJ"),
        (b"\x80\x02(ios\nsystem\n.", "the instruction INST"),
        (b"\x80\x02I1\n.", "the instruction INT"),
        (b"\x80\x02}", "damaged"),
        (b"\x80\x02e.", "damaged"),
        (b"", "damaged"),
        (b"\x80\x02}X\xff\xff\x00\x00a", "damaged"),
        (b"\x80\x02}}.", "other than one value"),
        (b"\x80\x02X\x01\x00\x00\x00aX\x01\x00\x00\x00bs.", "damaged|added to a"),
        (b"\x80\x02X\x01\x00\x00\x00aQ.", "damaged|refers to"),
    ],
)
def test_instructions_beyond_containers_and_tensors_are_refused(data, fault):
    with pytest.raises(CheckpointError, match=fault):
        parse(data, "a.pt")


def tensor(*layout):
    return torch_files.pickled({"w": torch_files.Tensor(*layout)})


def test_a_tensor_that_reaches_beyond_its_numbers_is_refused(tmp_path):
    numbers = np.arange(4, dtype=np.float32).tobytes()
    good, _ = open_torch(archive(tmp_path / "good.pt", tensor((2, 2), (2, 1)), **{"0": numbers}))
    np.testing.assert_array_equal(good.read("w"), [[0, 1], [2, 3]])
    for shape, strides, offset in (((2, 3), (3, 1), 0), ((2, 2), (2, 1), 1), ((9,), (0,), 0), ((2,), (-1,), 3)):
        with pytest.raises(CheckpointError, match=r"beyond its 4 numbers|is not described by"):
            open_torch(archive(tmp_path / "bad.pt", tensor(shape, strides, offset), **{"0": numbers}))
    short, _ = open_torch(archive(tmp_path / "short.pt", tensor((2, 2), (2, 1)), **{"0": numbers[:8]}))
    with pytest.raises(CheckpointError, match="8 bytes, 4 numbers of float32 were announced"):
        short.read("w")
    absent, _ = open_torch(archive(tmp_path / "absent.pt", tensor((2, 2), (2, 1))))
    with pytest.raises(CheckpointError, match="storage '0' cannot be read"):
        absent.read("w")


def test_files_that_are_none_of_torch_are_named(tmp_path):
    plain = tmp_path / "plain.pt"
    plain.write_bytes(pickle.dumps({"weight": 1}))
    with pytest.raises(CheckpointError, match=r"plain\.pt: a plain pickle"):
        open_torch(plain)
    torch_files.save(tmp_path / "whole.pt", ARRAYS)
    whole = (tmp_path / "whole.pt").read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.pt").write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"cut\.pt: not a torch file, or truncated"):
            open_torch(tmp_path / "cut.pt")
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as file:
        file.writestr("data.json", "{}")
    with pytest.raises(CheckpointError, match="not of torch"):
        open_torch(tmp_path / "other.pt")
    with zipfile.ZipFile(tmp_path / "squeezed.pt", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("model/data.pkl", pickle.dumps({}, 2))
    with pytest.raises(CheckpointError, match="compressed"):
        open_torch(tmp_path / "squeezed.pt")
    with pytest.raises(CheckpointError, match="holds a list"):
        open_torch(archive(tmp_path / "list.pt", pickle.dumps([1], 2)))
    looped: dict = {}
    looped["a"] = looped
    with pytest.raises(CheckpointError, match="holds itself"):
        open_torch(archive(tmp_path / "loop.pt", pickle.dumps(looped, 2)))
