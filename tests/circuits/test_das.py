"""Distributed alignment search where the answer is known: the subspace, its dimension, its place, and the controls."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mi_jax as mi
from mi_jax.circuits.das import CONTROLS, Boundary, Triples, fit_das, principal_angles
from mi_jax.circuits.das import fit as fit_module
from mi_jax.circuits.das.program import unedited
from mi_jax.core.errors import InputError
from tests.circuits.rotated import D_MODEL, Rotated, rotated, triples
from tests.models.tiny import prompts, tiny

STEPS = 200
# radians; the training is stochastic and short
ANGLE = 0.1
# where the variable is: layer 0 at position 0, layer 1 at position 1
CARRIED = np.eye(2, dtype=bool)


@pytest.fixture(scope="module")
def result():
    shifted = triples(7, 64, prompts=(4, 8))
    return fit_das(rotated(), triples(1), k=2, steps=STEPS, seeds=2, shifted=shifted, key=jax.random.key(0))


def test_the_subspace_is_found_where_it_is(result):
    assert (result.iia.value[CARRIED] > 0.98).all()
    assert (result.iia.ci_low[CARRIED] > 0.95).all()
    for place in (0, 1):
        for seed in (0, 1):
            angles = principal_angles(jnp.asarray(result.basis(place, place, seed=seed)), rotated().a)
            assert angles.max() < ANGLE


def test_it_is_not_found_where_it_is_not_yet_or_no_longer(result):
    assert 0.2 < result.unedited < 0.4
    assert (np.abs(result.iia.value - result.unedited)[~CARRIED] < 0.1).all()


def test_all_dimensions_carry_more_than_the_variable(result):
    # at layer 1 the other input is at the same position and would be swapped too
    np.testing.assert_allclose(result.whole_site.mean[0, 0], 1.0)
    assert result.whole_site.mean[1, 1] < 0.5


def test_controls_stay_at_chance(result):
    assert set(result.controls) == set(CONTROLS)
    assert (result.controls["arbitrary_labels"].value < 0.25).all()
    for name in ("random_model", "random_subspace", "equal_norm"):
        assert (result.controls[name].mean < result.unedited + 0.2).all(), name
    assert (result.excess[CARRIED] > 0.5).all()
    assert (result.excess[~CARRIED] < 0.05).all()


def test_it_holds_on_the_training_triples_and_out_of_distribution(result):
    assert (result.train_iia.value[CARRIED] > 0.98).all()
    assert (result.shifted.value[CARRIED] > 0.98).all()


def test_columns_stay_orthonormal_and_the_loss_falls(result):
    gram = np.swapaxes(result.bases, -1, -2) @ result.bases
    np.testing.assert_allclose(gram, np.broadcast_to(np.eye(2), gram.shape), atol=1e-5)
    assert (result.dimensions == 2).all()
    start, end = result.losses[..., :10].mean(-1), result.losses[..., -10:].mean(-1)
    assert (end < start - 0.5)[CARRIED].all()


def test_boundless_finds_the_number_of_dimensions():
    found = fit_das(
        rotated(), triples(1), boundary=Boundary(), steps=STEPS, seeds=2, controls=(), key=jax.random.key(1)
    )
    assert (np.abs(found.dimensions[CARRIED] - 2) <= 1).all()
    assert (found.dimensions[~CARRIED] <= 1).all()
    assert (found.iia.value[CARRIED] > 0.98).all()
    basis = jnp.asarray(found.basis(1, 1))
    assert basis.shape == (D_MODEL, found.dimensions[1, 1, 0])
    assert principal_angles(basis, rotated().a).max() < 2 * ANGLE
    # what is outside the boundary does not count
    outside = [found.bases[i][..., found.dimensions[i] :] for i in np.ndindex(found.dimensions.shape)]
    assert max(np.abs(columns).max(initial=0.0) for columns in outside) == 0.0


def few(model, data, **settings):
    """A short search, for what does not depend on its success."""
    defaults = {"k": 2, "steps": 3, "batch_size": 16, "seeds": 2, "controls": (), "key": jax.random.key(2)}
    return fit_das(model, data, **defaults | settings)


def test_the_number_of_cells_at_once_changes_nothing():
    data, options = triples(3, 64), {"layers": 1, "seeds": 1}
    one, many = few(rotated(), data, cells_at_once=1, **options), few(rotated(), data, cells_at_once=2, **options)
    np.testing.assert_allclose(one.losses, many.losses, atol=1e-4)
    np.testing.assert_allclose(one.bases, many.bases, atol=1e-3)


@pytest.mark.slow
def test_jit_changes_nothing():
    data, options = triples(3, 12), {"layers": 1, "positions": 1, "steps": 2, "seeds": 1, "batch_size": 4}
    compiled = few(rotated(), data, **options)
    with jax.disable_jit():
        plain = few(rotated(), data, **options)
    np.testing.assert_allclose(compiled.losses, plain.losses, atol=1e-5)
    np.testing.assert_allclose(compiled.bases, plain.bases, atol=1e-4)
    np.testing.assert_array_equal(compiled.iia.value, plain.iia.value)


def test_new_triples_models_and_keys_do_not_recompile(monkeypatch):
    traces, call = [], Rotated.__call__
    monkeypatch.setattr(Rotated, "__call__", lambda *args, **options: traces.append(1) or call(*args, **options))
    sizes = {"held_out": triples(6, 24), "seeds": 1, "controls": CONTROLS, "batch_size": 24}
    few(rotated(), triples(4, 40), **sizes)
    first = len(traces)
    assert first > 0
    traces.clear()
    other = jax.tree.map(lambda x: 1.5 * x, rotated())
    few(other, triples(5, 40), **sizes | {"held_out": triples(9, 24), "key": jax.random.key(9)})
    # what remains is the shape of the output, which is looked up without compiling
    monkeypatch.setattr(fit_module, "train", lambda *args: pytest.fail("the shapes come before the training"))
    shapes = len(traces)
    traces.clear()
    with pytest.raises(pytest.fail.Exception):
        few(other, triples(5, 40), **sizes)
    assert len(traces) == shapes < first


def test_full_rank_leaves_nothing_to_find():
    """With all dimensions, the fitted subspace, a random one and a plain patch are the same edit."""
    found = few(rotated(), triples(3, 64), k=D_MODEL, controls=("random_subspace", "equal_norm"))
    for other in (found.whole_site, found.controls["random_subspace"], found.controls["equal_norm"]):
        np.testing.assert_array_equal(np.broadcast_to(other.value, found.iia.value.shape), found.iia.value)


def test_a_site_outside_the_layers_and_without_positions():
    found = fit_das(rotated(), triples(1), site="pooled", k=2, steps=STEPS, seeds=1, controls=(), key=jax.random.key(0))
    assert found.layers == found.positions == (None,)
    assert found.iia.mean.shape == (1, 1)
    assert found.iia.mean[0, 0] > 0.98
    assert principal_angles(jnp.asarray(found.basis()), rotated().a).max() < ANGLE


def decoder_triples(seed: int, n: int) -> Triples:
    """Padded prompts with a position that differs between them; labels that the model gives half of the time."""
    base, source = prompts(seed, n), prompts(seed + 1, n)
    lengths = jnp.array([5, 4, 3] * (n // 3), jnp.int32)
    mask = jnp.arange(5, dtype=jnp.int32)[None, :] < lengths[:, None]
    answer = jnp.argmax(mi.jit(tiny())(source, mask), -1)[jnp.arange(n), lengths - 1].astype(jnp.int32)
    return Triples(base, source, answer, mask, places={"second last": lengths - 2})


@pytest.fixture(scope="module")
def on_decoder():
    held_out = decoder_triples(3, 12)
    found = few(
        tiny(), decoder_triples(5, 24), held_out=held_out, layers=(2, 0), positions=("second last", 0, -3), batch_size=5
    )
    return held_out, found


def test_the_decoder_equals_a_loop_of_single_interchanges(on_decoder):
    held_out, found = on_decoder
    assert found.layers == (2, 0)
    assert found.positions == ("second last", 0, -3)
    last = held_out.mask.sum(1) - 1
    _, acts = mi.jit(mi.capture(tiny(), "resid_post"))(held_out.source, held_out.mask)
    for i, layer in enumerate(found.layers):
        for j, pos in enumerate(found.positions):
            at = held_out.places["second last"] if j == 0 else None
            for seed in (0, 1):
                edit = found.edit(acts, layer, pos, seed=seed, at=at)
                logits = mi.jit(mi.intervene(tiny(), edit))(held_out.base, held_out.mask)
                answers = jnp.argmax(logits, -1)[jnp.arange(12), last]
                np.testing.assert_allclose(found.iia.value[i, j, seed], (answers == held_out.label).mean())
    answers = jnp.argmax(mi.jit(tiny())(held_out.base, held_out.mask), -1)[jnp.arange(12), last]
    np.testing.assert_allclose(found.unedited, (answers == held_out.label).mean())
    assert len(np.unique(found.iia.value)) > 1


def test_the_output_at_one_position_is_that_of_a_model_without_the_option(on_decoder):
    held_out, found = on_decoder
    # an edit that does nothing hides the decoder, so that logits at all positions are computed and picked from
    wrapped = mi.intervene(tiny(), mi.scale("embed", 1.0))
    same = few(
        wrapped,
        decoder_triples(5, 24),
        held_out=held_out,
        layers=(2, 0),
        positions=("second last", 0, -3),
        batch_size=5,
    )
    np.testing.assert_allclose(same.losses, found.losses, atol=1e-4)
    np.testing.assert_array_equal(same.iia.value, found.iia.value)


def test_what_was_not_fitted_is_named(on_decoder):
    held_out, found = on_decoder
    acts = jnp.zeros((12, 5, 8))
    with pytest.raises(InputError, match=re.escape("layer=1 was not fitted; fitted were 2, 0")):
        found.basis(1, 0)
    with pytest.raises(InputError, match="seed=2 was not fitted; there are 2 seeds"):
        found.basis(2, 0, seed=2)
    with pytest.raises(InputError, match="pass at=…"):
        found.edit(acts, 2, "second last")
    empty = dataclasses.replace(found, dimensions=np.zeros_like(found.dimensions))
    with pytest.raises(InputError, match="no dimension at layer=2, pos=0, seed=0"):
        empty.edit(acts, 2, 0)
    assert len(held_out) == 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"site": "resid_pots"}, "has no site 'resid_pots'"),
        ({"site": "heads"}, "axes layer batch pos head d_head; choose resid_post"),
        ({"layers": 2}, "has 2 layers (0–1); got layer=2"),
        ({"layers": ()}, "asked for at no layer"),
        ({"layers": (1, 1)}, "given twice"),
        ({"site": "pooled", "layers": 0}, "exists once"),
        ({"site": "pooled", "positions": 0}, "has no positions"),
        ({"site": "blocks.1.hook_resid_post", "layers": 0}, "names its layer"),
        ({"positions": 2}, "has 2 positions (0–1); got 2"),
        ({"positions": ()}, "one or more"),
        ({"positions": (0, -2)}, "(0, -2) names one twice"),
        ({"positions": "subject"}, "no position named 'subject'"),
        ({"k": D_MODEL + 1}, f"k must be from 1 to {D_MODEL}"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"controls": ("placebo",)}, "no control ['placebo']"),
        ({"held_out": 1.0}, "leaves one side empty"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(InputError, match=re.escape(message)):
        few(rotated(), triples(1), **options)


@pytest.mark.parametrize("n", [64, 37, 5])
def test_triples_are_run_in_chunks_of_the_training_size(monkeypatch, n):
    sizes, call = [], Rotated.__call__

    def recorded(self, inputs, *args, **options):
        sizes.append(inputs.shape[0])
        return call(self, inputs, *args, **options)

    monkeypatch.setattr(Rotated, "__call__", recorded)
    data = triples(3, n)
    expected = (jnp.argmax(call(rotated(), data.base), -1) == data.label).mean()
    np.testing.assert_allclose(unedited(rotated(), data, 16), expected, atol=1e-6)
    assert set(sizes) == {16}


def test_held_out_triples_that_are_trained_on_are_refused():
    data = triples(3, 40)
    with pytest.raises(InputError, match="40 of the 40 held-out triples have the base and source of a training triple"):
        few(rotated(), data, held_out=data)
    # another label does not make it another pair, another source does
    mixed = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), data[:2], triples(4, 6))
    mixed = dataclasses.replace(mixed, label=jnp.zeros_like(mixed.label))
    with pytest.raises(InputError, match="2 of the 8 held-out"):
        few(rotated(), data, held_out=mixed)
    data.check_apart(triples(4, 6))


def test_bad_triples_are_named():
    data = triples(1)
    with pytest.raises(InputError, match="labels must be from 0 to 15"):
        few(rotated(), dataclasses.replace(data, label=data.label + 1))
    with pytest.raises(InputError, match="no variable to align"):
        few(rotated(), dataclasses.replace(data, label=jnp.zeros_like(data.label)), controls=("arbitrary_labels",))
    with pytest.raises(InputError, match="inputs of one shape"):
        few(
            tiny(),
            Triples(prompts(1), prompts(2), jnp.array([1, 2])),
            held_out=Triples(prompts(1, n_pos=4), prompts(2, n_pos=4), jnp.array([1, 2])),
        )
    broken = dataclasses.replace(rotated(), rotation=rotated().rotation.at[0, 0].set(jnp.inf))
    with pytest.raises(InputError, match="not finite at step 0, layer 0, position 0"):
        few(broken, data)
