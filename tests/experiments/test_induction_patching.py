"""Heads are chosen by where they attend, the null's by the same rule for another place."""

import numpy as np
import pytest

import mi_jax as mi
from experiments.induction_patching.smollm2 import INDUCTION_SHIFT, _attention_by_shift, _strongest
from mi_jax.data.tasks import repeated_tokens
from tests.circuits.tiny_task import model

HALF = 4


def test_attention_by_shift_is_the_mean_over_repeated_tokens():
    decoder = model()
    tokens = repeated_tokens(3, HALF, d_vocab=13, seed=0, first=1, repeat=True)
    got = np.asarray(mi.jit(_attention_by_shift)(decoder, tokens))
    pattern = np.asarray(mi.jit(mi.capture(decoder, "attn.pattern"))(tokens)[1]["attn.pattern"])
    for shift in range(HALF + 1):
        each = [pattern[:, :, :, HALF + i, i + shift] for i in range(HALF)]
        np.testing.assert_allclose(got[shift], np.mean(each, (0, 2)), rtol=1e-5)
    assert got.shape[0] == HALF + 1
    assert INDUCTION_SHIFT == 1


def test_the_strongest_heads_come_first_and_some_are_left_out():
    attention = np.array([[0.1, 0.9], [0.8, 0.2]])
    assert _strongest(attention, 2) == [(0, 1), (1, 0)]
    assert _strongest(attention, 2, without=[(0, 1)]) == [(1, 0), (1, 1)]


@pytest.mark.parametrize("n", [0, 4])
def test_as_many_heads_as_asked_for(n):
    assert len(_strongest(np.zeros((2, 2)), n)) == n
