"""A saved edit does what the edit did; a damaged file is one clear error."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mi_jax as mi
from mi_jax.core.errors import InputError
from tests.models.tiny import prompts, tiny

TOKENS = prompts(4)


def _all():
    key = jax.random.key(5)
    acts = mi.jit(mi.capture(tiny(), "resid_pre", "attn.z"))(prompts(3))[1]
    basis = jax.random.normal(key, (3, 8, 2))
    return [
        mi.patch("resid_pre", acts, layer=1, pos=(0, -1)),
        mi.add("attn.z", acts, head=2, pos=mi.per_example(jnp.array([3, 1]))),
        mi.scale("mlp_out", 0.5, layer=0),
        mi.noise("embed", 0.1, key=key),
        mi.ablate("attn.z", baseline="mean", layer=2, head=1),
        mi.ablate("mlp_out", baseline="mean_per_position", layer=1),
        mi.ablate("attn_out", baseline="resample", layer=0, key=key),
        mi.project_out("resid_post", basis, layer=1),
        mi.swap_subspace("resid_pre", basis[0], acts, layer=2),
    ]


def test_what_is_read_back_is_what_was_written(tmp_path):
    edits = _all()
    mi.save_edits(tmp_path / "edits.safetensors", edits)
    loaded = mi.load_edits(tmp_path / "edits.safetensors")
    assert eqx.tree_equal(loaded, edits)
    run = mi.jit(lambda edits: mi.intervene(tiny(), *edits)(TOKENS))
    np.testing.assert_array_equal(run(loaded), run(edits))
    assert [p.name for p in tmp_path.iterdir()] == ["edits.safetensors"]


def test_marked_axes_are_kept(tmp_path):
    edit = mi.ablate("attn.z", layer=mi.each, head=mi.each)
    mi.save_edits(tmp_path / "e", [edit])
    assert mi.load_edits(tmp_path / "e")[0].index.layer is mi.each


def test_a_function_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(InputError, match=r"edit 1 of site 'mlp_out' is a Transform, which holds a function"):
        mi.save_edits(tmp_path / "e", [mi.ablate("mlp_out"), mi.transform("mlp_out", jnp.tanh)])
    assert not list(tmp_path.iterdir())


def test_files_that_are_not_edits(tmp_path):
    from safetensors.numpy import save_file

    with pytest.raises(InputError, match="does not exist"):
        mi.load_edits(tmp_path / "missing")
    save_file({"a": np.zeros(3)}, tmp_path / "other")
    with pytest.raises(InputError, match="holds no edits"):
        mi.load_edits(tmp_path / "other")
    mi.save_edits(tmp_path / "whole", _all())
    data = (tmp_path / "whole").read_bytes()
    for cut in (0, 7, 40, len(data) // 2, len(data) - 1):
        (tmp_path / "cut").write_bytes(data[:cut])
        with pytest.raises(InputError, match="damaged"):
            mi.load_edits(tmp_path / "cut")
