"""Packing loses no cell and no position, and every chunk has the same number of pairs."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mi_jax.core.suffixes import pack


@settings(deadline=None, max_examples=12)
@given(starts=st.lists(st.integers(0, 6), min_size=1, max_size=20), batch_size=st.integers(1, 25), n_pos=st.just(7))
def test_every_pair_is_packed_once(starts, batch_size, n_pos):
    packing = _packing(starts, n_pos, batch_size)
    places = np.stack([packing.cells(jnp.asarray(c, jnp.int32)) for c in range(packing.n_chunks)])
    assert places.shape == (packing.n_chunks, packing.size)
    assert packing.size <= batch_size
    assert sorted(places[places < len(starts)].tolist()) == list(range(len(starts)))
    np.testing.assert_array_equal(places.reshape(-1)[np.asarray(packing.slots())], np.arange(len(starts)))
    for row in places:
        suffixes = packing.suffixes(jnp.asarray(row))
        cell, pos, pair = (np.asarray(a) for a in (suffixes.cell, suffixes.pos, suffixes.pair))
        assert cell.shape == pos.shape == (packing.n_pairs,)
        for place, which in enumerate(row):
            first = starts[which] if which < len(starts) else n_pos
            assert (pair[place, :first] == packing.n_pairs).all()
            for p in range(first, n_pos):
                assert (cell[pair[place, p]], pos[pair[place, p]]) == (place, p)
        used = pair[pair < packing.n_pairs]
        assert len(set(used.tolist())) == len(used)
        assert ((cell >= 0) & (cell < len(row)) & (pos >= 0) & (pos < n_pos)).all() or not len(used)


def _packing(starts, n_pos, batch_size):
    starts = np.asarray(starts, np.int32)
    return pack(
        lambda cells: starts[cells] if isinstance(cells, np.ndarray) else jnp.asarray(starts)[cells],
        len(starts),
        n_pos,
        batch_size,
    )


def test_the_chunks_of_a_triangle_are_even():
    packing = pack(lambda cells: cells, 16, 16, 4)
    assert (packing.n_chunks, packing.n_pairs) == (4, 16 * 17 // 2 // 4)


def test_rows_and_pairs_are_inverse_and_the_prefix_is_filled():
    starts = [3, 0, 2]
    packing = _packing(starts, 4, 3)
    cells = packing.cells(jnp.zeros((), jnp.int32))
    one = packing.suffixes(cells)
    rows = jnp.arange(2 * 3 * 4 * 5, dtype=jnp.float32).reshape(2, 3, 4, 5)
    before = -jnp.ones((2, 4, 5))
    filled = np.asarray(one.rows(one.flat(rows), before))
    for place, which in enumerate(cells.tolist()):
        first = starts[which]
        np.testing.assert_array_equal(filled[:, place, first:], rows[:, place, first:])
        np.testing.assert_array_equal(filled[:, place, :first], -1)
    np.testing.assert_array_equal(one.of(before), -np.ones((2, 4 + 1 + 2, 5)))
