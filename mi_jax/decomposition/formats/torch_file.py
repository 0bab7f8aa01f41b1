"""Torch files (`.pt`): a zip of one pickle and the tensors' numbers, read and written without torch and unpickling."""

import os
import struct
import zipfile
from collections.abc import Mapping

import numpy as np

from mi_jax.decomposition.formats.tensors import Tensors
from mi_jax.decomposition.formats.torch_pickle import DTYPES, TorchTensor, flat, parse
from mi_jax.models.checkpoints.errors import CheckpointError

Plain = int | float | bool | str | None | tuple | list
_STORAGES = {dtype: name for name, dtype in DTYPES.items()}


def open_torch(path: str | os.PathLike) -> tuple[Tensors, dict[str, Plain]]:
    """The tensors of a torch file and its other values, nested dicts with dotted names.

    Raises:
      CheckpointError: missing, truncated, of torch's format before 1.6, a plain pickle, or with anything in it that is
        not a tensor or a plain container.
    """
    path = os.fspath(path)
    try:
        with open(path, "rb") as file:
            start = file.read(2)
        if start[:1] == b"\x80":
            raise CheckpointError(
                f"{path}: a plain pickle, or a torch file from before torch 1.6. Loading one can run any program, so "
                "it is never read; save it again with torch.save(state_dict, path)"
            )
        with zipfile.ZipFile(path) as archive:
            folder = _folder(archive, path)
            tree = parse(archive.read(f"{folder}/data.pkl"), path)
            if f"{folder}/byteorder" in archive.namelist() and archive.read(f"{folder}/byteorder") != b"little":
                raise CheckpointError(f"{path}: its numbers are big-endian, which is not read")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except (zipfile.BadZipFile, NotImplementedError, EOFError, KeyError) as error:
        raise CheckpointError(f"{path}: not a torch file, or truncated ({error})") from error
    if not isinstance(tree, dict) or not all(isinstance(name, str) for name in tree):
        raise CheckpointError(f"{path}: holds a {type(tree).__name__}, not a dict of named tensors")
    try:
        values = flat(tree)
    except RecursionError as error:
        raise CheckpointError(f"{path}: a dict in it holds itself") from error
    tensors = {name: value for name, value in values.items() if isinstance(value, TorchTensor)}
    plain = {name: value for name, value in values.items() if name not in tensors}
    found = Tensors(
        path, tuple(tensors), lambda name: _read(path, folder, tensors[name]), lambda name: tensors[name].shape
    )
    return found, plain


def _folder(archive: zipfile.ZipFile, path: str) -> str:
    pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CheckpointError(f"{path}: a zip file, but not of torch: it has {len(pickles)} entries data.pkl, not one")
    for entry in archive.infolist():
        # torch never compresses; a compressed entry could grow without bound
        if entry.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(f"{path}: entry {entry.filename!r} is compressed, which torch does not do")
    return pickles[0].removesuffix("/data.pkl")


def _read(path: str, folder: str, tensor: TorchTensor) -> np.ndarray:
    dtype, key, size = tensor.storage
    try:
        with zipfile.ZipFile(path) as archive:
            data = archive.read(f"{folder}/data/{key}")
    except (OSError, zipfile.BadZipFile, KeyError) as error:
        raise CheckpointError(f"{path}: the numbers of storage {key!r} cannot be read ({error})") from error
    if len(data) < size * dtype.itemsize:
        raise CheckpointError(
            f"{path}: storage {key!r} has {len(data)} bytes, {size} numbers of {dtype} were announced"
        )
    numbers = np.frombuffer(data, dtype, size)[tensor.offset :]
    if 0 in tensor.shape:
        return np.zeros(tensor.shape, dtype)
    strides = [step * dtype.itemsize for step in tensor.strides]
    return np.lib.stride_tricks.as_strided(numbers, tensor.shape, strides, writeable=False).copy()


def write_torch(path: str, values: Mapping[str, np.ndarray | Mapping | Plain]) -> None:
    """Writes a dict of tensors, numbers, texts and dicts of them as `torch.save` would, not atomically."""
    arrays: list[np.ndarray] = []
    data = b"\x80\x02" + _pickled(values, arrays) + b"."
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/byteorder", b"little")
        for key, array in enumerate(arrays):
            archive.writestr(f"archive/data/{key}", array.tobytes())
        archive.writestr("archive/version", b"3\n")


def _pickled(value, arrays: list[np.ndarray]) -> bytes:
    """Instructions that build one value (protocol 2)."""
    if isinstance(value, np.ndarray):
        return _tensor(value, arrays)
    if isinstance(value, Mapping):
        items = b"".join(_pickled(key, arrays) + _pickled(item, arrays) for key, item in value.items())
        return b"}(" + items + b"u"
    if isinstance(value, str):
        text = value.encode()
        return b"X" + struct.pack("<I", len(text)) + text
    if value is None or isinstance(value, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    if isinstance(value, int):
        number = value.to_bytes(9, "little", signed=True)
        return b"\x8a" + bytes([len(number)]) + number
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, tuple):
        return b"(" + b"".join(_pickled(item, arrays) for item in value) + b"t"
    raise TypeError(f"a torch file has no {type(value).__name__}")


def _tensor(array: np.ndarray, arrays: list[np.ndarray]) -> bytes:
    array = np.asarray(array, order="C")
    if array.dtype not in _STORAGES:
        raise TypeError(f"a torch file has no tensors of {array.dtype}")
    arrays.append(array)
    strides = tuple(step // array.itemsize for step in array.strides)
    storage = b"(" + _pickled("storage", arrays) + f"ctorch\n{_STORAGES[array.dtype]}\n".encode()
    storage += b"".join(_pickled(item, arrays) for item in (str(len(arrays) - 1), "cpu", array.size)) + b"tQ"
    described = b"".join(_pickled(item, arrays) for item in (0, tuple(array.shape), strides, False))
    hooks = b"ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + described + hooks + b"tR"
