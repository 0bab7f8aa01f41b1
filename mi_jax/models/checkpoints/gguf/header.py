"""The header of a GGUF file: metadata and the table of tensors, every number checked before it is relied on.

The `gguf` library's reader trusts the header: a damaged count makes it allocate or loop without end, and a vocabulary
of 262144 tokens takes it seconds. Types, block sizes and dequantisation are the library's.

Source: ggml-org, "GGUF", https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import dataclasses
import itertools
import math
import os
import struct
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from mi_jax.models.checkpoints.errors import CheckpointError

_MAGIC, _VERSIONS, _ALIGNMENT = b"GGUF", (2, 3), 32
_LONGEST = 1 << 26  # bytes of one string or one array of numbers: far above any vocabulary
_MOST = 1 << 22  # metadata, tensors, or strings in an array
_DIMENSIONS = 4

_SCALARS = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.FLOAT64: "<f8",
    GGUFValueType.BOOL: "<u1",
}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where one tensor lies. `shape` is row-major, a linear map as [out in]; rows are whole blocks of `kind`."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    start: int
    n_bytes: int


@dataclasses.dataclass(frozen=True)
class Header:
    """Metadata by name, strings as bytes and arrays as lists or numpy arrays; tensors by name, in the file's order."""

    fields: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def read_header(path: str) -> Header:
    """Reads the header of a file.

    Raises:
      CheckpointError: no such file, another kind of file, big-endian, truncated, or not as the format has it.
    """
    if not os.path.isfile(path):
        raise CheckpointError(f"{path}: no such file; give the path of a .gguf file")
    with open(path, "rb") as file:
        return _Parser(path, file, os.path.getsize(path)).header()


class _Parser:
    def __init__(self, path: str, file: BinaryIO, size: int):
        self.path, self.file, self.size, self.position = path, file, size, 0

    def header(self) -> Header:
        magic = self.file.read(4)
        if magic != _MAGIC:
            raise CheckpointError(f"{self.path}: not a GGUF file (starts with {magic!r}, not {_MAGIC!r})")
        self.position = 4
        version = self.number("I", "the version")
        if version and not version & 0xFFFF:
            raise CheckpointError(
                f"{self.path}: a big-endian GGUF file is not read; run `gguf-convert-endian {self.path} little`"
            )
        if version not in _VERSIONS:
            raise CheckpointError(f"{self.path}: GGUF version {version} is not read; {_VERSIONS} are")
        n_tensors = self.count("Q", "tensors", at_least=32)
        n_fields = self.count("Q", "metadata", at_least=13)
        fields: dict[str, Any] = {}
        for i in range(n_fields):
            name = self.name(f"metadata {i}")
            if name in fields:
                raise self.damaged(f"metadata {name!r} appear twice")
            fields[name] = self.value(name)
        described = [self.tensor(i) for i in range(n_tensors)]
        return Header(fields, self.placed(described, self.alignment(fields)))

    def damaged(self, fault: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: damaged or truncated GGUF file of {self.size} bytes ({fault}); fetch it again"
        )

    def take(self, n: int, what: str) -> bytes:
        if n > self.size - self.position:
            raise self.damaged(f"{what}: {n} bytes announced at byte {self.position}")
        if n > _LONGEST:
            raise self.damaged(f"{what}: {n} bytes in one value")
        content = self.file.read(n)
        if len(content) != n:
            raise self.damaged(f"{what}: the file ends at byte {self.position + len(content)}")
        self.position += n
        return content

    def number(self, code: str, what: str) -> int:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(code), what))[0]

    def count(self, code: str, what: str, *, at_least: int) -> int:
        """How many items follow, each of which takes `at_least` so many bytes."""
        n = self.number(code, what)
        if n > min(_MOST, (self.size - self.position) // at_least):
            raise self.damaged(f"{n} {what} announced")
        return n

    def string(self, what: str) -> bytes:
        return self.take(self.number("Q", what), what)

    def name(self, what: str) -> str:
        try:
            return self.string(what).decode()
        except UnicodeDecodeError as error:
            raise self.damaged(f"the name of {what}: {error}") from error

    def kind_of_value(self, name: str) -> GGUFValueType:
        code = self.number("I", name)
        try:
            return GGUFValueType(code)
        except ValueError:
            raise self.damaged(f"metadata {name!r} have the unknown type {code}") from None

    def value(self, name: str) -> Any:
        kind = self.kind_of_value(name)
        if kind != GGUFValueType.ARRAY:
            return self.string(name) if kind == GGUFValueType.STRING else self.numbers(kind, 1, name)[0].item()
        kind = self.kind_of_value(name)
        if kind == GGUFValueType.ARRAY:
            raise CheckpointError(f"{self.path}: metadata {name!r} are an array of arrays, which is not read")
        if kind == GGUFValueType.STRING:
            return [self.string(name) for _ in range(self.count("Q", f"strings of {name!r}", at_least=8))]
        return self.numbers(kind, self.number("Q", name), name)

    def numbers(self, kind: GGUFValueType, n: int, name: str) -> np.ndarray:
        dtype = np.dtype(_SCALARS[kind])
        values = np.frombuffer(self.take(n * dtype.itemsize, name), dtype)
        if kind != GGUFValueType.BOOL:
            return values
        if (values > 1).any():
            raise self.damaged(f"metadata {name!r} have the truth value {values.max()}")
        return values.astype(bool)

    def alignment(self, fields: Mapping[str, Any]) -> int:
        value = fields.get("general.alignment", _ALIGNMENT)
        if type(value) is not int or value < 1 or value & (value - 1):
            raise self.damaged(f"an alignment of {value!r}, not a power of two")
        return value

    def tensor(self, index: int) -> tuple[str, GGMLQuantizationType, tuple[int, ...], int]:
        name = self.name(f"tensor {index}")
        n = self.number("I", name)
        if not 1 <= n <= _DIMENSIONS:
            raise self.damaged(f"tensor {name!r} has {n} dimensions")
        shape = struct.unpack(f"<{n}Q", self.take(8 * n, name))[::-1]
        if 0 in shape:
            raise self.damaged(f"tensor {name!r} has shape {shape}")
        code = self.number("I", name)
        try:
            kind = GGMLQuantizationType(code)
        except ValueError:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} has the unknown type {code}; a newer `gguf` may know it"
            ) from None
        return name, kind, shape, self.number("Q", name)

    def placed(self, described, alignment: int) -> dict[str, Tensor]:
        """The tensors with their places in the file, which must be within it and apart from each other."""
        data = -(-self.position // alignment) * alignment
        tensors: dict[str, Tensor] = {}
        for name, kind, shape, offset in described:
            per_block, bytes_of_block = GGML_QUANT_SIZES[kind]
            if name in tensors:
                raise self.damaged(f"tensor {name!r} appears twice")
            if shape[-1] % per_block:
                raise self.damaged(f"rows of tensor {name!r}, {shape[-1]} wide, are not whole {kind.name} blocks")
            if offset % alignment:
                raise self.damaged(f"tensor {name!r} begins at {offset}, not a multiple of {alignment}")
            n_bytes = math.prod(shape) // per_block * bytes_of_block
            if data + offset + n_bytes > self.size:
                end = data + offset + n_bytes
                raise CheckpointError(
                    f"{self.path}: truncated: tensor {name!r} ends at byte {end}, the file has {self.size}"
                )
            tensors[name] = Tensor(kind, shape, data + offset, n_bytes)
        ordered = sorted(tensors.items(), key=lambda item: item[1].start)
        for (first, a), (second, b) in itertools.pairwise(ordered):
            if a.start + a.n_bytes > b.start:
                raise self.damaged(f"tensors {first!r} and {second!r} overlap")
        return tensors
