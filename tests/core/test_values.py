"""A value goes to the axes that it was meant for, or is refused: never to others whose sizes happen to fit."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mi_jax as mi
from mi_jax.core.index import Index, selection
from mi_jax.core.sites import Site
from mi_jax.core.values import Place, Reading, by_name, value_at
from mi_jax.models import init_decoder
from tests.models.tiny import CONFIGS, prompts, tiny

Z = Site("attn.z", ("layer", "batch", "pos", "head", "d_head"))
STREAM = Site("resid_pre", ("layer", "batch", "pos", "d_model"))


def expanded(array, axes, site):
    """The oracle: an array of named axes in the shape of one layer, the first where the layers differ."""
    full = np.asarray(array)[tuple(slice(None) if axis in axes else None for axis in site.axes)]
    return full[0]


@pytest.mark.parametrize("site", [STREAM, Z], ids=lambda site: site.name)
@pytest.mark.parametrize("sizes", [(2, 3, 4, 5, 6), (3, 3, 3, 3, 3), (2, 3, 3, 2, 4), (4, 2, 1, 4, 3), (1, 2, 3, 1, 2)])
def test_every_set_of_axes_at_sizes_that_agree_and_that_do_not(site, sizes):
    size = dict(zip(Z.axes, sizes, strict=True)) | {"d_model": sizes[-1]}
    x = jnp.zeros([size[axis] for axis in site.slice_axes])
    for n in range(1, len(site.axes)):
        for lead in itertools.combinations(site.axes[:-1], n - 1):
            axes = (*lead, site.axes[-1])
            array = np.random.default_rng(0).normal(size=[size[axis] for axis in axes]).astype(np.float32)
            expected = np.broadcast_to(expanded(array, axes, site), x.shape)
            whole = by_name(jnp.asarray(array), axes, site)
            found = value_at(whole[0] if "layer" in axes else whole, x, Place(site), Reading(axes=axes))
            np.testing.assert_array_equal(found, expected, err_msg=str(axes))
            if n == len(site.axes):
                continue
            try:
                found = value_at(array, x, Place(site), Reading(n_layers=size["layer"]))
            except mi.SiteError:
                continue
            # read without names: then no other axes fit, so these are the ones that were meant
            np.testing.assert_array_equal(found, expected, err_msg=str(axes))


def test_names_may_come_in_any_order_and_must_be_axes():
    array = jnp.arange(6.0).reshape(3, 2)
    np.testing.assert_array_equal(by_name(array, ("d_model", "batch"), STREAM), array.T[:, None, :])
    with pytest.raises(mi.SiteError, match="has axes layer batch pos d_model; the value names 'head'"):
        mi.intervene(tiny(), mi.patch("resid_pre", mi.named(array, "head d_model")))
    for axes in ("batch", "batch batch", "batch pos d_model"):
        with pytest.raises(mi.SiteError, match="2 axes to name, each once"):
            mi.named(array, axes)


@pytest.fixture(scope="module")
def model():
    """As many layers as positions of the prompts below, and as prompts."""
    return init_decoder(dataclasses.replace(CONFIGS["llama"], n_layers=2), key=jax.random.key(0))


TOKENS = prompts(1, 2, 2)


def stream(model, *edits, tokens=TOKENS):
    return np.asarray(mi.jit(mi.capture(mi.intervene(model, *edits), "resid_pre"))(tokens)[1]["resid_pre"])


def test_a_value_an_example_and_a_baseline_a_layer(model):
    value = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8)), jnp.float32)
    for edit in (mi.patch("resid_pre", value, pos=1), mi.ablate("resid_pre", baseline=value)):
        with pytest.raises(mi.SiteError, match=r"can be \[.*batch d_model\].*: say which with mi.named"):
            mi.intervene(model, edit)(TOKENS)
    by_example = stream(model, mi.patch("resid_pre", mi.named(value, "batch d_model"), pos=1))
    np.testing.assert_array_equal(by_example[:, :, 1], np.broadcast_to(value, (2, 2, 8)))
    by_layer = stream(model, mi.ablate("resid_pre", baseline=mi.named(value, "layer d_model")))
    np.testing.assert_array_equal(by_layer, np.broadcast_to(np.asarray(value)[:, None, None], (2, 2, 2, 8)))
    # in one layer no axis is that of the layers, and a vector is always one of the last axis
    whole = jnp.broadcast_to(value[:, None], (2, 2, 8))
    np.testing.assert_array_equal(stream(model, mi.patch("resid_pre", whole, layer=1))[1], whole)
    np.testing.assert_array_equal(stream(model, mi.patch("resid_pre", value[0]))[1, 1, 1], value[0])


@pytest.mark.parametrize("layers", [(1, 0), (0, 0)])
def test_a_capture_that_looks_like_all_layers_is_all_layers(model, layers):
    with pytest.raises(mi.SiteError, match="would look like all 2 layers in order"):
        mi.capture(model, mi.at("resid_pre", layers=layers))


def test_positions_are_a_set_or_one_an_example():
    x = jnp.zeros((3, 4, 5))
    one_each = selection(Index.of(pos=mi.per_example(np.array([1, 2, 3]))), x, STREAM)
    np.testing.assert_array_equal(one_each[:, :, 0], np.eye(4, dtype=bool)[1:])
    assert selection(Index.of(pos=(1, 2, 3)), x, STREAM)[0, :, 0].tolist() == [False, True, True, True]
    for places in (np.array([1, 2, 3]), jnp.array([1])):
        with pytest.raises(mi.SiteError, match=r"pass pos=mi.per_example\(…\) for the first, a tuple for the second"):
            mi.patch("resid_pre", 0.0, pos=places)
    with pytest.raises(mi.SiteError, match="gives pos one place for every example"):
        mi.patch("resid_pre", 0.0, layer=mi.per_example([0, 1]))


@pytest.mark.parametrize("names", [("layer", "head"), ("pos", "head"), ("layer", "pos", "head")])
def test_sets_of_one_size_are_pairs_or_a_product(names):
    x, (first, second) = jnp.zeros((2, 3, 4, 5)), (0, 2)
    with pytest.raises(
        mi.SiteError, match=r"pass \*\*mi.pairs\(.*\) for the first, \*\*mi.product\(.*\) for the second"
    ):
        mi.scale("attn.z", 0.0, **dict.fromkeys(names, (first, second)))
    index = {"layer": 1} | dict.fromkeys(names, (first, second))

    def where(made):
        return np.stack(
            [np.broadcast_to(selection(Index.of(**made), x, Z, jnp.asarray(layer)), x.shape) for layer in range(3)]
        )

    def single(places):
        return where(index | dict(zip(names, places, strict=True)))

    both = itertools.product((first, second), repeat=len(names))
    np.testing.assert_array_equal(
        where(index | mi.product(**dict.fromkeys(names, (first, second)))), sum(map(single, both))
    )
    paired = index | mi.pairs(**dict.fromkeys(names, (first, second)))
    np.testing.assert_array_equal(where(paired), single((first,) * len(names)) | single((second,) * len(names)))


def test_sets_of_different_sizes_are_a_product_and_pairs_need_one_size():
    assert mi.scale("attn.z", 0.0, layer=(0, 1), head=(0, 1, 2)).index.paired == ()
    for made in ({"layer": (0, 1), "head": (1,)}, {"layer": (0, 1)}, {"layer": 0, "head": 1}):
        with pytest.raises(mi.SiteError, match="pairs takes two or more flat sets of the same size"):
            mi.pairs(**made)


def test_pairs_are_the_edits_one_by_one():
    model = tiny()
    together = mi.jit(mi.intervene(model, mi.ablate("attn.z", **mi.pairs(layer=(0, 2), head=(1, 3)))))(TOKENS)
    alone = (mi.ablate("attn.z", layer=layer, head=head) for layer, head in ((0, 1), (2, 3)))
    np.testing.assert_allclose(together, mi.jit(mi.intervene(model, *alone))(TOKENS), atol=1e-5)


@pytest.mark.parametrize("n_pos", [1, 2])
def test_a_value_of_a_prompt_is_not_one_of_generated_tokens(model, n_pos):
    tokens, value = prompts(2, 2, n_pos), jnp.full((2, n_pos, 8), 3.0)
    for made in (value, value[0], mi.named(value, "batch pos d_model")):
        with pytest.raises(mi.SiteError, match=f"of the {n_pos} positions of the prompt and not of generated tokens"):
            mi.generate(mi.intervene(model, mi.patch("resid_pre", made, layer=1)), tokens, max_new_tokens=2)


def test_a_named_value_is_made_at_every_token(model):
    tokens, value = prompts(2, 3, 1), jnp.arange(24.0).reshape(3, 8)
    everywhere = mi.intervene(model, mi.patch("resid_pre", mi.named(value, "batch d_model"), layer=1))
    acts = mi.generate(mi.capture(everywhere, mi.at("resid_pre", layers=1)), tokens, max_new_tokens=3).acts
    np.testing.assert_array_equal(acts["resid_pre"], np.broadcast_to(value[:, None], (3, 3, 8)))
    once = mi.patch("resid_pre", value[:, None], layer=1, pos=0)
    acts = mi.generate(
        mi.capture(mi.intervene(model, once), mi.at("resid_pre", layers=1)), tokens, max_new_tokens=3
    ).acts
    np.testing.assert_array_equal(acts["resid_pre"][:, 0], value)
    assert np.abs(acts["resid_pre"][:, 1] - value).min() > 0.01
