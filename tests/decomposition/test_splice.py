"""A spliced dictionary: with its error term only the edit changes anything."""

import dataclasses

import equinox as eqx
import jax
import numpy as np
import pytest

import mi_jax as mi
from mi_jax.decomposition import COMBINATIONS, DictionaryConfig, Splice, TokenNorm, init
from tests.decomposition.cases import D_IN, activations, config_of, random_dictionary
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


NORMS = {"no norm": None, "layer_norm": TokenNorm("layer_norm", ddof=1), "unit_norm": TokenNorm("unit_norm")}
KINDS = [(a, "sae", "layer_norm") for a in COMBINATIONS] + [("topk", "sae", "unit_norm"), ("relu", "sae", "no norm")]
KINDS += [("topk", "skip", "no norm"), ("batchtopk", "skip", "unit_norm"), ("jumprelu", "skip", "no norm")]


def doubled(codes):
    return 2 * codes


@eqx.filter_jit
def spliced(dictionary, x):
    own, plain = dictionary(x), dictionary.encode(x)
    kept, edited = (Splice(dictionary, edit, error_term=False)(x) for edit in (None, doubled))
    return own, plain, kept, edited, Splice(dictionary)(x), Splice(dictionary, doubled)(x)


@pytest.mark.parametrize(("activation", "topology", "norm"), KINDS)
def test_a_splice_is_the_dictionarys_own_call_with_other_codes(activation, topology, norm):
    if topology == "skip":
        config = config_of(activation, transcoder=True, d_out=D_IN, skip=True)
    else:
        config = config_of(activation)
    dictionary = dataclasses.replace(random_dictionary(config), token_norm=NORMS[norm])
    # far from unit size, so that a norm that is left out is seen
    x = 50 * activations()
    own, codes, kept, edited, same, changed = (np.asarray(a, np.float64) for a in spliced(dictionary, x))
    tolerance = TOLERANCE * np.abs(own).max()
    assert (codes != 0).any()
    np.testing.assert_allclose(kept, own, atol=tolerance)
    np.testing.assert_allclose(same, x, atol=tolerance)
    # ŷ is affine in the codes, and a token norm multiplies what they add by the token's own size
    size = {"no norm": 1.0, "layer_norm": x.std(1, ddof=1), "unit_norm": np.linalg.norm(x, axis=1) / D_IN**0.5}[norm]
    added = codes @ np.asarray(dictionary.w_dec, np.float64) * np.reshape(np.asarray(size), (-1, 1))
    np.testing.assert_allclose(edited - kept, added, atol=tolerance + 1e-4 * np.abs(added).max())
    np.testing.assert_allclose(changed - same, added, atol=tolerance + 1e-4 * np.abs(added).max())
