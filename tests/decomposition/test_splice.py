"""A spliced dictionary: with its error term only the edit changes anything."""

import jax
import numpy as np
import pytest

import mi_jax as mi
from mi_jax.decomposition import DictionaryConfig, Splice, init
from tests.models.tiny import prompts, tiny

TOLERANCE = 1e-5
TOKENS = prompts(3)


@pytest.fixture(scope="module")
def sae():
    return init(DictionaryConfig(8, 16, k=3), key=jax.random.key(0))


def stream(splice):
    model = mi.intervene(tiny(), mi.transform("resid_post", splice, layer=1))
    return np.asarray(mi.jit(mi.capture(model, "resid_post"))(TOKENS)[1]["resid_post"][1])


def test_the_error_term_keeps_what_the_dictionary_misses(sae):
    plain = mi.jit(mi.capture(tiny(), "resid_post"))(TOKENS)[1]["resid_post"][1]
    codes = np.asarray(sae.encode(plain))
    latent = int(codes.sum((0, 1)).argmax())
    np.testing.assert_allclose(stream(Splice(sae)), plain, atol=TOLERANCE)
    np.testing.assert_allclose(stream(Splice(sae, error_term=False)), sae(plain), atol=TOLERANCE)
    without = stream(Splice(sae, lambda z: z.at[..., latent].set(0.0)))
    expected = plain - codes[..., latent, None] * np.asarray(sae.w_dec[latent])
    np.testing.assert_allclose(without, expected, atol=TOLERANCE)
    assert np.abs(expected - plain).max() > 0.1
    without = stream(Splice(sae, lambda z: z.at[..., latent].set(0.0), error_term=False))
    np.testing.assert_allclose(without, np.asarray(sae(plain)) + expected - plain, atol=TOLERANCE)
