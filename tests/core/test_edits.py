"""Edits against their closed forms, at every kind of index, alone and composed."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mi_jax as mi
from tests.models.tiny import prompts, tiny

TOLERANCE = 1e-5
TOKENS = prompts(3)


def edited(*edits, site="attn.z", model="llama", tokens=TOKENS, mask=None):
    """The site's values after the edits, of which only those at the last site in each layer are independent."""
    _, acts = mi.jit(mi.capture(mi.intervene(tiny(model), *edits), site))(tokens, mask)
    return np.asarray(acts[site])


@pytest.fixture(scope="module")
def plain():
    _, acts = mi.jit(mi.capture(tiny(), *tiny().site_table.names))(TOKENS)
    return {name: np.asarray(x) for name, x in acts.items()}


# in the last layer nothing that follows feeds back, so the other places of the site keep their values
LAST = 2
INDICES = [
    ({}, np.s_[:, :, :, :]),
    ({"pos": 1}, np.s_[:, 1]),
    ({"pos": -2}, np.s_[:, 3]),
    ({"pos": (0, -1)}, np.s_[:, [0, 4]]),
    ({"pos": mi.per_example(jnp.array([1, -1]))}, (np.array([0, 1]), np.array([1, 4]))),
    ({"head": 2}, np.s_[:, :, 2]),
    ({"head": (-1, 0)}, np.s_[:, :, [0, 3]]),
    ({"unit": 5}, np.s_[..., 5]),
    ({"unit": [0, -1]}, np.s_[..., [0, 5]]),
    ({"pos": 3, "head": jnp.int32(1), "unit": np.int64(4)}, np.s_[:, 3, 1, 4]),
    ({"pos": mi.per_example(np.array([0, 2])), "head": -1}, (np.array([0, 1]), np.array([0, 2]), -1)),
]


@pytest.mark.parametrize(("index", "where"), INDICES, ids=lambda v: str(v) if isinstance(v, dict) else "")
def test_add_changes_the_indexed_places_and_no_other(plain, index, where):
    expected = plain["attn.z"].copy()
    expected[LAST][where] += 2.5
    np.testing.assert_allclose(edited(mi.add("attn.z", 2.5, layer=LAST, **index)), expected, atol=TOLERANCE)


@pytest.mark.parametrize("layers", [0, (0, 2), jnp.array([1, 2]), None], ids=str)
def test_a_patch_lands_in_its_layers(plain, layers):
    value = edited(mi.patch("attn.z", -1.5, layer=layers))
    touched = [0, 1, 2] if layers is None else np.atleast_1d(layers).tolist()
    for layer in range(3):
        assert (value[layer] == -1.5).all() == (layer in touched)
    if 0 not in touched:
        np.testing.assert_allclose(value[0], plain["attn.z"][0], atol=TOLERANCE)


def test_closed_forms(plain):
    z = plain["attn.z"][LAST]
    array = np.random.default_rng(0).normal(size=z.shape[1:]).astype(np.float32)
    roll = np.roll(np.eye(z.shape[-1], dtype=np.float32), 1, 0)
    cases = {
        "patch": (mi.patch("attn.z", array, layer=LAST), np.broadcast_to(array, z.shape)),
        "patch broadcasts": (mi.patch("attn.z", array[0, 0], layer=LAST), np.broadcast_to(array[0, 0], z.shape)),
        "add": (mi.add("attn.z", array, layer=LAST), z + array),
        "scale": (mi.scale("attn.z", -0.5, layer=LAST), z * -0.5),
        "scale by head": (mi.scale("attn.z", np.arange(4.0, dtype=np.float32)[:, None], layer=LAST), None),
        "zero": (mi.ablate("attn.z", layer=LAST), np.zeros_like(z)),
        "mean": (mi.ablate("attn.z", baseline="mean", layer=LAST), np.broadcast_to(z.mean((0, 1)), z.shape)),
        "array": (mi.ablate("attn.z", baseline=array, layer=LAST), np.broadcast_to(array, z.shape)),
        "transform": (mi.transform("attn.z", lambda x: x @ roll, layer=LAST), z @ roll),
    }
    for name, (edit, expected) in cases.items():
        expected = z * np.arange(4.0)[:, None] if expected is None else expected
        np.testing.assert_allclose(edited(edit)[LAST], expected, atol=TOLERANCE, err_msg=name)


def test_resample_gives_every_example_anothers_value():
    tokens = prompts(9, 4)
    plain = np.asarray(mi.jit(mi.capture(tiny(), "attn.z"))(tokens)[1]["attn.z"])
    sources = set()
    for seed in range(5):
        edit = mi.ablate("attn.z", baseline="resample", layer=(0, LAST), pos=1, key=jax.random.key(seed))
        value = edited(edit, tokens=tokens)
        distance = np.abs(value[0][:, None, 1] - plain[0][None, :, 1]).max((2, 3))
        source = distance.argmin(1)
        assert distance.min(1).max() < TOLERANCE
        assert sorted(source) == [0, 1, 2, 3]
        assert (source != np.arange(4)).all()
        sources.add(tuple(source))
        np.testing.assert_allclose(value[0][:, 0], plain[0][:, 0], atol=TOLERANCE)
    assert len(sources) > 1
    with pytest.raises(mi.SiteError, match="'resample' takes another example, the batch has 1"):
        mi.intervene(tiny(), edit)(tokens[:1])


def test_the_mean_is_that_of_real_tokens():
    mask = jnp.arange(5)[None, :] < jnp.array([5, 2])[:, None]
    plain = np.asarray(mi.jit(mi.capture(tiny(), "mlp_out"))(TOKENS, mask)[1]["mlp_out"])[LAST]
    value = edited(mi.ablate("mlp_out", baseline="mean", layer=LAST), site="mlp_out", mask=mask)[LAST]
    np.testing.assert_allclose(value, np.broadcast_to(plain[np.asarray(mask)].mean(0), value.shape), atol=TOLERANCE)


def test_the_mean_of_patterns_is_over_examples(plain):
    value = edited(mi.ablate("attn.pattern", baseline="mean", layer=LAST), site="attn.pattern")[LAST]
    expected = plain["attn.pattern"][LAST].mean(0, keepdims=True)
    np.testing.assert_allclose(value, np.broadcast_to(expected, value.shape), atol=TOLERANCE)


@pytest.mark.parametrize(
    ("site", "index", "where"),
    [
        ("attn.scores", {"pos": 2, "head": 1}, np.s_[:, 1, 2]),
        ("attn.k", {"head": -1, "unit": 0}, np.s_[:, :, 1, 0]),
        ("attn.head_out", {"head": 3, "pos": 0}, np.s_[:, 0, 3]),
        ("mlp.pre", {"unit": 9}, np.s_[..., 9]),
        ("attn.v_in", {"head": 0}, np.s_[:, :, 0]),
        ("resid_mid", {"pos": -1, "unit": 7}, np.s_[:, 4, 7]),
    ],
)
def test_indices_mean_the_sites_own_axes(plain, site, index, where):
    expected = plain[site].copy()
    expected[LAST][where] = 0.25
    np.testing.assert_allclose(edited(mi.patch(site, 0.25, layer=LAST, **index), site=site), expected, atol=TOLERANCE)


@pytest.mark.parametrize("site", ["embed", "final_norm", "logits"])
def test_sites_outside_the_layers_are_edited(plain, site):
    expected = plain[site].copy()
    expected[:, 1] *= 2
    np.testing.assert_allclose(edited(mi.scale(site, 2.0, pos=1), site=site), expected, atol=TOLERANCE)


def test_edits_compose_in_order(plain):
    z = plain["attn.z"][LAST]
    add, scale = mi.add("attn.z", 1.0, layer=LAST), mi.scale("attn.z", 3.0, layer=LAST)
    np.testing.assert_allclose(edited(add, scale)[LAST], (z + 1) * 3, atol=TOLERANCE)
    np.testing.assert_allclose(edited(scale, add)[LAST], z * 3 + 1, atol=TOLERANCE)
    zero = mi.ablate("attn.z", layer=LAST, head=0)
    expected = (z + 1) * 3
    expected[:, :, 0] = 0
    np.testing.assert_allclose(edited(add, scale, zero)[LAST], expected, atol=TOLERANCE)


def test_captured_activations_are_patched_place_by_place(plain):
    _, other = mi.jit(mi.capture(tiny(), "attn.z"))(prompts(4))
    expected = plain["attn.z"].copy()
    expected[LAST, :, 1, 2] = np.asarray(other["attn.z"])[LAST, :, 1, 2]
    value = edited(mi.patch("attn.z", other, layer=LAST, pos=1, head=2))
    np.testing.assert_allclose(value, expected, atol=TOLERANCE)
    by_array = edited(mi.patch("attn.z", other["attn.z"][LAST], layer=LAST, pos=1, head=2))
    np.testing.assert_array_equal(by_array, value)


def test_the_other_runs_stream_gives_the_other_run():
    logits, other = mi.jit(mi.capture(tiny(), "resid_pre", "resid_mid", "final_norm"))(prompts(4))
    for edit in (
        mi.patch("resid_pre", other, layer=0),
        mi.patch("resid_mid", other["resid_mid"], layer=LAST),
        mi.patch("final_norm", other),
    ):
        np.testing.assert_allclose(mi.jit(mi.intervene(tiny(), edit))(TOKENS), logits, atol=TOLERANCE)


def _logits(edit):
    return mi.intervene(tiny(), edit)(TOKENS)


def test_vmap_over_edits_equals_a_loop():
    values = jnp.array([0.5, -1.0, 2.0])

    def edit(layer, pos, head, value):
        return mi.add("attn.z", value, layer=layer, pos=pos, head=head)

    places = (jnp.array([0, 1, 2]), jnp.array([4, -2, 0]), jnp.array([3, 0, -1]), values)
    mapped = jax.jit(jax.vmap(lambda *place: _logits(edit(*place))))(*places)
    # the same edits as one pytree with a leading axis
    together = mi.pairs(layer=places[0], pos=places[1], head=places[2])
    stacked = eqx.filter_jit(eqx.filter_vmap(_logits))(mi.add("attn.z", values, **together))
    for i in range(3):
        one = mi.jit(mi.intervene(tiny(), edit(*(int(p[i]) for p in places[:3]), float(values[i]))))(TOKENS)
        np.testing.assert_allclose(mapped[i], one, atol=TOLERANCE)
        np.testing.assert_allclose(stacked[i], one, atol=TOLERANCE)


def test_gradients_with_respect_to_an_added_value():
    direction = jax.random.normal(jax.random.key(0), (8,))

    @jax.jit
    def metric(value):
        return _logits(mi.add("resid_mid", value, layer=1, pos=2))[:, -1, 3].sum()

    at = 0.1 * jnp.ones(8)
    step = 1e-2
    finite = (metric(at + step * direction) - metric(at - step * direction)) / (2 * step)
    _, forward = jax.jvp(metric, (at,), (direction,))
    assert abs(float(finite)) > 1e-2
    np.testing.assert_allclose(jax.grad(metric)(at) @ direction, finite, rtol=2e-3)
    np.testing.assert_allclose(forward, finite, rtol=2e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mi.ablate("attn.z", layer=3), r"site 'attn.z' of llama-like has 3 layers \(0–2\); got layer=3"),
        (lambda: mi.ablate("attn.z", layer=-1), "got layer=-1"),
        (lambda: mi.ablate("attn.z", head=4), r"has 4 heads \(0–3\); got head=4"),
        (lambda: mi.ablate("attn.k", head=(0, 2)), r"has 2 kv_heads \(0–1\); got kv_head=2"),
        (lambda: mi.ablate("mlp.pre", unit=-11), r"has 10 d_mlps \(0–9\); got d_mlp=-11"),
        (
            lambda: mi.ablate("resid_pre", head=0),
            "site 'resid_pre' has axes layer batch pos d_model; it takes no index 'head'",
        ),
        (lambda: mi.ablate("embed", layer=0), "it takes no index 'layer'"),
        (lambda: mi.ablate("attn.scores", unit=0), "it takes no index 'unit'"),
        (lambda: mi.ablate("attn.z", pos=()), "an empty set for 'pos' touches nothing"),
        (lambda: mi.ablate("attn.z", layer=1.5), "'layer' takes ints"),
        (lambda: mi.ablate("attn.z", head="all"), "'head' takes ints"),
        (lambda: mi.patch("attn.z", np.zeros((2, 2, 5, 4, 6), np.float32)), "has 2 layers, llama-like has 3"),
        (lambda: mi.patch("attn.z", {"attn_out": np.zeros(3)}), "the captured activations hold attn_out, not 'attn.z'"),
    ],
)
def test_an_edit_that_does_not_fit_the_model_is_named(make, message):
    with pytest.raises(mi.SiteError, match=message):
        mi.intervene(tiny(), make())
    if "captured" not in message and "takes ints" not in message and "empty" not in message:
        # and no less where the edit is made inside a jitted function
        with pytest.raises(mi.SiteError, match=message):
            jax.jit(lambda tokens: mi.intervene(tiny(), make())(tokens))(TOKENS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mi.ablate("attn.z", pos=5), r"site 'attn.z' has 5 places on 'pos' \(0–4\); got pos=5"),
        (lambda: mi.ablate("attn.scores", pos=-6), "got pos=-6"),
        (lambda: mi.ablate("attn.z", pos=mi.per_example(np.array([0, 1, 2]))), "3 positions for a batch of 2"),
        (
            lambda: mi.patch("attn.z", np.zeros((4, 5), np.float32)),
            r"has shape \(4, 5\), which does not broadcast against",
        ),
        (lambda: mi.transform("attn.z", lambda x: x[:, 1:]), r"gave shape \(2, 4, 4, 6\) instead of \(2, 5, 4, 6\)"),
        (lambda: mi.ablate("attn.z", pos=mi.each), "mi.each on 'pos' marks an axis of a sweep; use mi.sweep"),
        (lambda: mi.ablate("attn.z", layer=mi.each), "mi.each on 'layer' marks an axis of a sweep; use mi.sweep"),
    ],
)
def test_an_edit_that_does_not_fit_the_input_is_named(make, message):
    intervened = mi.intervene(tiny(), make())
    for call in (intervened, mi.jit(intervened)):
        with pytest.raises(mi.SiteError, match=message):
            call(TOKENS)


def test_ablate_needs_a_known_baseline_and_a_key():
    with pytest.raises(
        ValueError, match="baseline must be 'zero', 'mean', 'mean_per_position', 'resample' or an array, got"
    ):
        mi.ablate("attn.z", baseline="median")
    with pytest.raises(ValueError, match="draws a permutation of the batch: pass key="):
        mi.ablate("attn.z", baseline="resample")
