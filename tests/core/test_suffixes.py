"""Packing loses no cell and no position, and every chunk has the same number of pairs."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mi_jax.core.suffixes import Suffixes, pack


@given(starts=st.lists(st.integers(0, 6), min_size=1, max_size=20), batch_size=st.integers(1, 25), n_pos=st.just(7))
def test_every_pair_is_packed_once(starts, batch_size, n_pos):
    suffixes, places = pack(starts, n_pos, batch_size)
    assert places.shape[1] <= batch_size
    assert sorted(places[places < len(starts)].tolist()) == list(range(len(starts)))
    cell, pos, pair = (np.asarray(a) for a in (suffixes.cell, suffixes.pos, suffixes.pair))
    for chunk, row in enumerate(places):
        for place, which in enumerate(row):
            first = starts[which] if which < len(starts) else n_pos
            assert (pair[chunk, place, :first] == cell.shape[1]).all()
            for p in range(first, n_pos):
                at = pair[chunk, place, p]
                assert (cell[chunk, at], pos[chunk, at]) == (place, p)
        used = pair[chunk][pair[chunk] < cell.shape[1]]
        assert len(set(used.tolist())) == len(used)


def test_the_chunks_of_a_triangle_are_even():
    suffixes, _ = pack(range(16), 16, 4)
    assert suffixes.cell.shape == (4, 16 * 17 // 2 // 4)


def test_rows_and_pairs_are_inverse_and_the_prefix_is_filled():
    packed, places = pack([3, 0, 2], 4, 3)
    one = Suffixes(packed.cell[0], packed.pos[0], packed.pair[0])
    rows = jnp.arange(2 * 3 * 4 * 5, dtype=jnp.float32).reshape(2, 3, 4, 5)
    before = -jnp.ones((2, 4, 5))
    filled = np.asarray(one.rows(one.flat(rows), before))
    for place, which in enumerate(places[0]):
        first = [3, 0, 2][which]
        np.testing.assert_array_equal(filled[:, place, first:], rows[:, place, first:])
        np.testing.assert_array_equal(filled[:, place, :first], -1)
    np.testing.assert_array_equal(one.of(before), -np.ones((2, 4 + 1 + 2, 5)))
