"""Batches of activations, shuffled, from any source that computes or reads them piece by piece.

Batch t, its rows and their order, is a function of (key, t) alone, so a run that resumes at t needs nothing but t: at
most one buffer is filled again. See `schedule.py` for the order and `window.py` for the buffer.
"""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int, Key, PRNGKeyArray

from mi_jax.core.errors import InputError
from mi_jax.core.sharding import replicated
from mi_jax.data.activations.permutation import permute_host
from mi_jax.data.activations.schedule import Block, Segment, schedule
from mi_jax.data.activations.window import Activations, Window, empty, write

# what a key is folded with, one number for each use
_VISIT, _BLOCK, _SEGMENT = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class Chunk:
    """The activations of some units, and for every unit whether all that count are finite."""

    rows: Activations
    finite: Bool[Array | np.ndarray, " unit"]


@runtime_checkable
class Source(Protocol):
    """Where activations come from, in units: contexts of a corpus, or pieces of a file."""

    @property
    def what(self) -> str:
        """Names it in errors."""
        ...

    @property
    def counts(self) -> Int[np.ndarray, " unit"]:
        """Usable rows of every unit."""
        ...

    @property
    def units_per_chunk(self) -> int: ...

    def usable(self, units: Int[np.ndarray, " unit"]) -> Bool[np.ndarray, "unit row"]:
        """Which rows of these units count."""
        ...

    def start(self, units: Int[np.ndarray, " unit"]) -> Callable[[], Chunk]:
        """Begins to compute or read a chunk without waiting; the result gives it, with the rows of unit after unit."""
        ...

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """By site, the shape and type of one row."""
        ...

    def layers(self) -> Mapping[str, int | tuple[int, ...] | None]:
        """By site, the layer that a row holds, or those along its first axis; None for a site that exists once."""
        ...

    def identity(self) -> dict[str, Any]:
        """All that the rows depend on, as JSON: what another source differs in, by name."""
        ...

    def failure(self, unit: int) -> str:
        """What to say of a unit whose activations are not finite."""
        ...


@dataclasses.dataclass(frozen=True)
class _Visit:
    """The order of the units in one epoch; rows of chunk c begin at `starts[c]`."""

    order: Int[np.ndarray, " unit"]
    starts: Int[np.ndarray, " chunk_end"]


@dataclasses.dataclass(frozen=True)
class _Write:
    """One chunk that is to be put into the buffer, as far as it belongs to the block."""

    block: Block
    chunk: int

    @property
    def place(self) -> tuple[int, int]:
        return self.block.epoch, self.chunk


class Shuffled:
    """Shuffled batches of a source; `ActivationStream` and `StoredActivations` are this with their source.

    Example:
      `for steps, window in stream.windows(start=t): state = train(state, window, steps.start, len(steps))`
    """

    def __init__(
        self, source: Source, *, batch_size: int, buffer_size: int, key: PRNGKeyArray, mesh: Mesh | None = None
    ):
        """Raises InputError for sizes that do not fit, and for a source smaller than the buffer."""
        self.source, self.mesh, self._key = source, mesh, key
        self.schedule = schedule(int(source.counts.sum()), batch_size, buffer_size, source.what)
        self._visits: dict[int, _Visit] = {}

    @property
    def n_rows(self) -> int:
        """Activations of an epoch."""
        return self.schedule.n_rows

    @property
    def batch_size(self) -> int:
        return self.schedule.batch_size

    @property
    def buffer_size(self) -> int:
        """Rows of the buffer: what was asked for, rounded down to whole batches."""
        return 2 * self.schedule.block_rows

    @property
    def steps_per_epoch(self) -> int:
        return self.schedule.steps_per_epoch

    def identity(self) -> dict[str, Any]:
        """All that its batches depend on, as JSON; the same in every process and on any mesh."""
        key = [str(jax.random.key_impl(self._key)), *np.asarray(jax.random.key_data(self._key)).ravel().tolist()]
        return {"batch_size": self.batch_size, "buffer_size": self.buffer_size, "key": key} | self.source.identity()

    def windows(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[range, Window]]:
        """The steps from `start` on, without end unless `stop` is given, in runs that one filled buffer serves.

        `window(t)` is batch t for the steps that come with it; call it inside the training program. The next window
        takes over the buffer of the one before, whose arrays are then gone. While the steps of a window run, the
        device already has the next chunk in its queue.

        Raises:
          InputError: activations that are not finite; found before a batch is served that could hold them.
        """
        if start < 0:
            raise InputError(f"a run starts at step 0 or later, got start={start}")
        return self._windows(start, stop)

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[Activations]:
        """Batch after batch, from step `start` on. `windows` costs less where a program runs many steps."""
        for steps, window in self.windows(start, stop):
            for step in steps:
                yield _batch(window, self._placed(np.int32(step)))

    def at(self, step: int) -> Activations:
        """Batch `step`; fills one buffer."""
        return next(iter(self.batches(step, step + 1)))

    def take(self, n: int, start: int = 0) -> Activations:
        """`n` batches from step `start` on, stacked: `values` are `[step batch …]`."""
        if n < 1:
            raise InputError(f"take(n) gives at least one batch, got n={n}")
        out: Activations | None = None
        for steps, window in self.windows(start, start + n):
            for step in steps:
                now, place = self._placed((np.int32(step), np.int32(step - start)))
                out = _stacked(window, now, place, n) if out is None else _put(out, window, now, place)
        assert out is not None
        return out

    def _placed(self, host: Any) -> Any:
        """Numbers of the host on every device; said explicitly, so that a transfer guard lets it pass."""
        return jax.device_put(host, None if self.mesh is None else replicated(self.mesh))

    def _windows(self, start: int, stop: int | None) -> Iterator[tuple[range, Window]]:
        buffer: Activations | None = None
        dtypes: tuple[tuple[str, Any], ...] = ()
        chunks: collections.OrderedDict[tuple[int, int], Callable[[], Chunk]] = collections.OrderedDict()
        written: list[tuple[_Write, Chunk]] = []
        ahead: collections.deque[_Write | Segment] = collections.deque()
        work = self._work(start, stop)

        def begin(item: _Write) -> Callable[[], Chunk]:
            if item.place not in chunks:
                chunks[item.place] = self.source.start(self._units(*item.place))
                # the current one stays, as the last chunk of a block is often also the first of the next
                while len(chunks) > 2:
                    chunks.popitem(last=False)
            return chunks[item.place]

        def following(current: _Write) -> _Write | None:
            """The next chunk after the current one, whether or not a segment is served in between."""
            for item in itertools.chain(tuple(ahead), arriving()):
                if isinstance(item, _Write) and item.place != current.place:
                    return item
            return None

        def arriving() -> Iterator[_Write | Segment]:
            for item in work:
                ahead.append(item)
                yield item

        while item := ahead.popleft() if ahead else next(work, None):
            if isinstance(item, _Write):
                promise = begin(item)
                if later := following(item):
                    begin(later)
                chunk = promise()
                if buffer is None:
                    dtypes = tuple((name, x.dtype) for name, x in chunk.rows.values.items())
                    buffer = empty(chunk.rows, self.buffer_size, self.mesh)
                buffer = write(buffer, chunk.rows, self._placed(self._slots(item)))
                written.append((item, chunk))
            elif buffer is not None:
                self._check(written)
                written.clear()
                yield item.steps, self._window(item, buffer, dtypes)

    def _work(self, start: int, stop: int | None) -> Iterator[_Write | Segment]:
        """What there is to do, in order: chunks to write, then the segment that can be served."""
        held: dict[int, Block] = {}
        for segment in self.schedule.segments(start, stop):
            for block in segment.blocks:
                if held.get(block.half) != block:
                    held[block.half] = block
                    starts = self._visit(block.epoch).starts
                    first = int(np.searchsorted(starts, block.start, side="right")) - 1
                    last = int(np.searchsorted(starts, block.start + block.n_rows, side="left"))
                    for chunk in range(first, last):
                        yield _Write(block, chunk)
            yield segment

    def _visit(self, epoch: int) -> _Visit:
        if epoch not in self._visits:
            counts = self.source.counts
            key = jax.random.fold_in(jax.random.fold_in(self._key, epoch), _VISIT)
            used = np.flatnonzero(counts)
            order = used[permute_host(np.arange(len(used)), len(used), key=key)]
            ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts[order], dtype=np.int64)])
            per_chunk = self.source.units_per_chunk
            starts = np.append(ends[:-1:per_chunk], ends[-1])
            self._visits[epoch] = _Visit(order, starts)
            for old in [known for known in self._visits if known < epoch - 1]:
                del self._visits[old]
        return self._visits[epoch]

    def _units(self, epoch: int, chunk: int) -> np.ndarray:
        """The units of a chunk; the last chunk of an epoch repeats its first unit, so that all are equally long."""
        per_chunk = self.source.units_per_chunk
        units = self._visit(epoch).order[chunk * per_chunk : (chunk + 1) * per_chunk]
        return np.concatenate([units, np.full(per_chunk - len(units), units[0])])

    def _slots(self, item: _Write) -> np.ndarray:
        """Where in the buffer each row of a chunk goes; past its end if it is not usable or of another block."""
        block, visit = item.block, self._visit(item.block.epoch)
        usable = self.source.usable(self._units(block.epoch, item.chunk))
        real = len(visit.order) - item.chunk * len(usable)
        usable = (usable & (np.arange(len(usable)) < real)[:, None]).reshape(-1)
        row = visit.starts[item.chunk] + np.cumsum(usable) - 1 - block.start
        here = usable & (row >= 0) & (row < block.n_rows)
        slot = block.half * self.schedule.block_rows + row
        return np.where(here, slot, self.buffer_size).astype(np.int32)

    def _check(self, written: list[tuple[_Write, Chunk]]) -> None:
        for item, chunk in written:
            finite = jax.device_get(chunk.finite)
            if not finite.all():
                units = self._units(item.block.epoch, item.chunk)[~finite]
                raise InputError(self.source.failure(int(units[0])))

    def _window(self, segment: Segment, buffer: Activations, dtypes: tuple[tuple[str, Any], ...]) -> Window:
        left, right = segment.left, segment.right
        whole = self.schedule.segment_of(segment.steps.start)
        half = self.schedule.block_rows // 2
        scalars = {
            "first_step": whole.steps.start,
            "n_rows": segment.n_rows,
            "from_left": min(half, segment.n_rows) if left else 0,
            "sizes": [block.n_rows if block else 1 for block in (left, right)],
            "starts": [block.half * self.schedule.block_rows if block else 0 for block in (left, right)],
        }
        placed = self._placed({name: np.asarray(value, np.int32) for name, value in scalars.items()})
        numbers = self._placed(np.array([segment.epoch, max(0, segment.number - 1), segment.number], np.uint32))
        keys = _window_keys(self._key, numbers)
        return Window(buffer, **placed, keys=keys, dtypes=dtypes, batch_size=self.batch_size, mesh=self.mesh)


@jax.jit
def _batch(window: Window, step: Array) -> Activations:
    return window(step)


@partial(jax.jit, static_argnames="n")
def _stacked(window: Window, step: Array, place: Array, n: int) -> Activations:
    """`n` batches, of which one is there."""
    batch = window(step)
    return jax.tree.map(lambda x: jnp.zeros((n, *x.shape), x.dtype).at[place].set(x), batch)


@partial(jax.jit, donate_argnames="stack")
def _put(stack: Activations, window: Window, step: Array, place: Array) -> Activations:
    return jax.tree.map(lambda into, x: into.at[place].set(x), stack, window(step))


@jax.jit
def _window_keys(key: PRNGKeyArray, numbers: Array) -> Key[Array, "3"]:
    """Of the segment, its earlier and its later block; `numbers` are those of the epoch and the two blocks."""
    epoch_key = jax.random.fold_in(key, numbers[0])
    block_key = jax.random.fold_in(epoch_key, _BLOCK)
    segment_key = jax.random.fold_in(jax.random.fold_in(epoch_key, _SEGMENT), numbers[2])
    return jnp.stack([segment_key, *(jax.random.fold_in(block_key, number) for number in numbers[1:])])
