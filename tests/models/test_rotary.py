"""Rotary positions against what defines them, and the scaled frequencies against formulas written out once more."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mi_jax.models.config import RopeScaling
from mi_jax.models.rotary import rotate, rotation, rotations
from tests.models.numpy_decoder import scaled_frequencies
from tests.models.tiny_families import FAMILIES

CONFIG = dataclasses.replace(FAMILIES["llama"], d_head=8, rope_scaling=None, rope_theta=100.0)
TOLERANCE = 1e-5


def at(x, config, positions, layer=0):
    """Rows `[pos n d_head]` at their positions."""
    positions = jnp.asarray(positions, jnp.int32)[None]
    return rotate(x[None], rotation(config, layer), positions, adjacent=config.rope_adjacent)[0]


def heads(seed, n_pos=5, n=2, d_head=8):
    return jax.random.normal(jax.random.key(seed), (n_pos, n, d_head))


@settings(max_examples=20, deadline=None)
@given(
    position=st.integers(0, 4000), shift=st.integers(0, 4000), adjacent=st.booleans(), dim=st.sampled_from([2, 4, 8])
)
def test_lengths_stay_and_products_depend_on_the_distance_only(position, shift, adjacent, dim):
    config = dataclasses.replace(CONFIG, rope_adjacent=adjacent, rope_dim=dim)
    q, k = heads(0, 1), heads(1, 1)
    turned = at(q, config, [position])
    np.testing.assert_allclose(jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(q, axis=-1), rtol=1e-5)
    np.testing.assert_array_equal(turned[..., dim:], q[..., dim:])

    def product(a, b):
        return (at(q, config, [a]) * at(k, config, [b])).sum(-1)

    # angles of thousands of radians are rounded to 2⁻¹² of a radian
    np.testing.assert_allclose(product(position + shift, shift), product(position, 0), atol=5e-3)
    np.testing.assert_allclose(product(shift, shift), (q * k).sum(-1), atol=1e-5)


def test_a_product_is_that_of_complex_numbers():
    """Re Σ q_i k̄_i exp(i (m − n) θ_i), one complex number for every pair."""
    q, k, m, n = heads(0, 1, 1)[0, 0], heads(1, 1, 1)[0, 0], 9, 4
    found = (at(q[None, None], CONFIG, [m]) * at(k[None, None], CONFIG, [n])).sum()
    q, k = (np.asarray(x[:4]) + 1j * np.asarray(x[4:]) for x in (q, k))
    frequency = 100.0 ** -np.array([0, 0.25, 0.5, 0.75])
    np.testing.assert_allclose(found, (q * k.conj() * np.exp(1j * (m - n) * frequency)).sum().real, rtol=1e-5)


def test_adjacent_pairs_are_halves_after_a_permutation():
    x, adjacent = heads(2), dataclasses.replace(CONFIG, rope_adjacent=True, rope_dim=6)
    halves = dataclasses.replace(CONFIG, rope_dim=6)
    to_halves = np.array([0, 2, 4, 1, 3, 5, 6, 7])
    found = at(x, adjacent, range(5))[..., to_halves]
    np.testing.assert_allclose(found, at(x[..., to_halves], halves, range(5)), atol=TOLERANCE)
    assert np.abs(found - at(x, halves, range(5))[..., to_halves]).max() > 0.1


def test_linear_scaling_divides_positions():
    scaled = dataclasses.replace(CONFIG, rope_scaling=RopeScaling("linear", 4.0))
    np.testing.assert_allclose(
        at(heads(3), scaled, np.arange(5) * 4), at(heads(3), CONFIG, np.arange(5)), atol=TOLERANCE
    )


def test_layers_without_positions_and_with_a_base_of_their_own():
    config = dataclasses.replace(
        CONFIG,
        n_layers=3,
        rope_layers=(True, False, True),
        windows=(0, 4, 4),
        rope_local_theta=7.0,
        rope_scaling=RopeScaling("linear", 2.0),
    )
    found = rotations(config)[0]
    np.testing.assert_allclose(found[0], 100.0 ** (-np.arange(4) / 4) / 2, rtol=1e-6)
    np.testing.assert_array_equal(found[1], 0.0)
    # where there is a window, its own base without scaling
    np.testing.assert_allclose(found[2], 7.0 ** (-np.arange(4) / 4), rtol=1e-6)
    np.testing.assert_array_equal(at(heads(4), config, range(5), layer=1), heads(4))
    assert rotation(dataclasses.replace(CONFIG, positions="none"), 0) is None


SCALED = {
    # of 16 pairs, some in every part of the ramp
    "llama3": (500_000.0, 32, RopeScaling("llama3", 8.0, 8192, 1.0, 4.0)),
    "llama3 of other factors": (10_000.0, 16, RopeScaling("llama3", 32.0, 64, 0.5, 3.0)),
    "yarn": (10_000.0, 32, RopeScaling("yarn", 40.0, 4096)),
    "yarn, not truncated": (10_000.0, 32, RopeScaling("yarn", 4.0, 512, beta_fast=20.0, truncate=False)),
    "yarn of a small base": (20.0, 8, RopeScaling("yarn", 2.0, 64, attention_factor=1.3)),
}


@pytest.mark.parametrize("name", SCALED)
def test_scaled_frequencies_are_those_of_the_formulas(name):
    theta, dim, scaling = SCALED[name]
    config = dataclasses.replace(CONFIG, d_head=dim, rope_theta=theta, rope_scaling=scaling)
    frequencies, gain = scaled_frequencies(theta, dim, scaling)
    plain = theta ** (-np.arange(0, dim, 2) / dim)
    found = rotation(config, 0)
    np.testing.assert_allclose(found.frequency, frequencies, rtol=2e-6)
    # fast components are kept, slow ones divided by the factor, and nothing is outside of these two
    share = (np.asarray(found.frequency) / plain - 1 / scaling.factor) / (1 - 1 / scaling.factor)
    assert share[0] > 0.99
    assert share[-1] < 0.6 if "small" in name else share[-1] < 0.01
    assert (np.diff(share) < 1e-5).all()
    assert np.allclose(1.0 if found.gain is None else found.gain, gain)


def test_the_gain_of_yarn_multiplies_what_turns():
    assert rotation(dataclasses.replace(CONFIG, rope_scaling=RopeScaling("yarn", 1.0, 64)), 0).gain is None
    yarn = RopeScaling("yarn", 4.0, 64)
    config = dataclasses.replace(CONFIG, rope_dim=4, rope_scaling=yarn)
    gain = 0.1 * math.log(4) + 1
    turned = at(heads(5), config, range(5))
    lengths = [np.linalg.norm(x[..., :4], axis=-1) for x in (turned, heads(5))]
    np.testing.assert_allclose(lengths[0], gain * lengths[1], rtol=1e-5)
    np.testing.assert_array_equal(turned[..., 4:], heads(5)[..., 4:])
    # layers with a base of their own are not scaled, nor do those that do not turn have a gain
    local = dataclasses.replace(
        config, n_layers=3, windows=(0, 2, 0), rope_local_theta=10.0, rope_layers=(True, True, False)
    )
    np.testing.assert_allclose(rotations(local)[1], [gain, 1.0, 1.0], rtol=1e-6)


def test_frequencies_have_full_precision_and_the_input_keeps_its_own():
    """In bfloat16 an angle of thousands of radians would be wrong by several turns."""
    x = heads(6).astype(jnp.bfloat16)
    found = at(x, CONFIG, np.arange(5) + 3000)
    assert found.dtype == jnp.bfloat16
    exact = at(x.astype(jnp.float32), CONFIG, np.arange(5) + 3000)
    np.testing.assert_allclose(found.astype(jnp.float32), exact, atol=0.05)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (("linear", 0.0), "must be positive, got 0.0"),
        (("yarn", 2.0), "yarn scaling needs the original context length"),
        (("llama3", 2.0), "llama3 scaling needs the original context length"),
        (("llama3", 2.0, 8, 4.0, 4.0), "needs 0 < low_freq_factor < high_freq_factor; got 4.0 and 4.0"),
    ],
)
def test_scaling_that_cannot_be_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        RopeScaling(*fields)
