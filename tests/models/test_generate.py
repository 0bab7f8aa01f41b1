"""Generation: every step equals the forward of the whole text, under edits and captures, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import mi_jax as mi
from mi_jax.core.errors import InputError
from mi_jax.core.transforms import compiled
from mi_jax.models.generate import generate
from tests.features.test_lens import Foreign
from tests.models.tiny import prompts
from tests.models.tiny_families import FAMILIES, family

TOLERANCE = 1e-5
LENGTHS = jnp.array([4, 2, 3], jnp.int32)
MASK = jnp.arange(4)[None, :] < LENGTHS[:, None]
N_NEW = 5


def close(found, expected, message=""):
    bound = TOLERANCE * max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(found, expected, rtol=0, atol=bound, err_msg=message)


def texts(tokens, made):
    """Prompts and what was generated, without the padding between them."""
    return [jnp.concatenate([tokens[i, :n], made.tokens[i]]) for i, n in enumerate(LENGTHS.tolist())]


def check_acts(model, tokens, made, **site_layers):
    """What the steps captured equals what a forward of the whole text holds at the same positions."""
    for row, text in enumerate(texts(tokens, made)):
        wanted = [mi.at(site, layers) for site, layers in site_layers.items()]
        _, acts = mi.jit(mi.capture(model, *wanted))(text[None])
        n = int(LENGTHS[row])
        for site, value in made.acts.items():
            axes = model.site_table.resolve(site)[0].axes
            axes = axes[1:] if isinstance(site_layers[site], int) else axes
            pos = axes.index("pos" if "pos" in axes else "query") - 1
            found = np.asarray(value).take(row, axes.index("batch"))
            expected = np.asarray(acts[site]).take(0, axes.index("batch")).take(range(n - 1, n - 1 + N_NEW), pos)
            if "key" in axes:
                hidden = found[..., expected.shape[-1] :]
                assert (hidden == 0.0).all() if site == "attn.pattern" else (hidden < -1e9).all()
                found = found[..., : expected.shape[-1]]
                # a score that is not allowed may be any hugely negative number
                found, expected = np.maximum(found, -1e9), np.maximum(expected, -1e9)
                np.testing.assert_array_equal(found == -1e9, expected == -1e9)
                found, expected = np.where(found == -1e9, 0, found), np.where(expected == -1e9, 0, expected)
            close(found, expected, f"{site} in row {row}")


SITES = {"resid_pre": None, "attn.z": (1, 0, 1), "mlp_out": 1, "logits": None, "embed": None, "final_norm": None}
WITH_KEYS = {"attn.pattern": None, "attn.scores": 1, "attn.q": None, "attn.k": (1,)}


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "gptj", "gemma", "mixture"])
def test_a_step_equals_that_position_of_the_whole_forward(name):
    """Ragged prompts; windows are shorter than the texts, and captured keys count the whole text."""
    model, tokens = family(name), prompts(1, 3, 4)
    sites = SITES if name in ("gpt2", "mixture") else WITH_KEYS if name == "gemma" else {"resid_post": None}
    captured = mi.capture(model, "logits", *[mi.at(site, layers) for site, layers in sites.items()])
    made = generate(captured, tokens, MASK, max_new_tokens=N_NEW)
    assert made.tokens.shape == made.mask.shape == (3, N_NEW)
    assert np.asarray(made.mask).all()
    check_acts(model, tokens, made, **(sites | {"logits": None}))
    np.testing.assert_array_equal(made.tokens, made.acts["logits"].argmax(-1))


@pytest.mark.parametrize("name", ["gemma", "gpt2"])
def test_ragged_prompts_are_continued_as_alone(name):
    model, tokens = family(name), prompts(2, 3, 4)
    together = generate(model, tokens, MASK, max_new_tokens=N_NEW)
    # what stands at padding does not matter
    other = generate(model, jnp.where(MASK, tokens, 9), MASK, max_new_tokens=N_NEW)
    np.testing.assert_array_equal(together.tokens, other.tokens)
    for row, n in enumerate(LENGTHS.tolist()):
        alone = generate(model, tokens[row : row + 1, :n], max_new_tokens=N_NEW)
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])


# learned positions, rotary ones, windows
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma"])
def test_prompts_padded_on_the_left_are_continued_as_those_padded_on_the_right(name):
    """And so are prompts with padding on both sides; what a step captures is that of the same text."""
    model, tokens = family(name), prompts(2, 3, 4)
    shift = jnp.array([0, 1, 1], jnp.int32)
    there = jnp.arange(4, dtype=jnp.int32)[None, :] - shift[:, None]
    moved = jnp.where((there >= 0) & (there < LENGTHS[:, None]), jnp.take_along_axis(tokens, there % 4, 1), 9)
    captured = mi.capture(model, "logits")
    right = generate(captured, tokens, MASK, max_new_tokens=N_NEW)
    left = generate(captured, moved, (there >= 0) & (there < LENGTHS[:, None]), max_new_tokens=N_NEW)
    np.testing.assert_array_equal(left.tokens, right.tokens)
    close(left.acts["logits"], right.acts["logits"])


def test_a_captured_pattern_counts_the_columns_of_prompts_padded_on_the_left():
    model, tokens = family("gpt2"), prompts(2, 1, 4)
    mask = jnp.array([[False, True, True, True]])
    alone = generate(mi.capture(model, "attn.pattern"), tokens[:, 1:], max_new_tokens=3)
    padded = generate(mi.capture(model, "attn.pattern"), tokens, mask, max_new_tokens=3)
    close(padded.acts["attn.pattern"][..., 1:], alone.acts["attn.pattern"])
    assert (padded.acts["attn.pattern"][..., 0] == 0).all()


@pytest.mark.parametrize("temperature", [1e-30, 1e-38, 1e-40, 1e-45])
@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.9}])
def test_at_a_temperature_near_zero_the_most_likely_token_is_drawn(temperature, options):
    model, tokens = family("llama"), prompts(5, 3, 4)
    greedy = generate(model, tokens, max_new_tokens=3)
    drawn = generate(model, tokens, max_new_tokens=3, temperature=temperature, key=jax.random.key(0), **options)
    np.testing.assert_array_equal(drawn.tokens, greedy.tokens)


def test_edits_without_a_position_are_made_at_every_token_and_those_with_one_in_the_prompt():
    model, tokens = family("llama"), prompts(3, 3, 4)
    direction = jax.random.normal(jax.random.key(5), (8,))
    everywhere, in_prompt = mi.add("resid_mid", direction, layer=0), mi.scale("attn.z", 3.0, layer=1, head=2, pos=1)
    edited = mi.intervene(mi.intervene(model, everywhere), in_prompt)
    made = generate(mi.capture(edited, "resid_post", "logits"), tokens, MASK, max_new_tokens=N_NEW)
    check_acts(edited, tokens, made, resid_post=None, logits=None)
    plain = generate(model, tokens, MASK, max_new_tokens=N_NEW)
    assert (made.tokens != plain.tokens).any()
    # a position counts from the start of the prompt, so in the whole text it is the same one
    only = generate(mi.capture(mi.intervene(model, in_prompt), "logits"), tokens, MASK, max_new_tokens=N_NEW)
    check_acts(mi.intervene(model, in_prompt), tokens, only, logits=None)


def test_an_edit_of_the_logits_decides_what_is_written():
    model, tokens = family("llama"), prompts(4, 3, 4)
    made = generate(mi.intervene(model, mi.add("logits", 1e3, unit=6)), tokens, MASK, max_new_tokens=3)
    assert (made.tokens == 6).all()


def test_a_text_ends_at_its_stop_token():
    model, tokens = family("gpt2"), prompts(1, 3, 4)
    free = generate(model, tokens, MASK, max_new_tokens=N_NEW)
    stop = int(free.tokens[0, 1])
    made = generate(model, tokens, MASK, max_new_tokens=N_NEW, stop=stop)
    for row in range(3):
        written = free.tokens[row].tolist()
        n = written.index(stop) + 1 if stop in written else N_NEW
        assert made.tokens[row].tolist() == written[:n] + [stop] * (N_NEW - n)
        assert made.mask[row].tolist() == [True] * n + [False] * (N_NEW - n)
    everything = generate(model, tokens, MASK, max_new_tokens=N_NEW, stop=range(13))
    np.testing.assert_array_equal(everything.tokens, np.repeat(np.asarray(free.tokens[:, :1]), N_NEW, 1))
    assert everything.mask.sum() == 3


def test_drawn_tokens_are_those_that_top_k_leaves_and_a_key_gives_them_again():
    model, tokens = family("llama"), jnp.repeat(prompts(5, 1, 4), 48, 0)

    def draw(seed, **options):
        captured = mi.capture(model, "logits")
        key = jax.random.key(seed)
        return generate(captured, tokens, max_new_tokens=3, temperature=1.5, key=key, **options)

    one, again, other = draw(0, top_k=3), draw(0, top_k=3), draw(1, top_k=3)
    np.testing.assert_array_equal(one.tokens, again.tokens)
    assert (one.tokens != other.tokens).any()
    logits = np.asarray(one.acts["logits"])
    rank = (logits > np.take_along_axis(logits, np.asarray(one.tokens)[..., None], -1)).sum(-1)
    assert set(np.unique(rank)) == {0, 1, 2}
    # the first tokens are drawn from one distribution, independently
    assert len(set(one.tokens[:, 0].tolist())) == 3
    greedy = generate(model, tokens[:1], max_new_tokens=3)
    np.testing.assert_array_equal(draw(2, top_p=1e-6).tokens[0], greedy.tokens[0])


def test_other_values_of_the_same_shapes_use_the_same_program():
    model, key = family("llama"), jax.random.key(0)

    def run(seed, layer, temperature):
        edited = mi.intervene(model, mi.add("resid_mid", 0.1 * seed, layer=layer))
        return generate(
            edited, prompts(seed, 3, 4), MASK, max_new_tokens=2, temperature=temperature, top_p=0.5, key=key
        )

    run(1, 0, 1.0)
    before = compiled._cached._cache_size()
    run(2, 1, 0.3)
    assert compiled._cached._cache_size() == before


REFUSED = [
    ({"max_new_tokens": 0}, r"max_new_tokens is at least 1, got 0"),
    ({"max_new_tokens": 2.0}, r"max_new_tokens is a whole number, got 2.0"),
    ({"temperature": 1.0, "key": 0}, r"temperature=1.0 draws tokens: pass key=.*got key=0"),
    ({"temperature": 1.0, "key": jax.random.key(0), "top_k": 2.5}, r"top_k is a whole number, got 2.5"),
    ({"stop": -1}, r"stop=-1 is no token of llama-like, which has 13 of them"),
    ({"stop": (3, 13)}, r"stop=13 is no token of llama-like, which has 13 of them"),
    ({"tokens": [[1, 2]], "mask": None}, r"tokens are an array \[batch pos\].*got list"),
    ({"max_new_tokens": 13}, r"4 tokens and 13 new ones are more than the context of llama-like, 16"),
    ({"temperature": 1.0}, r"temperature=1.0 draws tokens: pass key"),
    ({"temperature": -1.0, "key": jax.random.key(0)}, r"temperature=-1.0: it is 0 .* or a positive number"),
    ({"temperature": float("nan"), "key": jax.random.key(0)}, r"temperature=nan: it is 0 .* or a positive number"),
    ({"temperature": float("inf"), "key": jax.random.key(0)}, r"temperature=inf: it is 0 .* or a positive number"),
    (
        {"tokens": jnp.zeros((0, 4), jnp.int32), "mask": None},
        r"at least one prompt of at least one token; got \(0, 4\)",
    ),
    ({"top_k": 0}, r"top_k is at least 1"),
    ({"top_p": 0.0}, r"top_p in \(0, 1\]"),
    ({"mask": ~MASK}, r"pad on the right"),
    ({"mask": jnp.array([[True, False, True, True]] * 3)}, r"pad on the right"),
    ({"tokens": jnp.zeros((3, 0), jnp.int32), "mask": None}, r"at least one token; got \(3, 0\)"),
    ({"tokens": prompts(0, 3, 4).at[2, 1].set(13)}, r"llama-like has 13 tokens \(0–12\); got 13 in row 2, position 1"),
    ({"tokens": prompts(0, 3, 4).at[0, 0].set(-1)}, r"13 tokens \(0–12\); got -1 in row 0, position 0"),
    ({"top_k": 2}, r"top_k and top_p choose among drawn tokens: pass a temperature"),
    ({"top_p": 0.5, "key": jax.random.key(0)}, r"top_k and top_p choose among drawn tokens: pass a temperature"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_what_cannot_be_generated_is_named(change, message, monkeypatch):
    # as for a user: only tests check the types of arguments
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    options = {"tokens": prompts(0, 3, 4), "mask": MASK, "max_new_tokens": 2} | change
    tokens, mask = options.pop("tokens"), options.pop("mask")
    with pytest.raises(InputError, match=message):
        generate(family("llama"), tokens, mask, **options)


def test_models_and_edits_that_cannot_generate_are_named():
    tokens, key = prompts(0, 3, 4), jax.random.key(0)
    with pytest.raises(InputError, match="bert-like is an encoder: it predicts no next token"):
        generate(family("bert"), tokens, max_new_tokens=1)
    with pytest.raises(InputError, match="Foreign is not a native decoder"):
        generate(Foreign(family("llama")), tokens, max_new_tokens=1)
    for edit in (mi.noise("resid_mid", 0.1, key=key), mi.ablate("mlp_out", baseline="mean")):
        with pytest.raises(mi.SiteError, match="has no meaning at a single generated token"):
            generate(mi.intervene(family("llama"), edit), tokens, max_new_tokens=1)
    _, acts = mi.jit(mi.capture(family("llama"), "resid_mid"))(tokens)
    with pytest.raises(mi.SiteError, match=r"captured value for site 'resid_mid' is of a prompt.*give it pos="):
        generate(mi.intervene(family("llama"), mi.patch("resid_mid", acts)), tokens, max_new_tokens=1)
    # an edit at a position that is not there makes everything NaN once it is traced
    with pytest.raises(mi.SiteError, match=r"has 4 places on 'pos'.*got pos=4"):
        generate(mi.intervene(family("llama"), mi.add("resid_mid", 1.0, pos=4)), tokens, max_new_tokens=1)
    # in the prompt they have one
    at_start = mi.ablate("mlp_out", baseline="mean", pos=0)
    assert generate(mi.intervene(family("llama"), at_start), tokens, max_new_tokens=1).tokens.shape == (3, 1)


def test_logits_that_become_nan_are_named_with_their_step():
    """The position of a token has no embedding, so what is written from there on has no meaning."""
    model, tokens = family("gpt2"), prompts(1, 3, 4)
    broken = dataclasses.replace(model, pos_embed=model.pos_embed.at[5].set(jnp.nan))
    # of the prompts with 4, 2 and 3 tokens the longest gets to position 5 first, when its third token is chosen
    with pytest.raises(
        InputError, match="gpt2-like are NaN in 3 of 3 texts, first in text 0 from generated token 2 on"
    ):
        generate(broken, tokens, MASK, max_new_tokens=N_NEW)
    with pytest.raises(InputError, match="NaN in 1 of 3 texts, first in text 0 from generated token 2 on"):
        generate(broken, tokens, MASK, max_new_tokens=3, temperature=1.0, top_p=0.5, key=jax.random.key(0))
    assert generate(broken, tokens, MASK, max_new_tokens=2).nan_step.tolist() == [-1, -1, -1]
    everything = dataclasses.replace(model, embed=jnp.full_like(model.embed, jnp.nan))
    with pytest.raises(InputError, match="NaN in 3 of 3 texts, first in text 0 after the prompt already"):
        generate(everything, tokens, MASK, max_new_tokens=1)


def test_where_generation_is_traced_nan_logits_are_in_the_result():
    model, tokens = family("llama"), prompts(4, 3, 4)

    def run(size):
        return generate(mi.intervene(model, mi.add("logits", size, unit=6)), tokens, MASK, max_new_tokens=2)

    made = jax.vmap(run)(jnp.array([1e3, jnp.nan]))
    assert made.nan_step.tolist() == [[-1, -1, -1], [0, 0, 0]]


def test_what_follows_a_stop_token_may_be_nan():
    model, tokens = family("gpt2"), prompts(0, 3, 4)
    stop = int(generate(model, tokens, MASK, max_new_tokens=2).tokens[0, 1])
    broken = dataclasses.replace(model, pos_embed=model.pos_embed.at[5].set(jnp.nan))
    made = generate(broken, tokens, MASK, max_new_tokens=3, stop=stop)
    # the first text has ended when its logits become NaN, and the others, which go on, have not got there
    assert made.mask[:, 2].tolist() == [False, True, True]
    assert made.nan_step.tolist() == [-1, -1, -1]


def test_values_of_other_texts_need_texts_of_one_length():
    """At a step, texts of several lengths are at several positions; a baseline takes values at the same one."""
    model, tokens = family("llama"), prompts(6, 3, 4)
    for baseline, options in (("mean_per_position", {}), ("resample", {"key": jax.random.key(0)})):
        edited = mi.intervene(model, mi.ablate("mlp_out", baseline=baseline, layer=0, **options))
        for change in ({"mask": MASK}, {"stop": 3}):
            with pytest.raises(mi.SiteError, match=r"other texts at the same position.*prompts of one length"):
                generate(edited, tokens, max_new_tokens=2, **change)
        made = generate(mi.capture(edited, "logits"), tokens, max_new_tokens=N_NEW)
        whole = mi.jit(edited)(jnp.concatenate([tokens, made.tokens], 1))
        close(made.acts["logits"], whole[:, 3:-1], baseline)


def test_half_precision_keeps_its_cache_in_half_precision():
    config = dataclasses.replace(FAMILIES["llama"], name="half")
    model = jax.tree.map(lambda x: x.astype(jnp.bfloat16), dataclasses.replace(family("llama"), config=config))
    made = generate(mi.capture(model, "attn.k"), prompts(0, 3, 4), max_new_tokens=2)
    assert made.acts["attn.k"].dtype == jnp.bfloat16
