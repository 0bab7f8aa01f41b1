"""Every site and two sweeps are TransformerLens' own, on random models: a stored file, and one made anew."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mi_jax as mi
from experiments.bench.peer import interpreter, run_script
from mi_jax.models import Decoder, DecoderConfig, init_decoder

SCRIPT = Path(__file__).parent / "make_golden.py"
FAMILIES = ("gpt2", "llama")
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
# sites that TransformerLens shows under a name of ours; a rotation exists only where positions are rotary
ALIASES = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post",
    "hook_attn_out": "attn_out",
    "hook_mlp_out": "mlp_out",
    "hook_mlp_in": "mlp.in",
    "hook_q_input": "attn.q_in",
    "hook_k_input": "attn.k_in",
    "hook_v_input": "attn.v_in",
    "attn.hook_v": "attn.v",
    "attn.hook_z": "attn.z",
    "attn.hook_result": "attn.head_out",
    "attn.hook_attn_scores": "attn.scores",
    "attn.hook_pattern": "attn.pattern",
    "mlp.hook_pre": "mlp.pre",
    "mlp.hook_post": "mlp.post",
}
QUERIES = {
    "gpt2": {"attn.hook_q": "attn.q", "attn.hook_k": "attn.k"},
    "llama": {"attn.hook_rot_q": "attn.q", "attn.hook_rot_k": "attn.k"},
}


@functools.cache
def stored() -> dict[str, np.ndarray]:
    return arrays_in(SCRIPT.with_name("transformer_lens.npz"))


def arrays_in(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


def of_family(arrays: dict[str, np.ndarray], family: str) -> dict[str, np.ndarray]:
    return {name.partition("/")[2]: a for name, a in arrays.items() if name.startswith(f"{family}/")}


def decoder(arrays: dict[str, np.ndarray]) -> Decoder:
    """The native decoder with the stored weights; every one of its leaves must be among them, and the reverse."""
    model = init_decoder(DecoderConfig(**json.loads(str(arrays["config"]))), key=jax.random.key(0))
    weights = {name.removeprefix("weight."): a for name, a in arrays.items() if name.startswith("weight.")}

    def leaf(path, like):
        weight = jnp.asarray(weights.pop(jax.tree_util.keystr(path, simple=True, separator=".")))
        assert weight.shape == like.shape
        return weight

    model = jax.tree_util.tree_map_with_path(leaf, model)
    assert not weights
    return model


def metric(logits):
    return (logits[:, -1, 5] - logits[:, -1, 7]).mean()


def check_sites(arrays: dict[str, np.ndarray], family: str) -> None:
    model = decoder(arrays)
    pairs = ALIASES | QUERIES[family]
    logits, acts = mi.jit(mi.capture(model, *pairs.values()))(jnp.asarray(arrays["clean"]))
    np.testing.assert_allclose(logits, arrays["logits"], **TOLERANCE)
    for theirs, ours in pairs.items():
        expected, got = arrays[f"activation.{theirs}"], np.asarray(acts[ours])
        if ours == "attn.scores":
            # what a token may not attend to: minus infinity there, the smallest number here
            np.testing.assert_array_equal(np.isneginf(expected), got == np.finfo(np.float32).min)
            expected = np.where(np.isneginf(expected), got, expected)
        np.testing.assert_allclose(got, expected, **TOLERANCE, err_msg=f"{family}: {theirs} and {ours}")


def check_sweeps(arrays: dict[str, np.ndarray]) -> None:
    model = decoder(arrays)
    clean, corrupt = jnp.asarray(arrays["clean"]), jnp.asarray(arrays["corrupt"])
    acts = mi.jit(mi.capture(model, "resid_pre", "attn.z"))(clean, output=False)[1]
    for site, axes in (("resid_pre", ("layer", "pos")), ("attn.z", ("layer", "head"))):
        sweep = mi.sweep(model, mi.patch(site, acts, **dict.fromkeys(axes, mi.each)), metric)
        expected = arrays[f"sweep.{site}"]
        assert np.ptp(expected) > 0.1
        np.testing.assert_allclose(mi.jit(sweep)(corrupt), expected, **TOLERANCE, err_msg=site)


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_of_the_stored_run(family):
    check_sites(of_family(stored(), family), family)


@pytest.mark.parametrize("family", FAMILIES)
def test_sweeps_of_the_stored_run(family):
    check_sweeps(of_family(stored(), family))


@pytest.mark.parametrize("family", FAMILIES)
def test_no_shared_site_is_left_out(family):
    """Each activation that TransformerLens shows is compared if our names have it."""
    arrays = of_family(stored(), family)
    table = decoder(arrays).site_table
    shared = set()
    for name in arrays:
        if name.startswith("activation."):
            theirs = name.removeprefix("activation.")
            try:
                shared.add((theirs, table.resolve(f"blocks.0.{theirs}")[0].name))
            except mi.SiteError:
                continue
    # these two aliases are not taken: where positions are rotary, the name means the values before the rotation
    queries = {pair for pair in QUERIES[family].items() if "rot" in pair[0]}
    assert shared == set(ALIASES.items()) | queries


@pytest.mark.reference
def test_a_run_made_now(tmp_path):
    """TransformerLens is installed into an environment of its own the first time; other weights than the stored."""
    path = tmp_path / "made.npz"
    run_script(interpreter(SCRIPT), SCRIPT, str(path), "--seed=1")
    arrays = arrays_in(path)
    for family in FAMILIES:
        check_sites(of_family(arrays, family), family)
        check_sweeps(of_family(arrays, family))


@pytest.mark.reference
def test_the_stored_file_is_what_the_script_makes(tmp_path):
    path = tmp_path / "made.npz"
    run_script(interpreter(SCRIPT), SCRIPT, str(path))
    arrays = arrays_in(path)
    assert arrays.keys() == stored().keys()
    for name, array in stored().items():
        if array.dtype.kind == "U":
            assert str(arrays[name]) == str(array)
        else:
            np.testing.assert_allclose(arrays[name], array, rtol=1e-5, atol=1e-5, err_msg=name)
