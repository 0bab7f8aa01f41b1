"""Every combination of the table: its loss against the oracle, its gradient against dense autodiff."""

import dataclasses
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mi_jax.core.errors import InputError
from mi_jax.decomposition import ARCHITECTURES, COMBINATIONS, Objective, architecture
from mi_jax.decomposition.activations import JumpReLU
from mi_jax.decomposition.activations.elementwise import heaviside, jump
from mi_jax.decomposition.config import check_combination
from mi_jax.decomposition.nested import by_size
from mi_jax.decomposition.objective import Coefficients, auxk, in_turn, loss
from tests.decomposition import oracle
from tests.decomposition.cases import (
    D_IN,
    D_SAE,
    TOKENS,
    TOPOLOGIES,
    K,
    activations,
    config_of,
    parameters,
    random_dictionary,
)

# in double precision: a difference is a mistake and not rounding
TOLERANCE = 1e-10
LAMBDA, EXPONENT, TARGET = 0.3, 0.7, 5.0
PREFIXES = (4, 16, D_SAE)
DEAD = np.arange(D_SAE) % 5 == 0
AUX = {"k_aux": 2, "aux_candidates": 4, "aux_coefficient": 0.5, "target_l0": TARGET}


def objectives(activation):
    """Each value of each field with the first of the others, and all pairs of reconstruction and penalty."""
    combines = COMBINATIONS[activation]
    for reconstruction, penalty in itertools.product(combines.reconstructions, combines.penalties):
        yield reconstruction, penalty, combines.auxiliaries[0]
    for auxiliary in combines.auxiliaries[1:]:
        yield combines.reconstructions[0], combines.penalties[0], auxiliary


MATRIX = [(a, *o, "sae") for a in COMBINATIONS for o in objectives(a)] + [
    pytest.param(
        *(a, c.reconstructions[-1], c.penalties[-1], c.auxiliaries[-1], topology),
        # the same code with other widths: two activations are enough by default
        marks=() if a in ("jumprelu", "batchtopk") else pytest.mark.slow,
    )
    for a, c in COMBINATIONS.items()
    for topology in list(TOPOLOGIES)[1:]
    if not (a == "matching_pursuit" and "transcoder" in topology)
]


def objective_of(reconstruction, penalty, auxiliary, **fields):
    prefixes = PREFIXES if reconstruction == "matryoshka" else ()
    return Objective(reconstruction, prefixes, penalty, auxiliary=auxiliary, **(AUX | fields))


def setting(activation, topology, **fields):
    config = config_of(activation, topology, **fields)
    dictionary = random_dictionary(config, dtype=jnp.float64)
    x = activations(dtype=jnp.float64)
    y = activations(2, width=config.width_out, dtype=jnp.float64) if config.transcoder else x
    return config, dictionary, x, y


@eqx.filter_jit
def value_and_grad(dictionary, x, y, objective, chosen):
    coefficients = Coefficients(jnp.asarray(LAMBDA), jnp.asarray(EXPONENT))

    def of(dictionary):
        return loss(dictionary, x, y, jnp.asarray(DEAD), objective, coefficients, chosen)

    return eqx.filter_value_and_grad(of, has_aux=True)(dictionary)


def expected(activation, config, dictionary, x, y, objective):
    p, x, y = parameters(dictionary), np.asarray(x), np.asarray(y)
    h, z = oracle.preactivations(p, x), oracle.codes(activation, p, x, k=K, training=True)
    kind = objective.reconstruction
    total = oracle.reconstruction_loss(kind, p, x, y, z, prefixes=objective.prefixes, k=K)
    if (activation, kind) == ("matching_pursuit", "hierarchical"):
        # its codes come in the order of the pursuit
        nested = [oracle.codes(activation, p, x, k=t) for t in range(1, K + 1)]
        total = np.mean([oracle.reconstruction_loss("squared_error", p, x, y, part) for part in nested])
    total += LAMBDA * oracle.penalty(
        objective.penalty, activation, p, h, z, exponent=EXPONENT, target_l0=TARGET, n_sites=config.n_sites
    )
    limits = {"k_aux": AUX["k_aux"], "candidates": AUX["aux_candidates"], "n_sites": config.n_sites}
    auxiliary = oracle.auxiliary(objective.auxiliary, p, x, y, h, z, DEAD, **limits)
    return z, total + AUX["aux_coefficient"] * auxiliary


@pytest.mark.parametrize(("activation", "reconstruction", "penalty", "auxiliary", "topology"), MATRIX)
def test_a_combination_is_its_equation(activation, reconstruction, penalty, auxiliary, topology):
    with jax.enable_x64(True):
        objective = objective_of(reconstruction, penalty, auxiliary)
        config, dictionary, x, y = setting(activation, topology)
        check_combination(config, objective)
        z, want = expected(activation, config, dictionary, x, y, objective)
        (total, parts), grads = value_and_grad(dictionary, x, y, objective, dictionary.choose(x))
        np.testing.assert_allclose(total, want, rtol=TOLERANCE)
        np.testing.assert_array_equal(parts.fired, (z != 0).sum(0))
        np.testing.assert_allclose(parts.smallest, z[z > 0].min(), rtol=TOLERANCE)
        check_directional_derivative(activation, dictionary, x, y, objective, grads)


def check_directional_derivative(activation, dictionary, x, y, objective, grads):
    """Central differences of the oracle-checked loss, where no straight-through gradient is meant."""
    if activation == "jumprelu" or objective.auxiliary in ("auxk", "gate", "load_balance"):
        return
    rng = np.random.default_rng(3)
    step = jax.tree.map(
        lambda leaf: jnp.asarray(1e-6 * rng.normal(size=leaf.shape)) if eqx.is_inexact_array(leaf) else leaf, dictionary
    )

    def moved(sign):
        signed = jax.tree.map(lambda s: sign * s, eqx.filter(step, eqx.is_inexact_array))
        shifted = eqx.apply_updates(dictionary, signed)
        return float(value_and_grad(shifted, x, y, objective, shifted.choose(x))[0][0])

    pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(eqx.filter(step, eqx.is_inexact_array)), strict=True)
    along = sum(float((g * s).sum()) for g, s in pairs)
    np.testing.assert_allclose((moved(1) - moved(-1)) / 2, along, rtol=2e-4, atol=1e-12)


SPARSE = [
    (name, {"max_active": D_SAE} if shape["activation"] in ("relu", "gated", "jumprelu") else {})
    for name, (shape, _) in ARCHITECTURES.items()
    if name not in ("matching_pursuit", "switch")
]


@pytest.mark.parametrize(("name", "fields"), SPARSE)
def test_sparse_gradients_equal_dense_autodiff(name, fields):
    with jax.enable_x64(True):
        shape, aims = ARCHITECTURES[name]
        if aims.get("reconstruction") == "hierarchical":
            aims = aims | {"reconstruction": "squared_error"}
        prefixes = {"prefixes": PREFIXES} if aims.get("reconstruction") == "matryoshka" else {}
        objective = Objective(**(AUX | prefixes | aims))
        _, dictionary, x, y = setting(shape["activation"], "sae", **fields)
        chosen = dictionary.choose(x)
        assert chosen is not None
        assert bool(chosen.fits)
        sparse, dense = (value_and_grad(dictionary, x, y, objective, c) for c in (chosen, None))
        np.testing.assert_allclose(sparse[0][0], dense[0][0], rtol=TOLERANCE)
        for a, b in zip(jax.tree.leaves(sparse[1]), jax.tree.leaves(dense[1]), strict=True):
            np.testing.assert_allclose(a, b, atol=TOLERANCE * (1 + float(jnp.abs(b).max())))


def test_hierarchical_gradients_equal_dense_autodiff():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        values, w, target = (jnp.asarray(rng.normal(size=s)) for s in ((5, 3), (8, 4), (5, 4)))
        latents = jnp.asarray(rng.integers(0, 8, (5, 3)))

        def plain(values, w, target):
            parts = target[:, None] - jnp.cumsum(values[..., None] * w[latents], 1)
            return (jnp.arange(5.0) * (parts**2).sum(-1).mean(1)).sum()

        def ours(values, w, target):
            return (jnp.arange(5.0) * by_size(values, latents, w, target)).sum()

        got, want = (jax.value_and_grad(f, argnums=(0, 1, 2))(values, w, target) for f in (ours, plain))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), got, want)


def test_jumprelus_straight_through_gradients():
    h = jnp.array([0.5, 0.99, 1.01, 1.2, 1.5])
    theta = jnp.ones(5)
    to_h, to_theta = jax.grad(lambda h, t: jump(h, t, 0.1).sum(), argnums=(0, 1))(h, theta)
    np.testing.assert_allclose(to_h, [0, 0, 1, 1, 1])
    # −θ/ε within ε/2 of the threshold, on either side
    np.testing.assert_allclose(to_theta, [0, -10, -10, 0, 0], rtol=1e-6)
    to_h, to_theta = jax.grad(lambda h, t: heaviside(h, t, 0.1).sum(), argnums=(0, 1))(h, theta)
    np.testing.assert_allclose(to_h, 0)
    np.testing.assert_allclose(to_theta, [0, -10, -10, 0, 0], rtol=1e-6)


def test_thresholds_move_in_float32_where_bfloat16_stands_still():
    # a step of 1e-4 on a threshold of 1 is lost in bfloat16, whose next number is 1.0078
    activation = JumpReLU(jnp.ones(4, jnp.float32), bandwidth=0.5)
    gradient = jax.grad(lambda a: a.active(jnp.full((1, 4), 0.9), lambda p: p[None, :]).sum())(activation)
    moved = activation.threshold - 1e-4 * gradient.threshold
    np.testing.assert_allclose(moved, 1 + 2e-4, rtol=1e-6)
    assert (moved.astype(jnp.bfloat16) == 1).all()


@pytest.mark.parametrize(
    ("n_dead", "normalised", "rescaled"),
    [(0, False, True), (1, False, False), (3, False, False), (3, False, True), (4, True, True)],
)
def test_auxk_by_hand(n_dead, normalised, rescaled):
    dictionary, x = float32("topk")
    objective = objective_of("squared_error", "none", "auxk", aux_normalised=normalised, aux_rescaled=rescaled)
    dead = np.arange(D_SAE) < n_dead
    error = activations(7)
    got = auxk(dictionary, x, error, jnp.asarray(dead), objective)
    p = parameters(dictionary)
    h = np.asarray(x, np.float64) @ p["w_enc"].T - p["centre"] @ p["w_enc"].T + p["b_enc"]
    e, guess = np.asarray(error, np.float64), np.zeros((TOKENS, D_IN))
    for token in range(TOKENS):
        largest = sorted(range(n_dead), key=lambda j: -h[token, j])[: objective.k_aux]
        # b_dec has no part in it: the remainder has none left
        guess[token] = sum((max(h[token, j], 0.0) * p["w_dec"][j] for j in largest), np.zeros(D_IN))
    want = ((e - (oracle.best_scale(e, guess) if rescaled else 1.0) * guess) ** 2).sum(1).mean()
    want *= min(n_dead / objective.k_aux, 1.0)
    if normalised:
        want /= ((e - e.mean(0)) ** 2).sum(1).mean()
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)


def float32(activation):
    return random_dictionary(config_of(activation)), activations()


def test_auxk_gives_no_gradient_to_the_remainder_and_moves_dead_latents_only():
    dictionary, x = float32("topk")
    objective = objective_of("squared_error", "none", "auxk")
    dead = jnp.asarray(DEAD)
    to_error = jax.grad(lambda e: auxk(dictionary, x, e, dead, objective))(activations(7))
    assert (to_error == 0).all()
    grads = eqx.filter_grad(lambda d: auxk(d, x, activations(7), dead, objective))(dictionary)
    for leaf in (grads.w_enc, grads.w_dec):
        assert jnp.abs(leaf[~DEAD]).max() == 0
        assert jnp.abs(leaf[DEAD]).max() > 0


def test_the_gates_loss_does_not_move_the_decoder():
    with jax.enable_x64(True):
        _, dictionary, x, y = setting("gated", "sae")
        with_gate = objective_of("squared_error", "l1", "gate")
        without = objective_of("squared_error", "l1", "gate", aux_coefficient=0.0)
        a, b = (value_and_grad(dictionary, x, y, o, None)[1] for o in (with_gate, without))
        np.testing.assert_allclose(a.w_dec, b.w_dec, rtol=1e-12)
        assert jnp.abs(a.w_enc - b.w_enc).max() > 1e-3


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_named_architecture_is_in_the_table(name):
    config, objective = architecture(name, D_IN, D_SAE, k=K, n_experts=4)
    check_combination(config, objective)


def test_what_does_not_combine_is_refused():
    with pytest.raises(InputError, match="topk does not combine with penalty='l0'; it does with none, l1"):
        architecture("topk", D_IN, D_SAE, k=K, objective={"penalty": "l0"})
    with pytest.raises(InputError, match="no architecture 'vanilla'; there are relu"):
        architecture("vanilla", D_IN, D_SAE)
    with pytest.raises(InputError, match="last prefix must be d_sae=32"):
        architecture("matryoshka", D_IN, D_SAE, k=K, objective={"prefixes": (4, 8)})
    with pytest.raises(InputError, match="matryoshka needs prefixes"):
        Objective("matryoshka")
    with pytest.raises(InputError, match="k_aux=5 must be at most aux_candidates=4"):
        Objective(k_aux=5, aux_candidates=4)
    with pytest.raises(InputError, match="needs a target_l0"):
        Objective(penalty="l0_target")


def test_every_dead_latent_takes_part_equally_often():
    dead = np.random.default_rng(0).uniform(size=(2, 50)) < 0.6
    turns = jax.jit(jax.vmap(lambda step: in_turn(jnp.asarray(dead), 8, step)))(jnp.arange(8 * dead.sum()))
    assert (np.asarray(turns).sum(-1) == 8).all()
    for layer in range(2):
        times = np.asarray(turns)[:, layer].sum(0)
        assert (times[~dead[layer]] == 0).all()
        assert np.ptp(times[dead[layer]]) <= 1
    # where all fit, all take part
    np.testing.assert_array_equal(in_turn(jnp.asarray(dead), 50, jnp.int32(3)), dead)


def test_the_scale_of_what_is_left_over_does_not_shrink_dead_latents():
    dictionary, x = float32("topk")
    objective = objective_of("squared_error", "none", "auxk")
    dead = jnp.asarray(DEAD)

    def along(error, rescaled):
        aim = dataclasses.replace(objective, aux_rescaled=rescaled)
        grads = eqx.filter_grad(lambda d: auxk(d, x, error, dead, aim))(dictionary)
        # the derivative by the size of all codes together
        return float((grads.w_enc * dictionary.w_enc).sum() + (grads.b_enc * dictionary.b_enc).sum())

    small = 1e-3 * x
    assert along(small, False) > 1e-2
    assert abs(along(small, True)) < 1e-8
