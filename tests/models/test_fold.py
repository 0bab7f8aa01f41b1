"""Folded and centered models compute what the raw ones do, and their weights are what they should be."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mi_jax as mi
from mi_jax.core.errors import InputError
from mi_jax.models.decoder import Decoder
from mi_jax.models.fold import center_unembed, center_writing, fold_norms
from mi_jax.models.parameters import abstract_decoder
from tests.models.tiny_families import FAMILIES, family, inputs, noisy

TOLERANCE = 1e-10
# where the stream is, and what is added to it
STREAM = ("embed", "resid_pre", "attn.q_in", "attn.k_in", "attn.v_in", "attn.head_out", "attn_out", "resid_mid")
STREAM += ("mlp.in", "mlp_out", "resid_post")


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def in_float64(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float64), tree)


def run(model: Decoder, x):
    """Output and all sites."""
    x = x if x.dtype == jnp.int32 else in_float64(x)
    return jax.tree.map(np.asarray, mi.jit(mi.capture(model, *model.site_table.names))(x))


def exact(transform, name: str) -> tuple[Decoder, Decoder]:
    """A model and the transformed one."""
    model = in_float64(family(name))
    return model, transform(model)


def close(found, expected, message=""):
    np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=TOLERANCE, err_msg=message)


def check_structure(model: Decoder):
    """The configuration tells the truth about the parameters."""
    expected = abstract_decoder(model.config)
    assert jax.tree.structure(model) == jax.tree.structure(expected)
    jax.tree.map(lambda w, shape: None if w.shape == shape.shape else pytest.fail(str(w.shape)), model, expected)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "bert"])
def test_folding_changes_no_site_but_the_final_norm(name):
    raw, folded = exact(fold_norms, name)
    check_structure(folded)
    for norm in (folded.blocks.attn_norm, folded.blocks.mlp_norm, folded.final_norm):
        if norm is not None:
            np.testing.assert_array_equal(norm.weight + norm.offset, 1.0)
            assert norm.bias is None or not np.asarray(norm.bias).any()
    x = inputs(name, 0)
    (expected, before), (found, after) = run(raw, x), run(folded, x)
    close(found, expected)
    for site in before.keys() - {"final_norm"}:
        close(np.maximum(after[site], -1e9), np.maximum(before[site], -1e9), site)
    assert np.abs(after["final_norm"] - before["final_norm"]).max() > 0.1


@pytest.mark.parametrize("name", ["gpt2", "neox", "gptj", "vit"])
def test_centered_writing_takes_the_mean_off_the_stream_and_nothing_else(name):
    raw, centered = exact(center_writing, name)
    check_structure(centered)
    x = inputs(name, 1)
    (expected, before), (found, after) = run(raw, x), run(centered, x)
    close(found, expected)
    for site, value in before.items():
        if site in STREAM:
            close(after[site], value - value.mean(-1, keepdims=True), site)
            assert np.abs(value.mean(-1)).max() > 0.01, site
        else:
            close(np.maximum(after[site], -1e9), np.maximum(value, -1e9), site)


@pytest.mark.parametrize("name", ["llama", "gptj", "olmo2", "mixture", "vit"])
def test_a_centered_unembedding_shifts_all_logits_of_a_position_alike(name):
    raw, centered = exact(center_unembed, name)
    check_structure(centered)
    expected, found = run(raw, inputs(name, 2))[0], run(centered, inputs(name, 2))[0]
    close(found, expected - expected.mean(-1, keepdims=True))
    assert np.abs(expected.mean(-1)).max() > 0.01


def test_all_three_after_one_another_keep_the_probabilities():
    raw, folded = exact(lambda model: center_unembed(center_writing(fold_norms(model))), "gpt2")
    (expected, _), (found, _) = run(raw, inputs("gpt2", 3)), run(folded, inputs("gpt2", 3))
    close(jax.nn.log_softmax(found), jax.nn.log_softmax(expected))
    # folding is done once: a second time there is nothing to fold
    jax.tree.map(np.testing.assert_array_equal, fold_norms(folded), folded)


def test_the_raw_model_stays_as_it_is_and_half_precision_is_folded_in_full():
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), family("gemma"))
    reference = fold_norms(in_float64(half))
    before = jax.tree.map(np.asarray, half)
    folded = jax.jit(fold_norms)(half)
    jax.tree.map(np.testing.assert_array_equal, half, before)
    for found, expected in ((folded.blocks.attn.q, reference.blocks.attn.q), (folded.unembed, reference.unembed)):
        assert found.dtype == jnp.bfloat16
        # one rounding, of relative size 2⁻⁸, in all
        np.testing.assert_allclose(np.asarray(found, np.float64), np.asarray(expected), rtol=2**-8, atol=0)


def test_a_model_without_norms_has_nothing_to_fold():
    model = noisy(dataclasses.replace(FAMILIES["llama"], norm="none"))
    assert fold_norms(model) is model


REFUSED = [
    (fold_norms, {"norms": "post", "norm": "layer"}, r"stand on the stream itself \(norms='post'\)"),
    (fold_norms, {"norm": "layer", "n_experts": 2, "n_active_experts": 1}, "experts of llama-like have no biases"),
    (center_writing, {}, "llama-like has norm='rms', which reads the mean"),
    (center_writing, {"norm": "layer", "norms": "sandwich"}, r"norms on what is written .*\(norms='sandwich'\)"),
    (center_writing, {"norm": "layer", "embed_norm": True}, r"norms on what is written .*\(embed_norm=True\)"),
    (center_unembed, {"head": "none"}, "encoder without a head: it has no unembedding"),
    (center_unembed, {"logit_softcap": 5.0}, "have a soft cap, so a constant"),
]


@pytest.mark.parametrize(("transform", "change", "message"), REFUSED, ids=[m[:20] for _, _, m in REFUSED])
def test_what_would_change_the_model_is_refused_by_name(transform, change, message):
    model = noisy(dataclasses.replace(FAMILIES["llama"], **change))
    with pytest.raises(InputError, match=message):
        transform(model)
