"""Reading activations from disk: random rows, whole pieces in shuffled order, and shuffled batches."""

import collections
import concurrent.futures
import functools
import itertools
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Int, PRNGKeyArray, Shaped

from mi_jax.core.errors import InputError
from mi_jax.core.sites import At, canonical
from mi_jax.data.activations.permutation import permute_host
from mi_jax.data.activations.store import layout
from mi_jax.data.activations.store.layout import Column, Shard, StoreError

# mapped files at once; every one costs a file handle
_MOST_MAPPED = 128
# reads under way at once
READERS = 2
# Contexts lie in random order on disk, so large pieces cost no mixing; of 4 MiB, a disk gives half of its bandwidth.
PIECE_BYTES = 64 << 20
# Linux reads ahead, in large pages, for a read that follows on another
_FIRST_READ = 64 << 10


class StoreWarning(UserWarning):
    """Part of a store cannot be used."""


class Lost(NamedTuple):
    """A shard that cannot be used."""

    shard: str
    n_rows: int
    reason: str


class Piece(NamedTuple):
    """Consecutive rows of one shard."""

    shard: int
    start: int
    n_rows: int


class ActivationStore:
    """Activations on disk, as a sequence of rows: `store[i]` is a dict of row i.

    It has the sites, and `context`, `position`, `token` and `document`, which say where the row comes from. With
    `__len__` and `__getitem__` it is a source for grain as it is, and can be sent to grain's worker processes:
    `grain.MapDataset.source(store).shuffle(seed).batch(4096)`.

    Attributes:
      path: its folder.
      description: what was written: model, sites, columns, filter.
      columns: type and shape of what every file holds of a row.
      shards: those that can be used.
      lost: those that cannot.
    """

    def __init__(self, path: Path, description: dict[str, Any], shards: Sequence[Shard], lost: Sequence[Lost]):
        self.path, self.description = path, description
        self.columns = layout.columns(description)
        self.shards, self.lost = tuple(shards), tuple(lost)
        self._ends = list(itertools.accumulate(shard.n_rows for shard in shards))
        self._map = functools.lru_cache(_MOST_MAPPED)(self._mapped)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike,
        *,
        missing: Literal["error", "skip"] = "error",
        checksums: bool = True,
        model: str | None = None,
        sites: Sequence[str | At] | None = None,
        width: int | None = None,
    ) -> "ActivationStore":
        """Opens a store that `write_activations` finished.

        Args:
          missing: what to do about shards that are missing or damaged: refuse, or go on with the others and warn.
          checksums: reads all bytes and compares their checksums. Without it only a missing file, or one of another
            size, is found; `verify` does the rest at any time.
          model, sites, width: what it must hold: the model's name, its sites, the last axis of every site.

        Raises:
          StoreError: no store, an unfinished one, one of something else, or a damaged one under `missing="error"`.
        """
        folder = Path(path)
        if not (folder / layout.INDEX).exists():
            if not (folder / layout.DESCRIPTION).exists():
                raise StoreError(f"{folder} is no store of activations: it has no {layout.INDEX}")
            done = len([*folder.glob("shard-*")])
            raise StoreError(
                f"{folder} is not finished: {done} shards are there; call write_activations again as before, it goes on"
            )
        index = layout.read_record(folder, layout.INDEX)
        kinds = layout.columns(index)
        _check_content(folder, index, kinds, model, sites, width)
        good, lost = [], []
        for entry in index["shards"]:
            shard = Shard(**entry)
            reason = layout.fault(folder, shard, kinds, checksums=checksums)
            if reason is None:
                good.append(shard)
            else:
                lost.append(Lost(shard.name, shard.n_rows, reason))
        if lost:
            loss = _loss(folder, lost, index["n_rows"])
            if missing == "error" or not any(shard.n_rows for shard in good):
                raise StoreError(
                    f"{loss}; missing='skip' uses the other shards, write_activations with the same arguments writes "
                    "these anew"
                )
            warnings.warn(loss, StoreWarning, stacklevel=2)
        return cls(folder, {name: x for name, x in index.items() if name != "shards"}, good, lost)

    def verify(self) -> tuple[Lost, ...]:
        """Reads all bytes; the shards that are not as they were written, those lost before included."""
        found = [
            Lost(shard.name, shard.n_rows, reason)
            for shard in self.shards
            if (reason := layout.fault(self.path, shard, self.columns, checksums=True))
        ]
        return (*self.lost, *found)

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(site for site, _ in self.description["sites"])

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, where it comes from included."""
        return sum(column.row_bytes for column in self.columns.values())

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of a store of {len(self)} rows")
        return {name: x[0] for name, x in self.rows(np.array([index % len(self)])).items()}

    def rows(
        self, indices: Int[np.ndarray, " row"], sites: Sequence[str] | None = None
    ) -> dict[str, Shaped[np.ndarray, "row ..."]]:
        """Any rows, in the order asked for; only the pages that hold them are read.

        Args:
          sites: which to read; all by default.

        Raises:
          InputError: an index out of range, or no such site.
        """
        if len(indices) and not (indices.min() >= 0 and indices.max() < len(self)):
            raise InputError(f"rows {indices.min()} to {indices.max()} of {self.path}, which has {len(self)} rows")
        out = self.buffers(len(indices), sites)
        shard_of = np.searchsorted(self._ends, indices, side="right")
        for number in np.unique(shard_of):
            chosen = np.flatnonzero(shard_of == number)
            within = indices[chosen] - (self._ends[number] - self.shards[number].n_rows)
            for name, array in out.items():
                array[chosen] = self._map(int(number), name)[within]
        return by_name(out)

    def pieces(self, piece_bytes: int = PIECE_BYTES) -> tuple[Piece, ...]:
        """The store cut into pieces of about that size, none across shards."""
        rows = max(1, piece_bytes // self.row_bytes)
        return tuple(
            Piece(number, start, min(rows, shard.n_rows - start))
            for number, shard in enumerate(self.shards)
            for start in range(0, shard.n_rows, rows)
        )

    def shuffled_pieces(
        self, *, key: PRNGKeyArray, piece_bytes: int = PIECE_BYTES, sites: Sequence[str] | None = None
    ) -> Iterator[dict[str, Shaped[np.ndarray, "row ..."]]]:
        """All rows once, in pieces whose order is a function of `key`.

        The arrays are used again for the next piece; copy what is to stay.
        """
        pieces = self.pieces(piece_bytes)
        if not pieces:
            return
        most = max(piece.n_rows for piece in pieces)
        order = permute_host(np.arange(len(pieces)), len(pieces), key=key)
        free = [self.buffers(most, sites) for _ in range(READERS + 1)]
        under_way: collections.deque = collections.deque()
        with concurrent.futures.ThreadPoolExecutor(READERS) as readers:
            for number in (*order, *(None,) * len(free)):
                if number is not None:
                    into = free.pop()
                    under_way.append((readers.submit(self.read, pieces[number], into), into, pieces[number].n_rows))
                if under_way and (number is None or not free):
                    read, into, n_rows = under_way.popleft()
                    read.result()
                    yield by_name({name: array[:n_rows] for name, array in into.items()})
                    free.append(into)

    def buffers(self, n_rows: int, sites: Sequence[str] | None = None) -> dict[str, Shaped[np.ndarray, "row ..."]]:
        """Arrays to read that many rows into, by column.

        Raises:
          InputError: no such site.
        """
        names = self.sites if sites is None else tuple(sites)
        if unknown := [name for name in names if name not in self.sites]:
            raise InputError(f"{self.path} has no site {unknown[0]!r}; it has {', '.join(self.sites)}")
        kinds = {name: self.columns[name] for name in (*names, layout.ORIGIN)}
        return {name: np.empty((n_rows, *kind.shape), layout.DTYPES[kind.dtype]) for name, kind in kinds.items()}

    def read(self, piece: Piece, into: Mapping[str, np.ndarray], at: int = 0) -> None:
        """Reads a piece into the rows of `buffers` from `at` on.

        Raises:
          StoreError: a file that was cut after the store had been opened.
        """
        for name, array in into.items():
            # plain reads: faulting mapped pages in one by one is slower for whole pieces
            left = array[at : at + piece.n_rows].reshape(-1).view(np.uint8).data
            with open(layout.column_path(self.path, self.shards[piece.shard].name, name), "rb", buffering=0) as file:
                file.seek(piece.start * self.columns[name].row_bytes)
                most = _FIRST_READ
                while left:
                    if not (n := file.readinto(left[:most])):
                        raise StoreError(f"{file.name} ends early; it was cut after the store had been opened")
                    left, most = left[n:], len(left)

    def _mapped(self, number: int, column: str) -> np.ndarray:
        shard, kind = self.shards[number], self.columns[column]
        raw = np.memmap(layout.column_path(self.path, shard.name, column), np.uint8, "r")
        return raw.view(layout.DTYPES[kind.dtype]).reshape(shard.n_rows, *kind.shape)

    def __reduce__(self):
        # the mapped files stay behind; what was found on opening does not have to be found again
        return ActivationStore, (self.path, self.description, self.shards, self.lost)


def by_name(columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Columns with the four numbers of a row's origin under their names."""
    origin = {name: columns[layout.ORIGIN][:, i] for i, name in enumerate(layout.ORIGIN_NAMES)}
    return {name: x for name, x in columns.items() if name != layout.ORIGIN} | origin


def _loss(folder: Path, lost: Sequence[Lost], n_rows: int) -> str:
    n = sum(shard.n_rows for shard in lost)
    which = ", ".join(f"{shard.shard} ({shard.n_rows} rows: {shard.reason})" for shard in lost)
    return f"{folder} has lost {n} of {n_rows} rows: {which}"


def _check_content(
    folder: Path,
    index: dict[str, Any],
    kinds: dict[str, Column],
    model: str | None,
    sites: Sequence[str | At] | None,
    width: int | None,
) -> None:
    if model is not None and index["model"] != model:
        raise StoreError(f"{folder} holds activations of {index['model']}, not of {model}")
    held = dict(index["sites"])
    for spec in sites or ():
        name = canonical(spec if isinstance(spec, str) else spec.site)
        if name not in held:
            raise StoreError(f"{folder} holds {', '.join(held)}, not {name}")
        layers = spec.layers if isinstance(spec, At) else held[name]
        layers = list(layers) if isinstance(layers, tuple) else layers
        if layers != held[name]:
            raise StoreError(f"{folder} holds {name} of layer {held[name]}, not of layer {layers}")
    for name in held if width is not None else ():
        if kinds[name].shape[-1] != width:
            raise StoreError(f"{folder} holds {name} of width {kinds[name].shape[-1]}, not {width}")
