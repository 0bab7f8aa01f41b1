"""Every verb of the core in bfloat16 and float16, beside formulas in float64 and the same weights in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mi_jax as mi
from mi_jax.core.attribution import METHODS
from mi_jax.core.precision import rounding, tolerance
from mi_jax.models import Decoder
from tests.models.tiny import prompts, tiny

HALF = (jnp.bfloat16, jnp.float16)
TOKENS, OTHER = prompts(3), prompts(4)
MASK = jnp.arange(5)[None, :] < jnp.array([5, 3])[:, None]
LAST, KEY = 2, jax.random.key(0)
RNG = np.random.default_rng(0)
BASIS = np.float32(RNG.normal(size=(8, 3)))
VECTOR = np.float32(RNG.normal(size=8))


def cast(model: Decoder, dtype) -> Decoder:
    return jax.tree.map(lambda x: x.astype(dtype), model)


def test_the_rule():
    assert (tolerance(jnp.float32), tolerance(jnp.float64)) == (1e-5, 1e-5)
    assert (tolerance(jnp.bfloat16), tolerance(jnp.float16)) == (8 * 2**-7, 8 * 2**-10)


def span(basis):
    return basis @ np.linalg.pinv(basis)


def mean(x, mask, axes):
    weight = np.broadcast_to(np.asarray(mask)[..., None], x.shape)
    return np.broadcast_to((x * weight).sum(axes, keepdims=True) / weight.sum(axes, keepdims=True), x.shape)


# an edit from a basis and a vector in the dtype, and its formula: from the value, the basis and the vector, in float64
EDITS = {
    "patch": (lambda b, v: mi.patch("resid_pre", v, layer=LAST), lambda x, b, v: np.broadcast_to(v, x.shape)),
    "add": (lambda b, v: mi.add("resid_pre", v, layer=LAST), lambda x, b, v: x + v),
    "scale": (lambda b, v: mi.scale("resid_pre", v, layer=LAST), lambda x, b, v: x * v),
    "add in float32": (lambda b, v: mi.add("resid_pre", 1.003, layer=LAST), lambda x, b, v: x + np.float32(1.003)),
    "scale in float32": (lambda b, v: mi.scale("resid_pre", 1.003, layer=LAST), lambda x, b, v: x * np.float32(1.003)),
    "zero": (lambda b, v: mi.ablate("resid_pre", layer=LAST), lambda x, b, v: 0 * x),
    "mean": (lambda b, v: mi.ablate("resid_pre", baseline="mean", layer=LAST), lambda x, b, v: mean(x, MASK, (0, 1))),
    "mean per position": (
        lambda b, v: mi.ablate("resid_pre", baseline="mean_per_position", layer=LAST),
        lambda x, b, v: mean(x, MASK, (0,)),
    ),
    "resample": (
        lambda b, v: mi.ablate("resid_pre", baseline="resample", key=KEY, layer=LAST),
        lambda x, b, v: np.where(np.asarray(MASK)[::-1, :, None], x[::-1], x),
    ),
    "project out": (lambda b, v: mi.project_out("resid_pre", b, layer=LAST), lambda x, b, v: x - x @ span(b)),
    "swap subspace": (
        lambda b, v: mi.swap_subspace("resid_pre", b, v, layer=LAST),
        lambda x, b, v: x + (v - x) @ span(b),
    ),
    "transform": (lambda b, v: mi.transform("resid_pre", lambda x: -x, layer=LAST), lambda x, b, v: -x),
}


@functools.cache
def edited(dtype):
    """The last layer's stream without an edit, and with each; in one program."""
    basis, vector = jnp.asarray(BASIS, dtype), jnp.asarray(VECTOR, dtype)

    @jax.jit
    def run(model):
        edits = [(), *((make(basis, vector),) for make, _ in EDITS.values())]
        models = [mi.intervene(model, *edit) if edit else model for edit in edits]
        return [
            mi.capture(one, mi.at("resid_pre", layers=LAST))(TOKENS, MASK, output=False)[1]["resid_pre"]
            for one in models
        ]

    plain, *found = (np.asarray(x, np.float64) for x in run(cast(tiny(), dtype)))
    return plain, dict(zip(EDITS, found, strict=True)), np.asarray(basis, np.float64), np.asarray(vector, np.float64)


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("dtype", HALF, ids=lambda dtype: dtype.__name__)
def test_an_edit_is_rounded_once(name, dtype):
    plain, found, basis, vector = edited(dtype)
    expected = EDITS[name][1](plain, basis, vector)
    # half a unit in the last place, and what float32 leaves of sums of the size of the value
    room = 0.51 * rounding(dtype) * np.abs(expected) + 4e-6 * np.abs(plain).max()
    real = np.asarray(MASK)
    assert (np.abs(found[name] - expected) <= room)[real].all()


def test_noise_is_the_draw_of_float32():
    def drawn(dtype):
        edit = mi.noise("embed", 0.5, key=KEY)
        one, other = (
            mi.capture(m, "embed")(TOKENS, output=False)[1]["embed"]
            for m in (cast(tiny(), dtype), mi.intervene(cast(tiny(), dtype), edit))
        )
        return np.asarray(other, np.float64) - np.asarray(one, np.float64)

    for dtype in HALF:
        np.testing.assert_allclose(drawn(dtype), drawn(jnp.float32), atol=8 * rounding(dtype))


def test_a_mean_of_large_values_does_not_overflow():
    model, tokens = cast(tiny(), jnp.float16), prompts(0, 8, 12)
    large = mi.patch("mlp_out", 3e4, layer=LAST)
    for baseline in ("mean", "mean_per_position"):
        run = mi.intervene(model, large, mi.ablate("mlp_out", baseline=baseline, layer=LAST))
        acts = mi.capture(run, mi.at("mlp_out", layers=LAST))(tokens, output=False)[1]
        np.testing.assert_allclose(np.asarray(acts["mlp_out"], np.float32), 3e4, rtol=1e-3)


@pytest.mark.parametrize("dtype", HALF, ids=lambda dtype: dtype.__name__)
def test_a_basis_in_half_precision_spans_what_it_spans(dtype):
    rng = np.random.default_rng(1)
    two = np.float32(rng.normal(size=(8, 2)) * [1e-3, 10.0])
    for basis, expected in ((two, two), (np.c_[two, 1.3 * two[:, :1] - 0.7 * two[:, 1:]], two)):
        made = np.asarray(mi.project_out("resid_pre", jnp.asarray(basis, dtype)).operand, np.float64)
        np.testing.assert_allclose(made @ made.T, span(np.float64(expected)), atol=4 * rounding(dtype))
    traced = jax.jit(lambda basis: mi.project_out("resid_pre", basis).operand)
    assert np.isfinite(traced(jnp.asarray(two, dtype))).all()
    assert np.isnan(traced(jnp.ones((8, 2), dtype))).all()


def metric(logits):
    return logits[:, -1, 3].astype(jnp.float32) - logits[:, -1, 5].astype(jnp.float32)


SITES = ("attn.q", "attn.k", "attn.z", "mlp_out")


@functools.cache
def scores(method, dtype):
    """Of a model with the weights of the half-precision one, also where it computes in float32."""
    model = cast(cast(tiny(), dtype), jnp.float32 if method.endswith("32") else dtype)
    attribution = mi.attribute(model, metric, SITES, method=method.removesuffix(" 32"), steps=2)
    return mi.jit(attribution)(TOKENS, OTHER)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", HALF, ids=lambda dtype: dtype.__name__)
def test_scores_are_those_of_float32(method, dtype):
    half, full = scores(method, dtype), scores(f"{method} 32", dtype)
    size = max(float(jnp.abs(full[site]).max()) for site in SITES)
    for site in SITES:
        assert half[site].dtype == jnp.float32
        # a forward and a backward pass, each of which may differ by the tolerance
        np.testing.assert_allclose(half[site], full[site], atol=2 * tolerance(dtype) * size, err_msg=site)
        assert np.corrcoef(np.ravel(half[site]), np.ravel(full[site]))[0, 1] > 0.99


def test_small_gradients_of_many_prompts_do_not_vanish():
    clean, corrupt = prompts(5, 256), prompts(6, 256)

    def small(logits):
        return 1e-3 * metric(logits)

    found = {}
    for dtype in (jnp.float16, jnp.float32):
        model = cast(cast(tiny(), jnp.float16), dtype)
        found[dtype] = np.asarray(mi.jit(mi.attribute(model, small, "attn.z"))(clean, corrupt)["attn.z"])
    size = np.abs(found[jnp.float32]).max()
    np.testing.assert_allclose(found[jnp.float16], found[jnp.float32], atol=2 * tolerance(jnp.float16) * size)


@pytest.mark.parametrize("dtype", HALF, ids=lambda dtype: dtype.__name__)
def test_effects_forward_and_along_paths(dtype):
    def measured(model):
        value = mi.capture(model, "attn.z")(OTHER)[1]
        edit = mi.patch("attn.z", value, layer=0, head=1)
        _, moved = mi.forward_effects(model, edit, "attn.q")(TOKENS)
        path = mi.path_patch(model, mi.node("attn.z", layer=0, head=1), mi.node("attn.q", layer=LAST, head=0), metric)
        swept = mi.sweep(model, mi.patch("attn.z", value, layer=mi.each), metric)(TOKENS)
        return moved["attn.q"], path(OTHER, TOKENS)["attn.z"], swept

    low = cast(tiny(), dtype)
    run = jax.jit(measured)
    for half, full in zip(run(low), run(cast(low, jnp.float32)), strict=True):
        full = np.asarray(full)
        size = max(1.0, np.abs(full).max())
        np.testing.assert_allclose(np.asarray(half, np.float32), full, atol=tolerance(dtype) * size)


@pytest.mark.parametrize("dtype", HALF, ids=lambda dtype: dtype.__name__)
def test_the_sites_of_a_model_in_half_precision_hold(dtype):
    assert mi.check_sites(cast(tiny(), dtype), TOKENS, MASK)
