"""Safetensors files written tensor by tensor, one or several with their index."""

import json
import math
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mi_jax.core.errors import InputError
from mi_jax.models.checkpoints.directory import INDEX, WEIGHTS
from mi_jax.models.checkpoints.safetensors import DTYPES

_CODES = {dtype: name for name, dtype in DTYPES.items()}


class Described(NamedTuple):
    """What a header says of a tensor before its values are there."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_weights(
    folder: str, tensors: Sequence[Described], values: Callable[[str], np.ndarray], max_shard_bytes: float
) -> None:
    """Writes `model.safetensors`, or shards of at most `max_shard_bytes` and their index, into a folder.

    Args:
      values: gives one tensor by its name; each is asked for once, when its turn has come.
    """
    shards: list[list[Described]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(each.n_bytes for each in shards[-1]) + tensor.n_bytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    if len(shards) == 1:
        write_safetensors(os.path.join(folder, WEIGHTS), tensors, values, {"format": "pt"})
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(os.path.join(folder, name), shard, values, {"format": "pt"})
        weight_map |= {tensor.name: name for tensor in shard}
    index = {"metadata": {"total_size": sum(each.n_bytes for each in tensors)}, "weight_map": weight_map}
    write_json(os.path.join(folder, INDEX), index)


def write_safetensors(
    path: str, tensors: Sequence[Described], values: Callable[[str], np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Writes one file, not atomically: the caller renames it once it is whole.

    Raises:
      InputError: a type that the format lacks, or a tensor that is not as described.
    """
    # the order of the format's own library, in which every tensor is aligned to its type
    order = sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, dtype, shape in order:
        if dtype not in _CODES:
            raise InputError(
                f"{name!r} is {dtype}, which safetensors cannot hold; it holds {', '.join(_CODES.values())}"
            )
        n_bytes = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [end, end + n_bytes]}
        end += n_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in order:
            value = np.asarray(values(tensor.name), order="C")
            if (value.dtype, value.shape) != (tensor.dtype, tensor.shape):
                raise InputError(f"{tensor.name!r} is {value.dtype} {value.shape}, it was to be {tensor[1:]}")
            file.write(value.reshape(-1).view(np.uint8).data)
        file.flush()
        # without this, some filesystems keep a rename but not the bytes when the machine itself goes down
        os.fsync(file.fileno())


def write_json(path: str, value: object) -> None:
    """Writes one JSON file for people to read, not atomically."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
