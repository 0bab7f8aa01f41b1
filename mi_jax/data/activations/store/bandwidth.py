"""How fast a store is read, beside plain reading of the same bytes in the same run."""

import os
import time
from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import PRNGKeyArray

from mi_jax.data.activations.store import layout
from mi_jax.data.activations.store.reader import PIECE_BYTES, ActivationStore


class ReadBandwidth(NamedTuple):
    """Bytes per second of the store in shuffled order and of plain sequential reading, and their ratio."""

    store: float
    plain: float
    fraction: float


def read_bandwidth(
    store: ActivationStore, *, key: PRNGKeyArray, piece_bytes: int = PIECE_BYTES, repeats: int = 3, cold: bool = False
) -> ReadBandwidth:
    """Reads the whole store in shuffled pieces and, in turns with it, the same files one after the other.

    Args:
      repeats: of each; the best counts.
      cold: asks the system to forget the files before each pass, so that the disk is measured and not the memory that
        the system keeps files in.
    """
    paths = [layout.column_path(store.path, shard.name, name) for shard in store.shards for name in store.columns]
    n_bytes = sum(path.stat().st_size for path in paths)
    # what stays in the processor's cache, which is the best for plain reading
    buffer = bytearray(1 << 20)

    def plain() -> None:
        for path in paths:
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    continue

    def shuffled() -> None:
        for _ in store.shuffled_pieces(key=key, piece_bytes=piece_bytes):
            continue

    def seconds(run: Callable[[], None]) -> float:
        for path in paths if cold else ():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    times = [(seconds(shuffled), seconds(plain)) for _ in range(repeats)]
    store_seconds, plain_seconds = (min(column) for column in zip(*times, strict=True))
    return ReadBandwidth(n_bytes / store_seconds, n_bytes / plain_seconds, plain_seconds / store_seconds)
