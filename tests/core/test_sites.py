"""Names, aliases and what can be asked of a site."""

import numpy as np
import pytest

import mi_jax as mi
from tests.models.tiny import prompts, tiny

TOLERANCE = 1e-6
TABLE = tiny().site_table


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("blocks.1.hook_resid_pre", "resid_pre"),
        ("blocks.1.hook_resid_post", "resid_post"),
        ("blocks.1.attn.hook_z", "attn.z"),
        ("blocks.1.attn.hook_rot_q", "attn.q"),
        ("blocks.1.attn.hook_result", "attn.head_out"),
        ("blocks.1.mlp.hook_post", "mlp.post"),
        ("blocks.1.hook_q_input", "attn.q_in"),
    ],
)
def test_transformer_lens_names_are_that_layer_of_the_site(alias, name):
    capture = mi.jit(mi.capture(tiny(), alias))
    _, acts = capture(prompts(3))
    _, expected = mi.jit(mi.capture(tiny(), mi.at(name, layers=1)))(prompts(3))
    assert list(acts) == [name]
    np.testing.assert_array_equal(acts[name], expected[name])


def test_an_alias_places_an_edit():
    by_alias = mi.intervene(tiny(), mi.ablate("blocks.1.attn.hook_z", head=0))
    by_index = mi.intervene(tiny(), mi.ablate("attn.z", layer=1, head=0))
    np.testing.assert_array_equal(mi.jit(by_alias)(prompts(3)), mi.jit(by_index)(prompts(3)))
    with pytest.raises(mi.SiteError, match=r"'blocks.1.attn.hook_z' names its layer; leave layer=… out"):
        mi.intervene(tiny(), mi.ablate("blocks.1.attn.hook_z", layer=2))


def test_names_that_mean_another_tensor_elsewhere_are_not_taken():
    # there q is before the rotation, and the embedding is without the learned positions
    for table, name in ((TABLE, "blocks.0.attn.hook_q"), (tiny("gpt2").site_table, "hook_embed")):
        with pytest.raises(mi.SiteError, match=f"has no site '{name}'"):
            table.resolve(name)
    assert TABLE.resolve("hook_embed")[0].name == "embed"


def test_an_unknown_site_is_named_with_those_that_exist():
    with pytest.raises(mi.SiteError, match=r"llama-like has no site 'resid'; it has embed, resid_pre, .*, logits"):
        mi.capture(tiny(), "resid")
    with pytest.raises(mi.SiteError, match="toy has no site 'mlp_out'"):
        mi.intervene(tiny("attention-only"), mi.ablate("mlp_out"))
    with pytest.raises(mi.SiteError, match=r"has no site 'blocks.0.hook_nothing'"):
        mi.capture(tiny(), "blocks.0.hook_nothing")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (mi.at("resid_post", layers=3), r"site 'resid_post' of llama-like has 3 layers \(0–2\); got layer=3"),
        (mi.at("resid_post", layers=(0, -1)), "got layer=-1"),
        (mi.at("resid_post", layers=()), "is asked for at no layer"),
        (mi.at("embed", layers=0), "site 'embed' of llama-like exists once, not per layer"),
        ("blocks.7.hook_resid_pre", "has 3 layers"),
    ],
)
def test_a_layer_that_is_not_there_is_named(spec, message):
    with pytest.raises(mi.SiteError, match=message):
        mi.capture(tiny(), spec)


def test_the_same_site_is_asked_for_once():
    assert TABLE.normalise(("embed", "embed", mi.at("attn.z", 1), mi.at("attn.z", layers=1))) == (
        mi.at("embed"),
        mi.at("attn.z", layers=1),
    )
    assert TABLE.normalise("embed") == (mi.at("embed"),)
    with pytest.raises(mi.SiteError, match=r"'attn.z' is asked for twice with different layers"):
        mi.capture(tiny(), "attn.z", mi.at("attn.z", layers=1))


def test_layers_are_any_kind_of_int_or_sequence():
    assert mi.at("attn.z", np.int32(2)) == mi.at("attn.z", 2)
    for layers in ([0, 1], range(2), np.arange(2)):
        assert mi.at("attn.z", layers) == mi.at("attn.z", (0, 1))


# as many layers as the model has, in another order, would be taken for all of them and are refused
@pytest.mark.parametrize("layers", [1, (0, 2), (1, 1), (2, 0), (1, 1, 0, 2)], ids=str)
def test_layers_are_returned_as_they_were_asked_for(layers):
    _, some = mi.jit(mi.capture(tiny(), mi.at("attn.z", layers=layers)))(prompts(3))
    _, every = mi.jit(mi.capture(tiny(), "attn.z"))(prompts(3))
    chosen = layers if isinstance(layers, int) else list(layers)
    np.testing.assert_allclose(some["attn.z"], np.asarray(every["attn.z"])[chosen], atol=TOLERANCE)
