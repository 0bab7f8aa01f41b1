"""Every activation in every topology against the oracle, and what folding must leave as it was."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mi_jax.core.errors import InputError
from mi_jax.decomposition import (
    COMBINATIONS,
    Dictionary,
    DictionaryConfig,
    TokenNorm,
    fold_decoder_norms,
    fold_scale,
    init,
)
from tests.decomposition import oracle
from tests.decomposition.cases import D_IN, D_SAE, TOPOLOGIES, K, activations, config_of, parameters, random_dictionary

TOLERANCE = 2e-5
KINDS = [
    (a, t)
    for a, t in itertools.product(COMBINATIONS, TOPOLOGIES)
    if not (a == "matching_pursuit" and "transcoder" in t)
]


@eqx.filter_jit
def run(dictionary, x):
    return dictionary.encode(x), dictionary(x), dictionary.decode(dictionary.encode(x))


@pytest.mark.parametrize(("activation", "topology"), KINDS)
def test_calls_are_the_equations(activation, topology):
    dictionary, x = random_dictionary(config_of(activation, topology)), activations()
    p = parameters(dictionary)
    z = oracle.codes(activation, p, np.asarray(x, np.float64), k=K)
    codes, out, decoded = run(dictionary, x)
    assert (z != 0).any()
    np.testing.assert_allclose(codes, z, atol=TOLERANCE)
    np.testing.assert_allclose(out, oracle.reconstruction(p, np.asarray(x, np.float64), z), atol=TOLERANCE)
    if topology != "skip_transcoder":
        np.testing.assert_allclose(decoded, out, atol=TOLERANCE)


def test_any_leading_axes_and_vmap():
    dictionary, x = random_dictionary(config_of("topk")), activations().reshape(2, 5, D_IN)
    out = dictionary(x)
    np.testing.assert_allclose(dictionary(x[1, 2]), out[1, 2], atol=TOLERANCE)
    np.testing.assert_allclose(jax.vmap(dictionary)(x), out, atol=TOLERANCE)
    values, latents = dictionary.encode_sparse(x)
    np.testing.assert_allclose(values, jnp.take_along_axis(dictionary.encode(x), latents, -1), atol=TOLERANCE)
    assert (jnp.diff(values, axis=-1) <= 0).all()


@pytest.mark.parametrize("activation", COMBINATIONS)
def test_a_folded_scale_changes_units_and_nothing_else(activation):
    dictionary, x = random_dictionary(config_of(activation)), activations()
    folded = fold_scale(dictionary, 0.25)
    codes, out, _ = run(dictionary, x)
    new_codes, new_out, _ = run(folded, x / 0.25)
    np.testing.assert_allclose(new_codes * 0.25, codes, atol=1e-4)
    np.testing.assert_allclose(new_out * 0.25, out, atol=1e-4)


def test_a_transcoders_two_scales_fold():
    dictionary, x = random_dictionary(config_of("jumprelu", "skip_transcoder")), activations()
    folded = fold_scale(dictionary, jnp.float32(0.5), jnp.float32(4.0))
    np.testing.assert_allclose(folded(x / 0.5) * 4.0, dictionary(x), atol=1e-4)


@pytest.mark.parametrize("activation", ["relu", "gated", "jumprelu", "batchtopk"])
def test_folded_decoder_norms_change_nothing(activation):
    dictionary, x = random_dictionary(config_of(activation)), activations()
    folded = fold_decoder_norms(dictionary)
    np.testing.assert_allclose(jnp.linalg.norm(folded.w_dec, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(folded(x), dictionary(x), atol=TOLERANCE)
    norms = jnp.linalg.norm(dictionary.w_dec, axis=1)
    np.testing.assert_allclose(folded.encode(x), dictionary.encode(x) * norms[None, :], atol=TOLERANCE)


def test_folding_norms_into_topk_changes_which_latents_are_kept():
    config = config_of("topk")
    dictionary, x = random_dictionary(config), activations()
    p = parameters(dictionary)
    h = oracle.preactivations(p, np.asarray(x, np.float64))
    norms = np.linalg.norm(p["w_dec"], axis=1)
    want = oracle.relu(oracle.keep_largest(h * norms, K))
    folded = fold_decoder_norms(dictionary)
    np.testing.assert_allclose(folded.encode(x), want, atol=TOLERANCE)
    assert ((want > 0) != (dictionary.encode(x) > 0)).any()


@pytest.mark.parametrize(("kind", "ddof"), [("layer_norm", 0), ("layer_norm", 1), ("unit_norm", 0)])
def test_token_norm_is_undone(kind, ddof):
    bare, x = random_dictionary(config_of("relu")), 7 * activations() + 3
    dictionary = eqx.tree_at(lambda d: d.token_norm, bare, TokenNorm(kind, 1e-5, ddof), is_leaf=lambda a: a is None)
    a = np.asarray(x, np.float64)
    if kind == "layer_norm":
        mean, back = a.mean(1, keepdims=True), a.std(1, keepdims=True, ddof=ddof)
        size = back + 1e-5
    else:
        mean, size = 0.0, (np.linalg.norm(a, axis=1, keepdims=True) + 1e-5) / D_IN**0.5
        back = size
    want = np.asarray(bare(jnp.asarray((a - mean) / size, jnp.float32))) * back + mean
    np.testing.assert_allclose(dictionary(x), want, rtol=1e-4, atol=1e-4)


def test_init_ties_encoder_to_unit_decoder():
    dictionary = init(DictionaryConfig(D_IN, D_SAE, k=K), key=jax.random.key(0))
    np.testing.assert_allclose(jnp.linalg.norm(dictionary.w_dec, axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(dictionary.w_enc, dictionary.w_dec)


def test_a_crosscoders_norm_is_the_sum_over_sites():
    dictionary = random_dictionary(config_of("relu", "crosscoder"))
    w = np.asarray(dictionary.w_dec)
    want = np.linalg.norm(w[:, :3], axis=1) + np.linalg.norm(w[:, 3:], axis=1)
    np.testing.assert_allclose(dictionary.decoder_norms(), want, rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"d_sae": 0}, "d_sae must be at least 1"),
        ({"k": 40}, "k=40 must be at most d_sae=32"),
        ({"activation": "softmax"}, "no activation 'softmax'; there are relu, gated"),
        ({"activation": "switch", "n_experts": 5}, "n_experts=5 must divide"),
        ({"n_sites": 4}, "n_sites=4 must divide"),
        ({"d_out": 3}, "only a transcoder"),
        ({"skip": True}, "only a transcoder"),
        ({"activation": "matching_pursuit", "transcoder": True}, "cannot be a transcoder"),
    ],
)
def test_faults_of_a_config_are_named(fields, message):
    with pytest.raises(InputError, match=message):
        DictionaryConfig(**({"d_in": D_IN, "d_sae": D_SAE, "k": K} | fields))


def test_faults_of_a_call_are_named():
    dictionary: Dictionary = random_dictionary(config_of("relu"))
    with pytest.raises(InputError, match=r"width 6, got shape \(3, 5\)"):
        dictionary(jnp.ones((3, 5)))
    with pytest.raises(InputError, match="ReLU has no fixed number of codes"):
        dictionary.encode_sparse(activations())
