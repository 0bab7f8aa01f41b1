"""Which activations step t uses, and which of them must be in the buffer for that: host arithmetic, no arrays.

An epoch visits all rows once. In the order of the visit they fall into blocks of half a buffer. The steps of an epoch
fall into segments, shifted against the blocks by half a block, so that segment m is served by the blocks m − 1 and m:
one buffer. A row is permuted within its block, then within its segment, and so reaches any place in a whole buffer's
range. Steps never cross an epoch: the last one of an epoch is filled up with rows that are marked as not valid.
"""

import dataclasses
import itertools
from collections.abc import Iterator

from mi_jax.core.errors import InputError


@dataclasses.dataclass(frozen=True)
class Block:
    """Rows `start … start + n_rows` of an epoch's visit; `count` numbers blocks through all epochs."""

    epoch: int
    number: int
    count: int
    start: int
    n_rows: int

    @property
    def half(self) -> int:
        """The half of the buffer that it is kept in."""
        return self.count % 2


@dataclasses.dataclass(frozen=True)
class Segment:
    """Consecutive steps that one filling of the buffer serves, and the blocks that they draw from."""

    epoch: int
    number: int
    steps: range
    n_rows: int
    left: Block | None
    right: Block | None

    @property
    def blocks(self) -> tuple[Block, ...]:
        return tuple(block for block in (self.left, self.right) if block is not None)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The segments of all epochs.

    Attributes:
      n_rows: rows of an epoch.
      batch_size: rows of a step.
      block_rows: rows of a block, an even number of batches.
    """

    n_rows: int
    batch_size: int
    block_rows: int

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.n_rows // self.batch_size)

    @property
    def n_blocks(self) -> int:
        return -(-self.n_rows // self.block_rows)

    def block(self, epoch: int, number: int) -> Block:
        start = number * self.block_rows
        rows = min(self.block_rows, self.n_rows - start)
        return Block(epoch, number, epoch * self.n_blocks + number, start, rows)

    def segment_of(self, step: int) -> Segment:
        """The segment that a step belongs to."""
        epoch, within = divmod(step, self.steps_per_epoch)
        half = self.block_rows // 2
        number = (within * self.batch_size + half) // self.block_rows
        start = max(0, number * self.block_rows - half)
        stop = min(self.n_rows, number * self.block_rows + half)
        first = epoch * self.steps_per_epoch + start // self.batch_size
        return Segment(
            epoch,
            number,
            range(first, first - (start - stop) // self.batch_size),
            stop - start,
            self.block(epoch, number - 1) if number else None,
            self.block(epoch, number) if number < self.n_blocks else None,
        )

    def segments(self, start: int, stop: int | None) -> Iterator[Segment]:
        """Segments from the one of step `start` on; the first and the last are cut to the steps asked for."""
        step = start
        for _ in itertools.count():
            if stop is not None and step >= stop:
                return
            segment = self.segment_of(step)
            last = segment.steps.stop if stop is None else min(stop, segment.steps.stop)
            yield dataclasses.replace(segment, steps=range(step, last))
            step = last


def schedule(n_rows: int, batch_size: int, buffer_size: int, what: str) -> Schedule:
    """A schedule whose buffer is as large as whole blocks allow, at most `buffer_size`.

    Args:
      what: names the rows in an error, such as `"a corpus of 100 contexts"`.

    Raises:
      InputError: no rows, sizes that do not fit each other, or fewer rows than the buffer holds.
    """
    if n_rows == 0:
        raise InputError(f"{what} has no usable activation: every token is padding, special or skipped")
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size}; a batch has at least one row")
    if buffer_size < 4 * batch_size:
        raise InputError(
            f"a buffer of {buffer_size} activations cannot shuffle batches of {batch_size}; "
            f"buffer_size is at least 4 batches, {4 * batch_size}"
        )
    if buffer_size >= 2**31:
        raise InputError(f"buffer_size={buffer_size}; a buffer holds fewer than 2³¹ activations")
    if n_rows < buffer_size:
        raise InputError(
            f"{what} has {n_rows} usable activations, fewer than the buffer_size of {buffer_size}; "
            f"give more text, or a buffer_size of at most {n_rows}"
        )
    return Schedule(n_rows, batch_size, buffer_size // (4 * batch_size) * 2 * batch_size)
