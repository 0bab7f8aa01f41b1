"""Which rows of a stored tensor the devices of this process need, where the stored layout lets a part be read."""

import dataclasses
import re
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from mi_jax.models.checkpoints.names import Stored
from mi_jax.models.checkpoints.source import Source


@dataclasses.dataclass(frozen=True)
class Rows:
    """Entries `start` to `stop` of one axis of a parameter, which lie in consecutive rows of the stored tensor.

    Attributes:
      name: of the axis in the pattern.
      axis: its place in the parameter, without the axes that the tensor's name counts.
      size: of the whole axis.
    """

    name: str
    axis: int
    size: int
    start: int
    stop: int

    def sizes(self, sizes: Mapping[str, int]) -> dict[str, int]:
        return {**sizes, self.name: self.stop - self.start}

    def within(self, index: Sequence[slice]) -> tuple[slice, ...]:
        """An index into the whole parameter as one into what was read."""
        start, stop, _ = index[self.axis].indices(self.size)
        moved = slice(start - self.start, stop - self.start)
        return (*index[: self.axis], moved, *index[self.axis + 1 :])


def local_rows(stored: Stored, shape: Sequence[int], places: Sequence[tuple[slice, ...]]) -> Rows | None:
    """The rows that cover `places`, the indices of this process's shards; None where all have to be read.

    A part of the rows will do where the first axis of the stored tensor begins with an axis that is sharded:
    "(head d_head) d_model -> d_model head d_head" over heads, but not over d_model.
    """
    left, right = stored.pattern.split("->")
    first = (re.findall(r"\w+", left) or [""])[0]
    axes = right.split()[0 if stored.pick is None else 1 :]
    if first not in axes or any("(" in axis for axis in axes[: axes.index(first)]):
        return None
    axis = axes.index(first)
    size = shape[axis]
    spans = [index[axis].indices(size)[:2] for index in places]
    start, stop = min(span[0] for span in spans), max(span[1] for span in spans)
    return None if (start, stop) == (0, size) else Rows(first, axis, size, start, stop)


def read_part(source: Source, name: str, stored: Stored, rows: Rows | None) -> np.ndarray:
    """What `part_to_ours` takes: the part of the tensor that the entry means, of that the rows that are needed."""
    length, begin = source.shape(name)[0] if source.shape(name) else 1, 0
    if stored.part is not None and stored.part[0] == 0:
        begin, length = stored.part[1], stored.part[2] - stored.part[1]
    if rows is not None:
        each = length // rows.size
        begin, length = begin + rows.start * each, (rows.stop - rows.start) * each
    x = source.read(name, begin, begin + length)
    if stored.part is not None and stored.part[0] > 0:
        axis, start, stop = stored.part
        x = x[(slice(None),) * axis + (slice(start, stop),)]
    return x


def places(sharding: jax.sharding.Sharding, shape: Sequence[int]) -> list[tuple[slice, ...]]:
    """The indices of this process's shards."""
    return [tuple(index or ()) for index in sharding.addressable_devices_indices_map(tuple(shape)).values()]
