"""On 8 devices: the numbers of one, and an eighth of the parameters on each."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mi_jax as mi
from mi_jax.core.sharding import make_mesh, shard
from mi_jax.models import Decoder, logical_axes
from mi_jax.models.generate import generate
from tests.models.tiny import prompts
from tests.models.tiny_families import FAMILIES, noisy

TOLERANCE = 1e-5
# sizes that 8 divides
DIVISIBLE = {"d_model": 16, "n_heads": 8, "n_kv_heads": 8, "d_mlp": 16, "d_vocab": 24}
MODELS = {name: noisy(dataclasses.replace(FAMILIES[name], **DIVISIBLE)) for name in ("llama", "gemma", "mixture")}
MESHES = {"fsdp=8": (1, 8, 1), "model=8": (1, 1, 8), "data=8": (8, 1, 1), "2×2×2": (2, 2, 2)}
CLEAN, CORRUPT = prompts(1, 8, 6, 24), prompts(2, 8, 6, 24)
READ = jnp.array([5, 4, 3, 5, 2, 5, 5, 1], jnp.int32)
CAPTURED = ("resid_post", "attn.pattern", "mlp.post")


def on(mesh, model: Decoder, *arrays):
    """The model and arrays `[batch …]`, on the mesh."""
    sharded = [shard(x, ("batch", *(None,) * (x.ndim - 1)), mesh) for x in arrays]
    return shard(model, logical_axes(model), mesh), *sharded


def everything(model: Decoder, clean, corrupt, read):
    """Logits and activations, a sweep, and a generated text."""
    # one program after the other: two at once would share the few threads that 8 virtual devices wait on
    logits, acts = jax.block_until_ready(mi.jit(mi.capture(model, *CAPTURED))(clean))
    edit = mi.patch("resid_post", acts, layer=mi.each, pos=mi.each)
    sweep = mi.jit(mi.sweep(model, edit, lambda out: out[:, 0, 3] - out[:, 0, 5]))
    effects = jax.block_until_ready(sweep(corrupt, output_pos=read))
    made = jax.block_until_ready(generate(mi.capture(model, "logits"), clean, max_new_tokens=4))
    return {"logits": logits, "effects": effects, "tokens": made.tokens, "steps": made.acts["logits"]} | acts


@pytest.fixture(scope="module")
def expected():
    one_device = {name: everything(model, CLEAN, CORRUPT, READ) for name, model in MODELS.items()}
    return jax.tree.map(np.asarray, one_device)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", MODELS)
def test_a_mesh_gives_the_numbers_of_one_device(name, mesh, expected):
    found = everything(*on(make_mesh(*MESHES[mesh]), MODELS[name], CLEAN, CORRUPT, READ))
    assert found["logits"].sharding.num_devices == 8
    for what, value in found.items():
        reference = expected[name][what]
        bound = TOLERANCE * max(1.0, float(np.abs(reference).max()))
        np.testing.assert_allclose(value, reference, rtol=0, atol=bound, err_msg=what)


@pytest.mark.parametrize("mesh", ["fsdp=8", "model=8"])
@pytest.mark.parametrize("name", MODELS)
def test_every_device_holds_its_share_of_the_parameters(name, mesh):
    _, fsdp, tensor = MESHES[mesh]
    # large enough that norms, which tensor parallelism leaves whole, are few
    config = dataclasses.replace(MODELS[name].config, d_model=64, d_mlp=128, d_head=16, d_vocab=256)
    model = noisy(config)
    (sharded,) = on(make_mesh(*MESHES[mesh]), model)
    whole = sum(x.nbytes for x in jax.tree.leaves(model))
    held = dict.fromkeys(jax.devices()[:8], 0)
    for x in jax.tree.leaves(sharded):
        for piece in x.addressable_shards:
            held[piece.device] += piece.data.nbytes
    assert whole / (fsdp * tensor) <= max(held.values()) <= 1.15 * whole / (fsdp * tensor)
    assert min(held.values()) == max(held.values())
