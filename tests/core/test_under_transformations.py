"""Edits under JAX's own transformations: vmap, grad, jvp, remat and shard_map change no number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import mi_jax as mi
from tests.models.tiny import prompts, tiny

TOLERANCE = 1e-5
TOKENS = prompts(4, 8)


@pytest.fixture(scope="module")
def acts():
    return mi.jit(mi.capture(tiny(), "attn.z", "resid_pre"))(prompts(3, 8))[1]


def _edits(acts, basis, layer=1):
    return (
        mi.patch("attn.z", acts, layer=layer, head=2, pos=-1),
        mi.swap_subspace("resid_pre", basis, acts, layer=layer),
        mi.scale("mlp_out", 0.5, layer=layer, pos=mi.per_example(jnp.arange(8) % 5)),
    )


def test_grad_jvp_and_remat_agree(acts):
    basis = jnp.eye(8, 2)
    direction = jax.random.normal(jax.random.key(0), acts["attn.z"].shape)

    def loss(z, wrap):
        run = wrap(lambda z: mi.intervene(tiny(), *_edits(acts | {"attn.z": z}, basis))(TOKENS)[:, -1, 3].mean())
        return run(z)

    z = acts["attn.z"]
    gradient = jax.jit(jax.grad(lambda z: loss(z, lambda f: f)))(z)
    with_remat = jax.jit(jax.grad(lambda z: loss(z, jax.checkpoint)))(z)
    value, tangent = jax.jit(lambda z, t: jax.jvp(lambda z: loss(z, lambda f: f), (z,), (t,)))(z, direction)
    np.testing.assert_allclose(with_remat, gradient, atol=1e-7)
    np.testing.assert_allclose(tangent, (gradient * direction).sum(), rtol=1e-4)
    step = 1e-2
    ahead, behind = (loss(z + s * step * direction, lambda f: f) for s in (1, -1))
    np.testing.assert_allclose(tangent, (ahead - behind) / (2 * step), rtol=2e-2)
    assert np.isfinite(value)
    # only what is patched in counts: layer 1, head 2, the last position
    outside = np.asarray(gradient).copy()
    outside[1, :, -1, 2] = 0
    assert not outside.any()
    assert np.abs(gradient).max() > 0


def test_vmap_over_layers_is_a_loop(acts):
    def run(layer):
        return mi.intervene(tiny(), *_edits(acts, jnp.eye(8, 2), layer))(TOKENS)

    together = jax.jit(jax.vmap(run))(jnp.arange(3, dtype=jnp.int32))
    for layer in range(3):
        np.testing.assert_allclose(together[layer], jax.jit(run)(jnp.int32(layer)), atol=TOLERANCE)


def test_shard_map_over_the_batch(acts):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def run(tokens, z):
        return mi.intervene(tiny(), mi.patch("attn.z", z, layer=1, head=2, pos=-1))(tokens)

    mapped = jax.jit(
        jax.shard_map(run, mesh=mesh, in_specs=(P("data"), P(None, "data")), out_specs=P("data"), check_vma=False)
    )
    np.testing.assert_allclose(mapped(TOKENS, acts["attn.z"]), jax.jit(run)(TOKENS, acts["attn.z"]), atol=TOLERANCE)


def test_a_sweep_over_a_sharded_batch_is_the_same(acts):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    edit = mi.patch("resid_pre", acts["resid_pre"], layer=mi.each, pos=mi.each)

    def metric(logits):
        return logits[:, -1, 3].mean()

    alone = mi.jit(mi.sweep(tiny(), edit, metric))(TOKENS)
    spread = jax.device_put(TOKENS, jax.NamedSharding(mesh, P("data")))
    values = jax.device_put(acts["resid_pre"], jax.NamedSharding(mesh, P(None, "data")))
    edit = mi.patch("resid_pre", values, layer=mi.each, pos=mi.each)
    np.testing.assert_allclose(mi.jit(mi.sweep(tiny(), edit, metric))(spread), alone, atol=TOLERANCE)


def test_a_hundred_sweeps_are_one_program(acts):
    traces = []

    def metric(logits):
        traces.append(1)
        return logits[:, -1, 3].mean()

    for number in range(100):
        edit = mi.patch("attn.z", acts["attn.z"] * (1 + number), layer=mi.each, head=mi.each, pos=3 + number % 2)
        mi.jit(mi.sweep(tiny(), edit, metric))((TOKENS + number) % 13)
    # one for each length of suffix: from position 3 on two positions can change, from 4 on one
    assert len(traces) == 2

    traces.clear()
    for number in range(100):
        edit = mi.patch("resid_pre", acts["resid_pre"] * (1 + number), layer=mi.each, pos=mi.each)
        mi.jit(mi.sweep(tiny(), edit, metric))((TOKENS + number) % 13)
    assert len(traces) == 1


def test_progress_counts_every_batch_of_cells(acts):
    seen = []
    edit = mi.patch("resid_pre", acts, layer=mi.each, pos=mi.each)
    run = mi.jit(
        mi.sweep(tiny(), edit, lambda x: x[:, -1, 3].mean(), batch_size=2, progress=lambda *now: seen.append(now))
    )
    jax.block_until_ready(run(TOKENS))
    jax.effects_barrier()
    assert sorted(seen) == [(done, 9) for done in range(1, 10)]
