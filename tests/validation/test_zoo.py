"""The organisms that come with the project do what they are said to do."""

import jax
import pytest

from mi_jax.core.errors import InputError
from mi_jax.validation import ORGANISMS, load_organism, quality


@pytest.mark.parametrize("number", range(ORGANISMS))
def test_they_have_both_mechanisms_and_nothing_else(number):
    found = quality(load_organism(number), 16, key=jax.random.key(5))
    assert found.faults == []
    assert not any(truth.undecided for truth in found.truths.values())


def test_there_is_no_other():
    with pytest.raises(InputError, match=f"organisms 0 to {ORGANISMS - 1}"):
        load_organism(ORGANISMS)
