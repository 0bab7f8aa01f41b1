"""Safetensors files, read tensor by tensor, their headers checked before anything else is read.

A file is the length of its header (8 bytes, little endian), the header (JSON: for every tensor its type, shape and
place), and the tensors' bytes without gaps. A file is read with plain reads and not mapped into memory, where the pages
once touched would count as the program's own.

Source: https://github.com/huggingface/safetensors, section "Format".
"""

import collections
import dataclasses
import json
import math
import os
import struct
from typing import Any

import numpy as np

from mi_jax.core.dtypes import SAFETENSORS_DTYPES
from mi_jax.models.checkpoints.errors import CheckpointError

# no model has complex weights
DTYPES = {name: dtype for name, dtype in SAFETENSORS_DTYPES.items() if dtype.kind != "c"}
_MAX_HEADER = 100_000_000  # the limit of the format's own library
_MAX_RANK = 32


@dataclasses.dataclass(frozen=True)
class _Entry:
    """Where a tensor lies: bytes `start` to `stop` of the file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class SafetensorsFile:
    """One opened file: a `Source`. `metadata` are the strings that its header holds beside the tensors."""

    path: str
    entries: dict[str, _Entry]
    metadata: dict[str, str]

    def names(self) -> list[str]:
        return list(self.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> np.dtype:
        return self._entry(name).dtype

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        entry = self._entry(name)
        if not entry.shape:
            start, stop, shape, row = 0, 1, (), entry.dtype.itemsize
        else:
            start, stop, _ = slice(start, stop).indices(entry.shape[0])
            shape = (max(0, stop - start), *entry.shape[1:])
            row = math.prod(entry.shape[1:]) * entry.dtype.itemsize
        values = np.empty(math.prod(shape), entry.dtype)
        rest = values.view(np.uint8).data
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(entry.start + start * row)
                while rest:
                    n = file.readinto(rest)
                    if not n:
                        raise CheckpointError(f"{self.path}: tensor {name!r} ends early: the file has shrunk since")
                    rest = rest[n:]
        except OSError as error:
            raise CheckpointError(f"{self.path}: tensor {name!r} cannot be read ({error})") from error
        return values.reshape(shape)

    def _entry(self, name: str) -> _Entry:
        if name not in self.entries:
            raise CheckpointError(f"{self.path}: no tensor {name!r}; it has {_some(list(self.entries))}")
        return self.entries[name]


def open_safetensors(path: str | os.PathLike) -> SafetensorsFile:
    """Opens one file and checks its header against its size; nothing else is read.

    Raises:
      CheckpointError: missing, truncated, not JSON, a name twice, an unknown type, or tensors that overlap, leave a
        gap, reach outside of the file or are not as long as their type and shape say.
    """
    path = os.fspath(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            if len(prefix) < 8:
                raise CheckpointError(f"{path}: not a safetensors file, or truncated: it has {size} bytes")
            (length,) = struct.unpack("<Q", prefix)
            if length > min(size - 8, _MAX_HEADER):
                raise CheckpointError(
                    f"{path}: not a safetensors file, or truncated: it announces a header of {length} bytes and has "
                    f"{size} bytes in all"
                )
            header = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); give a .safetensors file") from error
    if len(header) < length:
        raise CheckpointError(f"{path}: truncated while it was read")
    described = _described(path, header)
    metadata = described.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: damaged header: __metadata__ is not an object of strings")
    begin = 8 + length
    entries = {name: _checked(path, name, value, begin) for name, value in described.items()}
    _check_cover(path, entries, begin, size)
    return SafetensorsFile(path, entries, metadata)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (name, _), *_ = collections.Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{name!r} is there twice")
    return found


def _described(path: str, header: bytes) -> dict[str, Any]:
    try:
        if not header.startswith(b"{"):
            raise ValueError(f"it begins with {header[:8]!r}")
        described = json.loads(header.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a safetensors file, or a damaged header ({error})") from error
    return described


def _checked(path: str, name: str, value: Any, begin: int) -> _Entry:
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= set(value):
        raise CheckpointError(f"{path}: damaged header: tensor {name!r} lacks its dtype, shape or data_offsets")
    kind, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES:
        raise CheckpointError(f"{path}: tensor {name!r} has type {kind!r}, which is not read; {', '.join(DTYPES)} are")
    if not (_counts(shape) and _counts(offsets) and len(offsets) == 2 and len(shape) <= _MAX_RANK):
        raise CheckpointError(f"{path}: damaged header: tensor {name!r} has shape {shape!r} and offsets {offsets!r}")
    dtype, (start, stop) = DTYPES[kind], offsets
    # of an empty tensor too the other axes must be countable
    if math.prod(size or 1 for size in shape) * dtype.itemsize >= 2**63:
        raise CheckpointError(f"{path}: damaged header: tensor {name!r} of shape {shape} is larger than any file")
    n_bytes = math.prod(shape) * dtype.itemsize
    if stop - start != n_bytes:
        raise CheckpointError(
            f"{path}: damaged header: tensor {name!r} of type {kind} and shape {shape} takes {n_bytes} bytes, its "
            f"offsets are {start} to {stop}"
        )
    return _Entry(dtype, tuple(shape), begin + start, begin + stop)


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(each) is int and 0 <= each < 2**63 for each in value)


def _check_cover(path: str, entries: dict[str, _Entry], begin: int, size: int) -> None:
    end, before = begin, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            what = "overlaps" if entry.start < end else "leaves a gap after"
            raise CheckpointError(f"{path}: damaged header: tensor {name!r} {what} {before!r}")
        end, before = entry.stop, name
    if end != size:
        fault = f"truncated: its tensors end at byte {end}, it has {size}"
        if end < size:
            fault = f"damaged: {size - end} bytes after its last tensor belong to none"
        raise CheckpointError(f"{path}: {fault}; fetch it again")


def _some(names: list[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (f", … ({len(names)} in all)" if len(names) > limit else "")
