"""The schedule tiles every epoch, and what a segment needs is what the buffer can hold."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mi_jax.core.errors import InputError
from mi_jax.data.activations.schedule import schedule


@settings(max_examples=60, deadline=None)
@given(n_rows=st.integers(1, 800), batch_size=st.integers(1, 20), batches=st.integers(4, 30), start=st.integers(0, 500))
def test_segments_tile_the_steps_and_fit_the_buffer(n_rows, batch_size, batches, start):
    assume(batches * batch_size <= n_rows)
    plan = schedule(n_rows, batch_size, batches * batch_size, "it")
    assert 2 * plan.block_rows <= batches * batch_size
    stop = start + 2 * plan.steps_per_epoch
    step, rows = start, 0
    for segment in plan.segments(start, stop):
        assert segment.steps.start == step
        step = segment.steps.stop
        whole = plan.segment_of(segment.steps.start)
        assert (whole.n_rows, whole.number) == (segment.n_rows, segment.number)
        # all steps but the last of an epoch are full
        last_of_epoch = whole.steps.stop % plan.steps_per_epoch == 0
        assert len(whole.steps) == -(-segment.n_rows // batch_size)
        assert last_of_epoch or segment.n_rows % batch_size == 0
        # its rows lie in the second half of its left block and the first half of its right one
        first = max(0, segment.number * plan.block_rows - plan.block_rows // 2)
        assert segment.blocks[0].start <= first
        assert segment.blocks[-1].start + segment.blocks[-1].n_rows >= first + segment.n_rows
        assert [block.number for block in segment.blocks] in (
            [0],
            [segment.number - 1, segment.number],
            [plan.n_blocks - 1],
        )
        assert len({block.half for block in segment.blocks}) == len(segment.blocks)
        rows += segment.n_rows if whole.steps == segment.steps else 0
    assert step == stop
    if start % plan.steps_per_epoch == 0:
        assert rows == 2 * n_rows


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 2, 8), "the text has no usable activation"),
        ((100, 0, 8), "batch_size=0; a batch has at least one row"),
        ((100, 8, 31), "buffer_size is at least 4 batches, 32"),
        ((100, 8, 128), "the text has 100 usable activations, fewer than the buffer_size of 128; give more text, or a"),
        ((100, 8, 2**31), "fewer than 2³¹"),
    ],
)
def test_sizes_that_do_not_fit(sizes, message):
    with pytest.raises(InputError, match=message):
        schedule(*sizes, "the text")
