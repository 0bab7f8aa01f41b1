"""A mixture of experts against loops over tokens, under transformations, and its sites."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mi_jax as mi
from mi_jax.models.config import DecoderConfig
from mi_jax.models.mlp import Experts, mlp
from tests.models.tiny import prompts
from tests.models.tiny_families import FAMILIES, family

TOLERANCE = 1e-5
EVERY = ("mlp.gates",)


class Tap:
    """Touches some sites, changes none."""

    def __init__(self, *touched):
        self._touched, self.seen = touched, {}

    def touches(self, name):
        return name in self._touched

    def __call__(self, name, x):
        self.seen[name] = x
        return x


def experts(n_experts, n_active, d_model=4, d_mlp=3, *, renormalize=True, seed=0) -> tuple[Experts, DecoderConfig]:
    config = dataclasses.replace(
        FAMILIES["mixture"],
        n_experts=n_experts,
        n_active_experts=n_active,
        d_model=d_model,
        d_mlp=d_mlp,
        renormalize_experts=renormalize,
    )
    keys = jax.random.split(jax.random.key(seed), 4)
    up = (n_experts, d_model, d_mlp)
    shapes = ((d_model, n_experts), up, up, (n_experts, d_mlp, d_model))
    return Experts(*(jax.random.normal(k, shape) for k, shape in zip(keys, shapes, strict=True))), config


def in_numpy(p, x, config):
    """Each token's output, one token and one of its experts at a time."""
    p = jax.tree.map(lambda w: np.asarray(w, np.float64), p)
    out = np.zeros(x.shape)
    for place in np.ndindex(x.shape[:2]):
        token = np.asarray(x[place], np.float64)
        weights = np.exp(token @ p.router)
        weights /= weights.sum()
        chosen = np.argsort(-weights)[: config.n_active_experts]
        total = weights[chosen].sum() if config.renormalize_experts else 1.0
        for expert in chosen:
            gate = token @ p.gate[expert]
            hidden = gate / (1 + np.exp(-gate)) * (token @ p.up[expert])
            out[place] += weights[expert] / total * (hidden @ p.down[expert])
    return out


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(("n_experts", "n_active"), [(4, 2), (3, 3), (5, 1)])
def test_every_token_gets_its_own_experts(n_experts, n_active, renormalize):
    p, config = experts(n_experts, n_active, renormalize=renormalize)
    x = jax.random.normal(jax.random.key(1), (2, 9, 4))
    expected = in_numpy(p, x, config)
    sparse = jax.jit(lambda x: mlp(p, None, x, Tap(), config))(x)
    every = jax.jit(lambda x: mlp(p, None, x, Tap(*EVERY), config))(x)
    np.testing.assert_allclose(sparse, expected, atol=TOLERANCE)
    np.testing.assert_allclose(every, expected, atol=TOLERANCE)


@settings(max_examples=12, deadline=None)
@given(
    counts=st.lists(st.integers(0, 9), min_size=3, max_size=3).filter(sum),
    seed=st.integers(0, 99),
    n_pos=st.sampled_from([1, 5, 24]),
)
def test_any_share_of_tokens_per_expert(counts, seed, n_pos):
    """Experts with no token, and with all of them."""
    p, config = experts(3, 1, d_model=3, seed=seed)
    p = dataclasses.replace(p, router=9.0 * jnp.eye(3))
    rng = np.random.default_rng(seed)
    picks = rng.choice(3, (1, n_pos), p=np.array(counts) / sum(counts))
    x = jnp.asarray(np.eye(3)[picks] + 0.1 * rng.normal(size=(1, n_pos, 3)), jnp.float32)
    np.testing.assert_allclose(mlp(p, None, x, Tap(), config), in_numpy(p, x, config), atol=TOLERANCE)


def test_derivatives_and_vmap_are_those_of_the_path_through_every_expert():
    p, config = experts(4, 2)
    x = jax.random.normal(jax.random.key(1), (3, 2, 5, 4))

    def run(*touched):
        def loss(p, x):
            return (mlp(p, None, x, Tap(*touched), config) ** 2).sum()

        def all_of_it(p, xs):
            values, gradients = jax.vmap(jax.value_and_grad(loss, (0, 1)), (None, 0))(p, xs)
            tangent = jax.jvp(lambda x: loss(p, x), (xs[0],), (xs[1],))[1]
            of_vmap = jax.grad(lambda p: jax.vmap(loss, (None, 0))(p, xs).sum())(p)
            each_its_own = jax.vmap(loss)(jax.tree.map(lambda w: jnp.stack([w, 2 * w, w]), p), xs)
            curvature = jax.jvp(jax.grad(lambda x: loss(p, x)), (xs[0],), (xs[1],))[1]
            return values, gradients, tangent, of_vmap, each_its_own, curvature

        return jax.jit(all_of_it)(p, x)

    sparse, every = run(), run(*EVERY)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), sparse, every)
    one = jax.jit(lambda x: (mlp(p, None, x, Tap(), config) ** 2).sum())
    np.testing.assert_allclose(sparse[0], [one(row) for row in x], rtol=1e-5)
    step = 1e-3
    difference = (one(x[0] + step * x[1]) - one(x[0] - step * x[1])) / (2 * step)
    np.testing.assert_allclose(sparse[2], difference, rtol=2e-2)


def test_gates_are_zero_but_for_the_chosen_experts_and_ablating_one_takes_its_output_away():
    model, tokens = family("mixture"), prompts(1)
    run = mi.jit(mi.capture(model, "mlp.gates", "mlp.expert_out", "mlp_out", "mlp.router"))
    _, acts = run(tokens)
    gates = np.asarray(acts["mlp.gates"])
    assert ((gates > 0).sum(-1) == 2).all()
    probabilities = jax.nn.softmax(acts["mlp.router"])
    np.testing.assert_allclose(gates[gates > 0], np.asarray(probabilities)[gates > 0], atol=TOLERANCE)

    layer, expert = 1, 2
    ablated = mi.intervene(model, mi.scale("mlp.gates", 1.0 - jax.nn.one_hot(expert, 4), layer=layer))
    _, without = mi.jit(mi.capture(ablated, "mlp_out"))(tokens)
    lost = gates[layer, ..., expert, None] * np.asarray(acts["mlp.expert_out"])[layer, :, :, expert]
    np.testing.assert_allclose(without["mlp_out"][layer], acts["mlp_out"][layer] - lost, atol=TOLERANCE)
    assert np.abs(lost).max() > 0.01
    np.testing.assert_allclose(without["mlp_out"][0], acts["mlp_out"][0], atol=TOLERANCE)


def test_the_program_without_taps_does_not_compute_every_expert():
    """No product in it has all tokens and all experts."""
    p, config = experts(6, 1, d_model=5, d_mlp=7)
    x = jax.random.normal(jax.random.key(1), (2, 30, 5))
    sparse = str(jax.make_jaxpr(lambda x: mlp(p, None, x, Tap(), config))(x))
    every = str(jax.make_jaxpr(lambda x: mlp(p, None, x, Tap(*EVERY), config))(x))
    assert "[2,30,6,7]" in every
    assert "[2,30,6,7]" not in sparse
    # tiles of 8 tokens, of which there are at most (60 − 6) // 8 + 6
    assert "f32[8,7]" in sparse
    assert "f32[12,8,5]" in sparse
