"""The size that is the answer for the widest range of targets, against a search over a fine grid of targets."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mi_jax.circuits import discover, faithfulness, plateau, plateau_circuit
from mi_jax.core.errors import InputError
from tests.circuits.tiny_task import model, task


def answer(values: np.ndarray, target: float) -> int | None:
    """What a target asks for: the first size within `1 ± (1 − target)`."""
    good = np.flatnonzero(np.abs(1 - values) <= 1 - target)
    return int(good[0]) if len(good) else None


@given(st.lists(st.integers(0, 80), min_size=1, max_size=12))
@settings(deadline=None)
def test_it_is_the_most_frequent_answer_over_targets(hundredths):
    values = np.array([*hundredths, 50]) / 50
    # between the values, so that no target meets one exactly
    answers = [answer(values, t) for t in (np.arange(50, 100) + 0.5) / 100]
    found = plateau(values)
    widths = np.bincount([a for a in answers if a is not None], minlength=len(values))
    assert widths[found.index] == widths.max()
    assert found.index == int(widths.argmax())
    assert found.width == pytest.approx(widths.max() / 100)


def test_a_weak_edge_at_the_edge_of_a_target_does_not_move_the_size():
    # five edges that carry the behaviour, and a few more that carry the last share of it
    for last in (0.92, 0.949, 0.951, 0.98):
        found = plateau([0.0, 0.0, 0.1, 0.5, last, last, 0.997, 0.999, 1.0])
        assert found.index == 4
        assert (found.low, found.high) == pytest.approx((0.5, last))


def test_overshoot_is_no_better_than_a_shortfall():
    assert plateau([0.6, 1.6, 0.9]).index == 2


@pytest.mark.parametrize(
    ("values", "least", "message"),
    [
        ([], 0.5, "faithfulness of every size"),
        ([0.5, np.nan], 0.5, "finite"),
        ([0.1, 0.4], 0.5, "no circuit keeps 0.5"),
        ([1.0], 1.0, "below 1"),
    ],
)
def test_what_has_no_plateau_is_refused(values, least, message):
    with pytest.raises(InputError, match=message):
        plateau(values, least=least)


def test_the_circuit_is_the_answer_of_discover_for_every_target_of_the_range():
    decoder, pairs = model(), task()
    found, range_of_targets = plateau_circuit(decoder, pairs)
    low, high = range_of_targets.low, range_of_targets.high
    assert found.faithfulness == pytest.approx(float(faithfulness(decoder, pairs, [found.mask])[0]), abs=1e-5)
    assert high == pytest.approx(1 - abs(1 - found.faithfulness), abs=1e-5)
    for share in (0.1, 0.9):
        target = low + share * (high - low)
        np.testing.assert_array_equal(discover(decoder, pairs, target=target, scores=found.scores).mask, found.mask)
