"""Shuffled batches from a store, with the interface of `ActivationStream`."""

import concurrent.futures
import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Int, PRNGKeyArray

from mi_jax.data.activations.shuffled import Chunk, Shuffled
from mi_jax.data.activations.store.reader import PIECE_BYTES, READERS, ActivationStore, by_name
from mi_jax.data.activations.window import Activations, row_shardings

_CHUNK_BYTES = 16 << 20


class StoreSource:
    """A store as a source; a unit is a piece of it. The next chunk is read by a thread of its own."""

    def __init__(self, store: ActivationStore, sites: Sequence[str], piece_bytes: int, mesh: Mesh | None):
        self.store, self.sites, self.mesh = store, tuple(sites), mesh
        self.pieces = store.pieces(piece_bytes)
        self.counts: np.ndarray = np.array([piece.n_rows for piece in self.pieces], np.int64)
        # a chunk has room for pieces of the largest size
        self.piece_rows = int(self.counts.max(initial=1))
        self.units_per_chunk = min(max(READERS, _CHUNK_BYTES // piece_bytes), max(1, len(self.pieces)))
        self._chunks = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="chunks")
        self._readers = concurrent.futures.ThreadPoolExecutor(READERS, thread_name_prefix="pieces")

    @property
    def what(self) -> str:
        return f"the store {self.store.path}"

    def usable(self, units: Int[np.ndarray, " unit"]) -> Bool[np.ndarray, "unit row"]:
        return np.arange(self.piece_rows)[None, :] < self.counts[units][:, None]

    def start(self, units: Int[np.ndarray, " unit"]) -> Callable[[], Chunk]:
        """Has the pieces read in the background."""
        return self._chunks.submit(self._read, units).result

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """By site, the shape and type of one row."""
        columns = by_name(self.store.buffers(0, self.sites))
        return {site: jax.ShapeDtypeStruct(columns[site].shape[1:], columns[site].dtype) for site in self.sites}

    def layers(self) -> dict[str, int | tuple[int, ...] | None]:
        """By site, the layer that a row holds, or those along its first axis."""
        held, shapes = dict(self.store.description["sites"]), self.shapes()
        every = {}
        for site in self.sites:
            shape = shapes[site].shape
            all_layers = tuple(range(shape[0])) if len(shape) > 1 else None
            layers = held[site]
            every[site] = all_layers if layers is None else tuple(layers) if isinstance(layers, list) else layers
        return every

    def identity(self) -> dict[str, Any]:
        """What was written, and the checksums of what is read."""
        shards = [(shard.name, shard.n_rows, sorted(shard.crc32.items())) for shard in self.store.shards]
        return {
            "store": json.loads(json.dumps(self.store.description)),
            "shards": hashlib.blake2b(repr(shards).encode(), digest_size=16).hexdigest(),
            "sites": list(self.sites),
            "piece_rows": self.piece_rows,
        }

    def failure(self, unit: int) -> str:
        return f"{self.store.path}: {self.pieces[unit]} is not finite"

    def _read(self, units: np.ndarray) -> Chunk:
        n_rows, pieces = len(units) * self.piece_rows, [self.pieces[unit] for unit in units]
        into = self.store.buffers(n_rows, self.sites)
        starts = range(0, n_rows, self.piece_rows)
        # consumed, so that a failed read is heard of
        list(self._readers.map(self.store.read, pieces, itertools.repeat(into), starts))
        columns = by_name(into)
        values = {site: columns[site] for site in self.sites}
        origin = {name: np.ascontiguousarray(columns[name]) for name in ("context", "position")}
        chunk = Activations(**jax.device_put({"values": values, "valid": np.ones(n_rows, bool)} | origin))
        if self.mesh is not None:
            chunk = jax.device_put(chunk, row_shardings(chunk, self.mesh))
        return Chunk(chunk, np.ones(len(units), bool))


class StoredActivations(Shuffled):
    """Shuffled batches of a store; batch t is a function of (key, t). See `ActivationStream`.

    Args:
      store: the store; its rows are visited in pieces in random order, then shuffled across the buffer.
      sites: which to serve; all by default.
      batch_size, buffer_size, key, mesh: as for `ActivationStream`.
      piece_bytes: bytes read at once; by default a 64th of the store, from 256 KiB to 64 MiB.

    Raises:
      InputError: a site that the store lacks, fewer rows than the buffer, or sizes that do not fit.
    """

    def __init__(
        self,
        store: ActivationStore,
        *,
        batch_size: int,
        buffer_size: int,
        key: PRNGKeyArray,
        sites: Sequence[str] | None = None,
        piece_bytes: int | None = None,
        mesh: Mesh | None = None,
    ):
        store.buffers(0, sites)
        if piece_bytes is None:
            piece_bytes = min(max(256 << 10, len(store) * store.row_bytes // 64), PIECE_BYTES)
        source = StoreSource(store, store.sites if sites is None else sites, piece_bytes, mesh)
        super().__init__(source, batch_size=batch_size, buffer_size=buffer_size, key=key, mesh=mesh)
