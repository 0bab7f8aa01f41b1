"""The parts of distributed alignment search against their definitions: rotations, gates, triples, controls."""

import dataclasses

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mi_jax as mi
from mi_jax.circuits.das import Boundary, Triples, orthonormal, principal_angles
from mi_jax.circuits.das.cells import readable
from mi_jax.circuits.das.controls import EqualNorm, arbitrary_labels, random_bases, random_model
from mi_jax.circuits.das.program import output_logits
from mi_jax.circuits.das.result import interval
from mi_jax.circuits.das.subspace import kept_columns, root_gates
from mi_jax.core.errors import InputError
from tests.models.tiny import tiny
from tests.models.tiny_families import FAMILIES, family, inputs

TOLERANCE = 1e-5


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def triples(base, source, **rest):
    base, source = jnp.asarray(base, jnp.int32), jnp.asarray(source, jnp.int32)
    return Triples(base, source, jnp.arange(len(base), dtype=jnp.int32), **rest)


@pytest.mark.parametrize("shape", [(6, 1), (6, 6), (3, 5, 2)])
def test_columns_are_orthonormal_and_span_what_was_given(shape):
    x = normal(0, *shape)
    q = orthonormal(x)
    gram = jnp.swapaxes(q, -1, -2) @ q
    np.testing.assert_allclose(gram, np.broadcast_to(np.eye(shape[-1]), gram.shape), atol=TOLERANCE)
    np.testing.assert_allclose(q @ jnp.swapaxes(q, -1, -2) @ x, x, atol=TOLERANCE)


def test_an_orthonormal_basis_is_its_own_and_small_changes_change_it_little():
    q = orthonormal(normal(0, 6, 3))
    np.testing.assert_allclose(orthonormal(q), q, atol=TOLERANCE)
    np.testing.assert_allclose(orthonormal(q + 1e-4 * normal(1, 6, 3)), q, atol=1e-3)


def test_the_gradient_through_the_parametrisation_is_that_of_finite_differences():
    with jax.enable_x64(True):
        x, weight, direction = (normal(i, 5, 2).astype(jnp.float64) for i in range(3))

        def value(t):
            return (weight * orthonormal(x + t * direction)).sum()

        step = jnp.asarray(1e-5, jnp.float64)
        numeric = (value(step) - value(-step)) / (2 * step)
        np.testing.assert_allclose(jax.grad(value)(jnp.zeros((), jnp.float64)), numeric, rtol=1e-6)


def test_gates_go_from_half_to_all_or_nothing():
    soft = jnp.square(root_gates(jnp.float32(0.5), jnp.float32(50.0), 8))
    np.testing.assert_allclose(soft, np.full(8, 0.5), atol=0.03)
    middle = jnp.square(root_gates(jnp.float32(0.5), jnp.float32(2.0), 8))
    np.testing.assert_allclose(middle, 1 / (1 + np.exp(-(4 - np.arange(8) - 0.5) / 2)), rtol=TOLERANCE)
    sharp = jnp.square(root_gates(jnp.float32(0.5), jnp.float32(0.01), 8))
    np.testing.assert_allclose(sharp, [1, 1, 1, 1, 0, 0, 0, 0], atol=TOLERANCE)
    np.testing.assert_array_equal(kept_columns(jnp.array([0.0, 0.5, 1.0]), 8).sum(-1), [0, 4, 8])


def test_the_gradient_of_a_closed_gate_is_finite():
    gradient = jax.grad(lambda b: root_gates(b, jnp.float32(0.001), 8).sum())(jnp.float32(0.0))
    assert jnp.isfinite(gradient)


def test_the_temperature_falls_geometrically():
    boundary = Boundary(temperature=(100.0, 1.0))
    values = [float(boundary.temperature_at(jnp.float32(p))) for p in (0.0, 0.5, 1.0)]
    np.testing.assert_allclose(values, [100.0, 10.0, 1.0], rtol=TOLERANCE)


def test_principal_angles_of_planes_that_share_a_line():
    eye, angle = jnp.eye(5), 1e-3
    turned = jnp.cos(angle) * eye[:, 1] + jnp.sin(angle) * eye[:, 2]
    a, b = eye[:, :2], jnp.stack([turned, eye[:, 0]], 1)
    np.testing.assert_allclose(principal_angles(a, b), [0, angle], rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(principal_angles(eye[:, :1], eye[:, 3:]), [np.pi / 2], rtol=TOLERANCE)
    np.testing.assert_allclose(principal_angles(eye, a), [0, 0], atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=8, max_size=40), st.floats(0.1, 0.6), st.integers(0, 99))
def test_a_split_has_no_prompt_on_both_sides_and_drops_what_straddles_it(kinds, held_out, seed):
    kinds = np.asarray(kinds)
    # kinds 0 and 1 share a prompt, and so do 4 and 5
    given_triples = triples(np.stack([kinds, kinds // 2], 1), np.stack([2 * (kinds // 4), kinds // 2], 1))
    try:
        fit, score = given_triples.split(held_out, key=jax.random.key(seed))
    except InputError:
        assert len(set(kinds.tolist())) < 8
        return
    sides = [{tuple(row) for x in (part.base, part.source) for row in x.tolist()} for part in (fit, score)]
    assert not sides[0] & sides[1]
    kept = [*fit.label.tolist(), *score.label.tolist()]
    assert len(set(kept)) == len(kept)
    for left_out in set(range(len(kinds))) - set(kept):
        one = {tuple(row[left_out].tolist()) for row in (given_triples.base, given_triples.source)}
        assert not any(one <= side for side in sides)
    assert len(score) >= held_out * len(kept)
    # rows stay together
    for part in (fit, score):
        np.testing.assert_array_equal(part.base[:, 0], kinds[np.asarray(part.label)])
        np.testing.assert_array_equal(part.source[:, 1], kinds[np.asarray(part.label)] // 2)


def test_triples_with_prompts_of_their_own_are_all_kept():
    own = triples(np.arange(40).reshape(20, 2), np.arange(40, 80).reshape(20, 2))
    fit, score = own.split(0.25, key=jax.random.key(0))
    assert (len(fit), len(score)) == (15, 5)


def test_triples_that_do_not_align_are_named(monkeypatch):
    # as for a user who does not check annotations, which name these faults too
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(InputError, match="must align position by position"):
        triples(np.zeros((2, 3)), np.zeros((2, 4)))
    with pytest.raises(InputError, match="different numbers of rows"):
        triples(np.zeros((2, 3)), np.zeros((2, 3)), places={"subject": jnp.zeros(3, jnp.int32)})
    with pytest.raises(InputError, match="1 different prompts leaves one side empty"):
        triples(np.zeros((4, 3)), np.zeros((4, 3))).split(key=jax.random.key(0))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=2, max_size=30), st.integers(0, 99))
def test_arbitrary_labels_are_a_bijection_without_fixed_points(labels, seed):
    labels = np.asarray(labels, np.int32)
    classes = np.unique(labels)
    if len(classes) < 2:
        with pytest.raises(InputError, match="no variable to align"):
            arbitrary_labels(labels, 2, key=jax.random.key(seed))
        return
    tables = arbitrary_labels(labels, 2, key=jax.random.key(seed))
    for table in tables:
        assert sorted(table[classes].tolist()) == classes.tolist()
        assert (table[classes] != classes).all()


def test_a_random_model_has_the_shape_and_none_of_the_weights():
    model = tiny()
    other = random_model(model, key=jax.random.key(0))
    assert jax.tree.structure(other) == jax.tree.structure(model)
    assert jnp.abs(other.embed - model.embed).max() > 0.1
    # a model of another kind keeps each array's numbers in random order, and what is not a weight
    edited = mi.intervene(model, mi.add("attn_out", normal(0, 8), layer=1))
    shuffled = random_model(edited, key=jax.random.key(0))
    np.testing.assert_allclose(np.sort(shuffled.model.embed, axis=None), np.sort(model.embed, axis=None))
    assert jnp.abs(shuffled.model.embed - model.embed).max() > 0.1
    assert int(shuffled.edits["attn_out"][0].index.layer) == 1


def test_the_placebo_moves_as_far_as_the_fitted_edit_and_within_its_own_subspace():
    basis, placebo = (jnp.asarray(b) for b in random_bases((2, 6, 2), key=jax.random.key(0)))
    x, value = normal(1, 3, 4, 6), normal(2, 3, 4, 6)
    moved = EqualNorm(basis, placebo, value)(x) - x
    swapped = (value - x) @ basis @ basis.T
    np.testing.assert_allclose(jnp.linalg.norm(moved, axis=-1), jnp.linalg.norm(swapped, axis=-1), rtol=1e-4)
    np.testing.assert_allclose(moved @ placebo @ placebo.T, moved, atol=TOLERANCE)
    np.testing.assert_allclose(EqualNorm(basis, basis, value)(x), x + swapped, atol=TOLERANCE)
    np.testing.assert_array_equal(EqualNorm(basis, placebo, x)(x), x)


def test_the_interval_is_that_of_a_binomial_proportion():
    correct = np.random.default_rng(0).random((1, 6, 400)) < np.array([0.0, 0.5, 0.5, 0.9, 0.9, 1.0])[None, :, None]
    found = interval(correct, (2, 3), key=jax.random.key(0))
    np.testing.assert_allclose(found.value[:, :, 0].reshape(-1), correct[0].mean(-1))
    p = found.mean
    error = 1.96 * np.sqrt(p * (1 - p) / 400)
    np.testing.assert_allclose(found.ci_low, p - error, atol=0.012)
    np.testing.assert_allclose(found.ci_high, p + error, atol=0.012)


def test_a_model_without_logits_or_without_an_obvious_place_to_read_is_named():
    encoder, label = family("bert"), jnp.zeros(2, jnp.int32)
    base = jnp.zeros((2, 4), jnp.int32)
    with pytest.raises(InputError, match="bert-like is an encoder without an unembedding"):
        readable(encoder, [Triples(base, base, label)])
    edited = mi.intervene(encoder, mi.ablate("attn_out", layer=0))
    with pytest.raises(InputError, match="bert-like is an encoder without an unembedding"):
        readable(edited, [Triples(base, base, label)])
    config = dataclasses.replace(FAMILIES["gpt2"], name="masked", causal=False)
    masked = dataclasses.replace(family("gpt2"), config=config)
    with pytest.raises(InputError, match=r"masked has no causal mask, .* position=…"):
        readable(masked, [Triples(base, base, label)])
    images = inputs("vit", 0)
    with pytest.raises(InputError, match=r"vit-like reads images .* the class token"):
        readable(family("vit"), [Triples(images, images, label)])
    # where the place is given, all is well
    for model, x in ((masked, base), (family("vit"), images)):
        (part,) = readable(model, [Triples(x, x, label, position=jnp.array([0, 3], jnp.int32))])
        np.testing.assert_array_equal(part.position, [0, 3])
    (causal,) = readable(tiny(), [Triples(base, base, label)])
    np.testing.assert_array_equal(causal.position, [3, 3])


def test_the_answer_of_an_image_is_read_at_the_class_token():
    model, images = family("vit"), inputs("vit", 0)
    part = Triples(images, images, jnp.zeros(2, jnp.int32), position=jnp.zeros(2, jnp.int32))
    np.testing.assert_allclose(output_logits(model, part), mi.jit(model)(images)[:, 0], atol=TOLERANCE)
