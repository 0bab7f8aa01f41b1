"""Which tokens count, however the special ones are given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mi_jax.data.activations import ActivationStream, usable_tokens
from tests.models.tiny import tiny

TOKENS = np.arange(40, dtype=np.int32).reshape(4, 10) % 13
# every one a collection of the tokens 3 and 11
COLLECTIONS = {
    "tuple": (3, 11),
    "list": [11, 3, 3],
    "set": {3, 11},
    "frozenset": frozenset({3, 11}),
    "dict": {3: "bos", 11: "eos"},
    "numpy": np.array([3, 11]),
    "numpy int64": [np.int64(3), np.int64(11)],
    "jax": jnp.array([3, 11], jnp.int32),
    "generator": None,
}


@pytest.mark.parametrize("name", COLLECTIONS)
def test_special_tokens_of_any_collection_are_left_out(name):
    def given():
        return (token for token in (3, 11)) if name == "generator" else COLLECTIONS[name]

    expected = (TOKENS != 3) & (TOKENS != 11) & (np.arange(10) > 0)[None, :]
    np.testing.assert_array_equal(usable_tokens(TOKENS, special_ids=given()), expected)
    sizes = {"batch_size": 2, "buffer_size": 8, "contexts_per_chunk": 2}
    stream = ActivationStream(tiny(), TOKENS, "embed", key=jax.random.key(0), special_ids=given(), **sizes)
    assert stream.n_rows == expected.sum()


def test_one_special_token_and_none():
    np.testing.assert_array_equal(usable_tokens(TOKENS, special_ids=3, skip_positions=0), TOKENS != 3)
    for none in ((), set(), np.zeros(0, int), []):
        assert usable_tokens(TOKENS, special_ids=none, skip_positions=0).all()
    # padding may have any of the tokens
    mask = np.arange(10)[None, :] < np.array([10, 4, 7, 1])[:, None]
    for kind in (bool, np.int32, np.float32):
        # past the check of types that only tests have
        found = usable_tokens.__wrapped__(TOKENS, mask=mask.astype(kind), special_ids={3}, skip_positions=0)
        assert found.dtype == bool
        np.testing.assert_array_equal(found, mask & (TOKENS != 3))
