"""An opened GGUF file: metadata, and tensors dequantised as they are read."""

import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from mi_jax.models.checkpoints.errors import CheckpointError
from mi_jax.models.checkpoints.gguf.header import Tensor, read_header

_PIECE = 1 << 18  # values dequantised at once: the intermediate arrays then stay in the cache


@dataclasses.dataclass(frozen=True)
class GGUF:
    """A file whose header has been read and checked; `read` takes one tensor's rows at a time from the disk.

    It is a `Source` of `mi_jax.models.checkpoints`: tensors have the names of the file and are float32, whatever they
    are stored as (float16 and bfloat16 fit in it exactly).
    """

    path: str
    fields: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def field(self, name: str) -> Any:
        """One metadata value: a number, a string, or a list of them. Raises CheckpointError if the file lacks it."""
        if name not in self.fields:
            raise CheckpointError(f"{self.path}: no metadata {name!r}")
        value = self.fields[name]
        try:
            if isinstance(value, bytes):
                return value.decode()
            if isinstance(value, list):
                return [each.decode() for each in value]
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path}: damaged metadata {name!r} ({error})") from error
        return value.tolist() if isinstance(value, np.ndarray) else value

    def get(self, name: str, default: Any) -> Any:
        return self.field(name) if name in self.fields else default

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, row-major: a linear map has shape [out in]."""
        return self._tensor(name).shape

    def dtype(self, name: str) -> np.dtype:
        """float32. Raises CheckpointError where the tensor's type cannot be dequantised."""
        kind = self._tensor(name).kind
        if not _readable(kind):
            readable = ", ".join(each.name for each in GGMLQuantizationType if _readable(each))
            raise CheckpointError(
                f"{self.path}: tensor {name!r} has type {kind.name}, which is not read; these are: {readable}"
            )
        return np.dtype(np.float32)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows [start:stop] of a tensor's first axis as float32.

        Raises:
          CheckpointError: no such tensor, a type that is not read, or the file has shrunk since it was opened.
        """
        self.dtype(name)
        tensor = self._tensor(name)
        start, stop, _ = slice(start, stop).indices(tensor.shape[0])
        if len(tensor.shape) == 1:
            # its rows are not whole blocks
            return self._values(name, tensor, tensor.start, tensor.n_bytes)[start:stop]
        n, row = max(stop - start, 0), tensor.n_bytes // tensor.shape[0]
        return self._values(name, tensor, tensor.start + start * row, n * row).reshape(n, *tensor.shape[1:])

    def _values(self, name: str, tensor: Tensor, start: int, n_bytes: int) -> np.ndarray:
        """The flat values of whole blocks: never more than one piece is held in both forms."""
        per_block, bytes_of_block = GGML_QUANT_SIZES[tensor.kind]
        out = np.empty(n_bytes // bytes_of_block * per_block, np.float32)
        step = _PIECE // per_block * bytes_of_block
        with open(self.path, "rb", buffering=0) as file:
            file.seek(start)
            raw, done = np.empty(min(step, n_bytes), np.uint8), 0
            for at in range(0, n_bytes, step):
                piece = raw[: min(step, n_bytes - at)]
                if file.readinto(piece.data) != len(piece):
                    raise CheckpointError(f"{self.path}: truncated in tensor {name!r} since it was opened")
                values = dequantize(piece[None], tensor.kind)[0]
                out[done : done + len(values)] = values
                done += len(values)
        return out

    def _tensor(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise CheckpointError(f"{self.path}: no tensor {name!r}; it has {', '.join(self.names()[:8])}, …")
        return self.tensors[name]


@functools.cache
def _readable(kind: GGMLQuantizationType) -> bool:
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def open_gguf(path: str | os.PathLike) -> GGUF:
    """Opens a GGUF file: reads its header and checks that the file is whole.

    Raises:
      CheckpointError: missing, a directory, another kind of file, big-endian, a damaged header, tensors that overlap or
        reach past the end.
    """
    path = os.fspath(path)
    header = read_header(path)
    return GGUF(path, header.fields, header.tensors)
