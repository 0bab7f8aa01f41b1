"""The logit lens against numpy, the model's own output, and the unpadded, gathered and uncompiled readings."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mi_jax as mi
from mi_jax.core.errors import InputError
from mi_jax.features.lens import logit_lens, native_head
from tests.models.tiny import prompts, tiny

TOLERANCE = 2e-5


class Foreign(eqx.Module):
    """A decoder behind another class, as an adapter would have it."""

    inner: Any

    @property
    def site_table(self):
        return self.inner.site_table

    def __call__(self, *inputs, **options):
        return self.inner(*inputs, **options)


def numpy_head(model, x):
    """Final norm and unembedding, float64."""
    x, norm = np.asarray(x, np.float64), model.final_norm
    if norm.weight is not None:
        x = x if norm.bias is None else x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + norm.eps) * np.asarray(norm.weight, np.float64)
        x = x if norm.bias is None else x + np.asarray(norm.bias, np.float64)
    return x @ np.asarray(model.embed if model.unembed is None else model.unembed, np.float64).T


@pytest.mark.parametrize("name", ["llama", "gpt2", "attention-only"])
def test_every_layer_is_the_streams_own_read_out(name):
    model, tokens, choices = tiny(name), prompts(0), jnp.array([[3, 0], [7, 12]], jnp.int32)
    reading = mi.jit(logit_lens(model))(tokens, choices=choices, keep_logits=True)
    output, acts = mi.jit(mi.capture(model, "resid_post"))(tokens)
    logits = numpy_head(model, acts["resid_post"])
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    final = np.asarray(output, np.float64)
    final = final - np.log(np.exp(final).sum(-1, keepdims=True))
    chosen = np.broadcast_to(np.asarray(choices)[None, :, None], (*logits.shape[:3], 2))
    chosen_logits = np.take_along_axis(logits, chosen, -1)
    np.testing.assert_allclose(reading.logits, logits, atol=TOLERANCE * np.abs(logits).max())
    np.testing.assert_allclose(reading.log_prob, np.take_along_axis(log_p, chosen, -1), atol=20 * TOLERANCE)
    np.testing.assert_allclose(reading.kl, (np.exp(final) * (final - log_p)).sum(-1), atol=20 * TOLERANCE)
    np.testing.assert_array_equal(reading.rank, (logits[..., None, :] > chosen_logits[..., None]).sum(-1))
    np.testing.assert_array_equal(reading.top, logits.argmax(-1))
    np.testing.assert_allclose(reading.logits[-1], output, atol=TOLERANCE * np.abs(final).max())


def test_the_last_layer_is_the_output_also_under_edits_and_the_others_are_not():
    model, tokens = tiny(), prompts(1)
    edited = mi.intervene(
        mi.intervene(model, mi.scale("final_norm", 2.0), mi.ablate("attn.z", layer=1, head=2)),
        mi.add("final_norm", jnp.ones(8), pos=3),
        mi.add("logits", 1.5, unit=4),
    )
    run = mi.jit(logit_lens(edited))
    reading = run(tokens)
    np.testing.assert_allclose(reading.kl[-1], 0.0, atol=1e-6)
    np.testing.assert_array_equal(reading.rank[-1], 0)
    assert (np.asarray(reading.mean_kl()[:-1]) > 0.01).all()
    np.testing.assert_allclose(reading.mean_kl(), reading.kl.mean((1, 2)), rtol=1e-5)


def test_padding_changes_nothing_and_does_not_count():
    lens, tokens = mi.jit(logit_lens(tiny())), prompts(2)
    mask = jnp.array([[True] * 5, [True] * 3 + [False] * 2])
    padded, short = (
        lens(tokens, mask, choices=jnp.array([1], jnp.int32)),
        lens(tokens[1:, :3], choices=jnp.array([1], jnp.int32)),
    )
    for name in ("kl", "log_prob"):
        found, expected = getattr(padded, name)[:, 1, :3], getattr(short, name)[:, 0]
        np.testing.assert_allclose(found, expected, atol=20 * TOLERANCE)
    real = np.concatenate([np.asarray(padded.kl[:, 0]), np.asarray(padded.kl[:, 1, :3])], 1)
    np.testing.assert_allclose(padded.mean_kl(), real.mean(1), rtol=1e-4)


def test_some_layers_and_positions_are_those_of_the_whole_reading():
    model, tokens, position = tiny(), prompts(3), jnp.array([4, 2], jnp.int32)
    by_prompt = jnp.array([[3], [7]], jnp.int32)
    by_place = jnp.broadcast_to(by_prompt[:, None], (2, 5, 1))
    whole = mi.jit(logit_lens(model, site="resid_mid"))(tokens, choices=by_place)
    part = mi.jit(logit_lens(model, site="resid_mid", layers=(2, 0)))(tokens, choices=by_prompt, output_pos=position)
    assert part.kl.shape == (2, 2, 1)
    for name in ("kl", "top", "log_prob", "rank"):
        expected = np.stack([getattr(whole, name)[np.array([2, 0]), i, p] for i, p in enumerate(position)], 1)
        np.testing.assert_allclose(getattr(part, name)[:, :, 0], expected, atol=20 * TOLERANCE)


def test_uncompiled_equals_compiled_and_no_more_than_one_layers_logits_exist():
    model, tokens = tiny(), prompts(4)
    lens = logit_lens(model)
    for a, b in zip(jax.tree.leaves(lens(tokens)), jax.tree.leaves(mi.jit(lens)(tokens)), strict=True):
        np.testing.assert_allclose(a, b, atol=20 * TOLERANCE)
    all_logits = "f32[3,2,5,13]"
    assert all_logits not in str(jax.make_jaxpr(lens)(tokens))
    assert all_logits in str(jax.make_jaxpr(lambda t: lens(t, keep_logits=True))(tokens))


def test_a_foreign_model_needs_a_head_and_reads_the_same_with_it():
    model, tokens = tiny(), prompts(4)
    with pytest.raises(mi.SiteError, match=r"Foreign is not a native decoder.*pass head="):
        logit_lens(Foreign(model))
    foreign = mi.jit(logit_lens(Foreign(model), head=native_head(model)))(tokens)
    np.testing.assert_allclose(foreign.kl, mi.jit(logit_lens(model))(tokens).kl, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"site": "attn.z"}, "reads the stream of every layer.*'attn.z' has axes layer batch pos head d_head"),
        ({"site": "blocks.1.hook_resid_post"}, r"names layer 1: pass layers=\(1,\)"),
        ({"site": "resid_pots"}, "has no site 'resid_pots'; it has embed"),
        ({"layers": (3,)}, r"has 3 layers \(0–2\); got layer=3"),
    ],
)
def test_what_cannot_be_read_is_named(options, message):
    with pytest.raises(mi.SiteError, match=message):
        logit_lens(tiny(), **options)


def test_choices_that_do_not_fit_are_named():
    lens, tokens = logit_lens(tiny()), prompts(4)
    with pytest.raises(InputError, match="choices holds token 13; the vocabulary is 0–12"):
        lens(tokens, choices=jnp.array([0, 13], jnp.int32))
    with pytest.raises(InputError, match=r"shape \(3, 1\) do not fit.*batch=2, pos=5"):
        lens(tokens, choices=jnp.zeros((3, 1), jnp.int32))
