"""Logical axes on a mesh of 8 devices: the same numbers, less memory a device, and clear errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

import mi_jax as mi
from mi_jax.core import sharding
from mi_jax.models import logical_axes
from tests.models.tiny import CONFIGS, prompts, tiny

TOLERANCE = 1e-5


def _bytes(tree, device) -> int:
    return sum(s.data.nbytes for x in jax.tree.leaves(tree) for s in x.addressable_shards if s.device == device)


def test_sharded_forward_and_capture_equal_one_device(mesh):
    model, tokens = tiny(), prompts(3, 4)
    sharded = sharding.shard(model, logical_axes(model), mesh)
    on_mesh = sharding.shard(tokens, ("batch", "pos"), mesh)
    fn = mi.capture(model, "resid_post", "attn.pattern", mi.at("mlp.post", layers=1))
    expected = mi.jit(fn)(tokens)
    logits, acts = mi.jit(mi.capture(sharded, "resid_post", "attn.pattern", mi.at("mlp.post", layers=1)))(on_mesh)
    assert logits.sharding.num_devices == 8
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=TOLERANCE), (logits, acts), expected)


def test_sharded_edits_equal_one_device(mesh):
    model, tokens = tiny(), prompts(3, 4)
    sharded = sharding.shard(model, logical_axes(model), mesh)
    edit = mi.add("attn.z", jnp.ones(6), layer=1, head=-1, pos=mi.per_example(jnp.array([0, 1, 2, -1])))
    expected = mi.jit(mi.intervene(model, edit))(tokens)
    found = mi.jit(mi.intervene(sharded, edit))(sharding.shard(tokens, ("batch", "pos"), mesh))
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)


def test_every_device_holds_a_share_of_the_parameters(mesh):
    model = tiny()
    sharded = sharding.shard(model, logical_axes(model), mesh)
    whole = sum(x.nbytes for x in jax.tree.leaves(model))
    shares = [_bytes(sharded, device) for device in mesh.devices.flat]
    # over fsdp and model, that is 4 ways; norms over fsdp only, the odd vocabulary over fsdp only
    assert max(shares) < 0.4 * whole
    attention = sharded.blocks.attn.q
    assert attention.sharding.shard_shape(attention.shape) == (3, 4, 2, 6)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_has_a_name_for_every_axis(name, mesh):
    model = tiny(name)
    sizes: dict[str, set[int]] = {}

    def note(x, names):
        assert len(names) == x.ndim
        for axis, size in zip(names, x.shape, strict=True):
            sizes.setdefault(axis, set()).add(size)

    jax.tree.map(note, model, logical_axes(model))
    assert all(len(found) == 1 for found in sizes.values())
    config = CONFIGS[name]
    assert sizes["head"] == {config.n_heads}
    assert sizes["kv_head"] == {config.n_kv_heads}
    assert sizes["d_vocab"] == {config.d_vocab}


def test_partitions(mesh):
    assert sharding.spec(("layer", "d_model", "head", "d_head"), (3, 8, 4, 6), mesh) == PartitionSpec(
        None, "fsdp", "model", None
    )
    # an axis that does not divide stays whole, and so does a second one that wants the same part of the mesh
    assert sharding.spec(("d_vocab", "d_model"), (13, 8), mesh) == PartitionSpec(None, "fsdp")
    assert sharding.spec(("d_mlp", "d_vocab"), (4, 4), mesh) == PartitionSpec("model", None)
    assert sharding.spec(("batch", None), (4, 2), mesh) == PartitionSpec("data", None)
    one_axis = Mesh(np.array(jax.devices()), ("data",))
    assert sharding.spec(("batch", "d_model"), (8, 8), one_axis) == PartitionSpec("data", None)


def test_axes_that_are_not_known_are_named(mesh):
    with pytest.raises(ValueError, match="no rule for axis 'heads'; there are rules for batch, pos"):
        sharding.spec(("layer", "heads"), (3, 4), mesh)
    with pytest.raises(ValueError, match=r"axes \('layer',\) name 1 dimensions, the array has shape \(3, 4\)"):
        sharding.spec(("layer",), (3, 4), mesh)


def test_make_mesh():
    made = sharding.make_mesh(data=2, model=3)
    assert dict(made.shape) == {"data": 2, "fsdp": 1, "model": 3}
    assert sharding.replicated(made).is_fully_replicated
    with pytest.raises(ValueError, match="a 4×4×1 mesh needs 16 devices, there are 8"):
        sharding.make_mesh(data=4, fsdp=4)
