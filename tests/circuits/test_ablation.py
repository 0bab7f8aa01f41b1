"""Ablation values against means by hand, and optimal ones against what they must beat."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from mi_jax.circuits.ablation.means import source_means
from mi_jax.circuits.ablation.optimal import optimal_ablation
from mi_jax.circuits.ablation.values import ablation_values
from mi_jax.circuits.graph import Graph
from mi_jax.circuits.runs.divergence import kl_divergence
from mi_jax.circuits.runs.masked import masked_forward
from mi_jax.circuits.runs.sources import source_outputs
from mi_jax.core.errors import InputError
from mi_jax.data.task import Task
from tests.circuits.tiny_task import model, task
from tests.models.tiny import prompts

TASK = task()
CORRUPT = np.asarray(source_outputs(model(), TASK.corrupt, TASK.mask))


def longer() -> Task:
    """Twenty prompts of 1 to 4 tokens, more than run at once, and none at the last of 5 positions."""
    tokens = prompts(9, 20, 5)
    mask = jnp.arange(5)[None, :] < 1 + jnp.arange(20)[:, None] % 4
    fields = {"answer": tokens[:, 0], "distractor": tokens[:, 1], "position": jnp.zeros(20, jnp.int32)}
    return dataclasses.replace(TASK, clean=tokens, corrupt=tokens, mask=mask, **fields)


def test_resampled_and_zero_values():
    np.testing.assert_array_equal(ablation_values(model(), TASK), CORRUPT)
    np.testing.assert_array_equal(ablation_values(model(), TASK, "zero"), np.zeros_like(CORRUPT))
    given = jnp.ones(CORRUPT.shape)
    assert ablation_values(model(), TASK, given) is given


def test_means_leave_padding_out():
    """By hand over the seven real tokens: four of the first prompt, three of the second."""
    real = np.concatenate([CORRUPT[:, 0], CORRUPT[:, 1, :3]], 1)
    found = np.asarray(ablation_values(model(), TASK, "mean"))
    assert found.shape == CORRUPT.shape
    np.testing.assert_allclose(found[:, 1, 2], real.mean(1), atol=1e-6)
    np.testing.assert_array_equal(found, np.broadcast_to(found[:, :1, :1], found.shape))
    found = np.asarray(ablation_values(model(), TASK, "mean-positional"))
    np.testing.assert_allclose(found[:, 0, :3], CORRUPT[:, :, :3].mean(1), atol=1e-6)
    np.testing.assert_allclose(found[:, 1, 3], CORRUPT[:, 0, 3], atol=1e-6)


def test_means_of_a_reference_in_several_batches():
    reference = longer()
    real = np.asarray(reference.mask)
    written = np.asarray(source_outputs(model(), reference.corrupt, reference.mask))
    means = source_means(model(), reference, positional=True)
    overall = written[:, real].mean(1)
    np.testing.assert_allclose(source_means(model(), reference).mean[:, 0], overall, atol=1e-6)
    np.testing.assert_allclose(means.mean[:, 2], written[:, real[:, 2], 2].mean(1), atol=1e-6)
    np.testing.assert_allclose(means.mean[:, 4], overall, atol=1e-6)
    np.testing.assert_allclose(means.size, np.sqrt(np.square(written[:, real]).mean((1, 2))), rtol=1e-5)
    found = ablation_values(model(), TASK, "mean-positional", reference)
    np.testing.assert_allclose(found[:, 1], means.mean[:, :4], atol=1e-6)


def test_bad_ablations_are_named():
    with pytest.raises(InputError, match="ablation is one of resample, zero, mean, mean-positional, optimal"):
        ablation_values(model(), TASK, "median")
    with pytest.raises(InputError, match=r"ablation values have shape \(7, 2, 4, 8\)"):
        ablation_values(model(), TASK, jnp.zeros((6, 2, 4, 8)))
    with pytest.raises(InputError, match="its prompts have 4 positions, those of the task 5; use ablation='mean'"):
        ablation_values(model(), longer(), "mean-positional", TASK)


def test_optimal_values_beat_means_and_zeros():
    edges = Graph.of(model().config).edges
    circuit = edges & (np.random.default_rng(0).random(edges.shape) < 0.5)
    found = optimal_ablation(model(), TASK, circuit, steps=40)
    whole = model()(TASK.clean, TASK.mask, output_pos=TASK.position)

    def loss(patch):
        corrupted = jnp.asarray(edges & ~circuit, jnp.float32)
        logits = masked_forward(model(), TASK.clean, corrupted, patch, TASK.mask, output_pos=TASK.position)
        return float(kl_divergence(logits, whole).mean())

    mean, zero = (loss(ablation_values(model(), TASK, a)) for a in ("mean", "zero"))
    np.testing.assert_allclose(found.losses[0], mean, rtol=1e-4)
    np.testing.assert_allclose(loss(found.patch), found.loss, rtol=1e-3, atol=1e-6)
    assert found.loss == found.losses.min()
    assert found.loss < 0.3 * min(mean, zero)
    np.testing.assert_array_equal(found.patch[:, 1, 2], found.values)


def test_a_circuit_of_all_edges_has_nothing_to_fit():
    found = optimal_ablation(model(), TASK, Graph.of(model().config).edges, steps=40)
    np.testing.assert_allclose(found.losses, 0, atol=1e-6)
    with pytest.raises(InputError, match="a circuit has shape"):
        optimal_ablation(model(), TASK, np.zeros((2, 2), bool))


def test_optimal_values_are_fitted_on_other_prompts():
    """Cross-fitted by halves, or fitted on the reference; never on the prompt that they stand for."""
    found = np.asarray(ablation_values(model(), TASK, "optimal"))
    for row, other in ((0, 1), (1, 0)):
        expected = optimal_ablation(model(), TASK[np.array([other])]).values
        np.testing.assert_allclose(found[:, row, 2], expected, atol=1e-6)
    np.testing.assert_array_equal(found, np.broadcast_to(found[:, :, :1], found.shape))
    # what a prompt says about itself does not enter
    changed = dataclasses.replace(TASK, clean=TASK.clean.at[0].set((TASK.clean[0] + 3) % 13))
    moved = np.asarray(ablation_values(model(), changed, "optimal"))
    np.testing.assert_array_equal(moved[:, 0], found[:, 0])
    assert np.abs(moved[:, 1] - found[:, 1]).max() > 1e-3
    with pytest.raises(InputError, match="fitted on other prompts than they are measured on; this task has one"):
        ablation_values(model(), TASK[:1], "optimal")
    alone = ablation_values(model(), TASK[:1], "optimal", TASK[np.array([1])])
    np.testing.assert_allclose(alone[:, 0, 0], found[:, 0, 0], atol=1e-6)
