"""Whatever is swept: a resumed sweep equals whole runs of the same cells, and single interventions."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mi_jax as mi
from mi_jax.core.index import index_axis
from mi_jax.models.decoder import site_table
from tests.core.whole_runs import WithoutResume
from tests.models.tiny import CONFIGS, prompts, tiny

TOLERANCE = 2e-5
CLEAN, CORRUPT = prompts(3), prompts(4)
MASK = jnp.array([[True, True, True, True, False], [True] * 5])


def _base_edits(model):
    """Edits that hold in every cell: of single positions, of the stream, of what a position sees, of the output."""
    return {
        "none": (),
        "pointwise": (mi.scale("attn_out", 0.5, layer=0), mi.ablate("attn.z", layer=0, head=1, pos=2)),
        "mixing": (mi.ablate("attn_out", baseline="mean"), mi.scale("attn.scores", 0.7, head=0)),
        "stream": (mi.add("resid_pre", 0.7, pos=-2), mi.scale("resid_post", 1.3, layer=0)),
        "seeing ahead": (mi.ablate("attn.scores", head=0),),
        "head": (mi.scale("final_norm", 1.5, pos=3),),
    }


def _edit(kind: str, site: str, acts, index):
    key = jax.random.key(9)
    return {
        "patch": lambda: mi.patch(site, acts, **index),
        "scale": lambda: mi.scale(site, 1.7, **index),
        "mean": lambda: mi.ablate(site, baseline="mean", **index),
        "noise": lambda: mi.noise(site, 0.3, key=key, **index),
        "transform": lambda: mi.transform(site, lambda x: jnp.tanh(x) + x.mean(1, keepdims=True), **index),
        "resample": lambda: mi.ablate(site, baseline="resample", key=key, **index),
    }[kind]()


_INDICES = ("layer", "pos", "head", "unit")


def _places(config):
    """For every site the sizes of the axes that an index can name."""
    table = site_table(config)
    sizes = dict(table.sizes) | {"pos": 5, "query": 5}
    named = {site.name: {name: index_axis(site, name) for name in _INDICES} for site in table.sites}
    return {site: {name: sizes[axis] for name, axis in axes.items() if axis} for site, axes in named.items()}


# outside the strategy, because run-time type checks draw random numbers, which hypothesis forbids there
_PLACES = {name: _places(config) for name, config in CONFIGS.items()}


@st.composite
def sweeps(draw):
    name = draw(st.sampled_from(sorted(_PLACES)))
    site = draw(st.sampled_from(list(_PLACES[name])))
    places = _PLACES[name][site]
    index: dict[str, Any] = {}
    sizes = {}
    for axis, n in places.items():
        choices = ["each", "one", "all"] + (["some"] if axis in ("layer", "pos") else [])
        choice = draw(st.sampled_from(choices))
        if choice == "each":
            index[axis], sizes[axis] = mi.each, n
        elif choice == "one":
            index[axis] = draw(st.integers(0 if axis == "layer" else -n, n - 1))
        elif choice == "some":
            index[axis] = tuple(draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=2, unique=True)))
    if not sizes:
        axis = next(iter(places))
        index[axis], sizes[axis] = mi.each, places[axis]
    return {
        "model": name,
        "site": site,
        "index": index,
        "sizes": sizes,
        "kind": draw(st.sampled_from(["patch", "scale", "mean", "noise", "transform", "resample"])),
        "base": draw(st.sampled_from(["none", "pointwise", "stream", "mixing", "seeing ahead", "head"])),
        "batch_size": draw(st.sampled_from([1, 3, 16])),
        "masked": draw(st.booleans()),
        "output_pos": draw(st.booleans()),
    }


def _check(case):
    model = tiny(case["model"])
    if case["model"] == "multi-query" and case["base"] == "pointwise":
        case["base"] = "none"
    base = _base_edits(model)[case["base"]]
    model = mi.intervene(model, *base) if base else model
    acts = mi.jit(mi.capture(tiny(case["model"]), case["site"]))(CLEAN)[1]
    edit = _edit(case["kind"], case["site"], acts, case["index"])
    options: dict[str, Any] = {"mask": MASK} if case["masked"] else {}
    if case["output_pos"] and case["base"] != "head" and case["site"] not in ("final_norm", "logits"):
        options["output_pos"] = jnp.array([1, 4], jnp.int32)

    def metric(logits):
        return logits[..., :3]

    found = mi.jit(mi.sweep(model, edit, metric, batch_size=case["batch_size"]))(CORRUPT, **options)
    whole = mi.jit(mi.sweep(WithoutResume(model), edit, metric))(CORRUPT, **options)
    np.testing.assert_allclose(found, whole, atol=TOLERANCE, rtol=TOLERANCE)
    sizes = [case["sizes"][n] for n in _INDICES if n in case["sizes"]]
    assert found.shape[: len(sizes)] == tuple(sizes)
    place = tuple(n // 2 for n in sizes)
    names = [n for n in _INDICES if n in case["sizes"]]
    single = edit.placed(**{n: jnp.asarray(p, jnp.int32) for n, p in zip(names, place, strict=True)})
    one = mi.jit(mi.intervene(model, single))(CORRUPT, **options)
    np.testing.assert_allclose(found[place], metric(one), atol=TOLERANCE, rtol=TOLERANCE)


_SETTINGS = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=10, **_SETTINGS)
@given(sweeps())
def test_a_sweep_is_a_loop_of_interventions(case):
    _check(case)


@pytest.mark.slow
@settings(max_examples=100, **_SETTINGS)
@given(sweeps())
def test_a_sweep_is_a_loop_of_interventions_many_times(case):
    _check(case)
    # hundreds of programs at once are more than a process should hold
    jax.clear_caches()
