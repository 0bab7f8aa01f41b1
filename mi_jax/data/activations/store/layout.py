"""How activations lie on disk.

    store/
      description.json       what the store is of; written first
      shard-00000/           appears whole
        resid_post.bin       rows of one site, raw, in C order and the byte order of the machine (little-endian)
        origin.bin           where each row comes from: context, position, token and document, int32
        shard.json           rows, bytes and CRC-32 of every file
      index.json             all shards; written last

Where index.json is absent, writing has not finished.
"""

import dataclasses
import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from mi_jax.core.errors import InputError
from mi_jax.core.sites import At
from mi_jax.run import files

FORMAT = "mi_jax activations 1"
DESCRIPTION, SHARD, INDEX = "description.json", "shard.json", "index.json"
DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int32": np.dtype(np.int32),
}
# the column that says where a row comes from, and what its four numbers are
ORIGIN = "origin"
ORIGIN_NAMES = ("context", "position", "token", "document")


class StoreError(InputError):
    """A store of activations that is damaged, unfinished, or not the one that was asked for."""


@dataclasses.dataclass(frozen=True)
class Column:
    """What a file holds of every row: its type and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclasses.dataclass(frozen=True)
class Shard:
    """One finished shard.

    Attributes:
      n_rows: rows kept.
      n_outliers: rows dropped for their norm.
      crc32: of every file, by column.
      thresholds: by site the largest norm that is kept, one for every layer; empty without a filter.
    """

    name: str
    n_rows: int
    n_outliers: int
    crc32: dict[str, int]
    thresholds: dict[str, list[float]]


def describe_sites(sites: tuple[At, ...]) -> list[list[Any]]:
    """Sites as JSON."""
    return [[spec.site, list(spec.layers) if isinstance(spec.layers, tuple) else spec.layers] for spec in sites]


def columns(description: Mapping[str, Any]) -> dict[str, Column]:
    """The columns of a store, by name: the sites and `ORIGIN`."""
    return {name: Column(kind["dtype"], tuple(kind["shape"])) for name, kind in description["columns"].items()}


def column_path(folder: Path, shard: str, column: str) -> Path:
    """The file of one column of one shard."""
    return folder / shard / f"{column}.bin"


def fault(folder: Path, shard: Shard, kinds: Mapping[str, Column], *, checksums: bool) -> str | None:
    """What is wrong with a shard on disk; None if nothing is. Without `checksums`, only presence and size are seen."""
    for name, column in kinds.items():
        path = column_path(folder, shard.name, name)
        if not path.exists():
            return f"{path.name} is missing" if path.parent.exists() else "the shard is missing"
        size, wanted = path.stat().st_size, shard.n_rows * column.row_bytes
        if size != wanted:
            return f"{path.name} has {size} bytes instead of {wanted}"
        if checksums and _file_crc32(path) != shard.crc32[name]:
            return f"{path.name} does not have its checksum"
    return None


def read_shard(folder: Path, name: str) -> Shard | None:
    """A shard by its own record; None if it has none that can be read."""
    try:
        return Shard(name=name, **json.loads((folder / name / SHARD).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def read_record(folder: Path, name: str) -> dict[str, Any]:
    """A description or an index.

    Raises:
      StoreError: not JSON, or of another format.
    """
    try:
        record = files.read_json(epath.Path(folder / name))
    except InputError as error:
        raise StoreError(str(error)) from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise StoreError(f"{folder / name} is not of the format {FORMAT!r}")
    return record


def _file_crc32(path: Path) -> int:
    crc, piece = 0, bytearray(1 << 20)
    with open(path, "rb", buffering=0) as file:
        while n := file.readinto(piece):
            crc = zlib.crc32(memoryview(piece)[:n], crc)
    return crc
