"""What runs leave out and what pruning drops changes nothing: in every structure, under every ablation."""

import dataclasses
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mi_jax.circuits.ablation.values import ablation_values
from mi_jax.circuits.graph import Graph
from mi_jax.circuits.graph.paths import layers_on_paths
from mi_jax.circuits.graph.selection import pruned
from mi_jax.circuits.runs.circuits import circuit_runs
from mi_jax.circuits.runs.masked import masked_forward
from mi_jax.circuits.runs.sources import source_outputs
from tests.circuits.tiny_task import ATTENTION_ONLY, CONFIG, task
from tests.models.tiny_families import FAMILIES, noisy

TOLERANCE = 2e-5
TASK = task()
NAMES = ("llama", "gpt2", "neox", "gptj", "gemma", "olmo2", "mixture")
ABLATIONS = ("resample", "mean", "zero", "mean-positional")
SHARES = (0.01, 0.03, 0.06, 0.1, 0.15, 0.3, 0.6)


def drawn(graph, share, n_pos=None, seed=0):
    shape = graph.edges.shape if n_pos is None else (*graph.edges.shape, n_pos)
    edges = graph.edges.reshape(graph.edges.shape + (1,) * (len(shape) - 2))
    return edges & (np.random.default_rng(seed).random(shape) < share)


@functools.cache
def deep(name, n_layers=3):
    """A family's structure in so many layers."""
    config = FAMILIES[name]
    return noisy(dataclasses.replace(config, n_layers=n_layers, windows=(config.windows * n_layers)[:n_layers]))


@eqx.filter_jit
def masked_metrics(decoder, cuts, patch):
    """The brute force: every circuit whole, all layers at all positions."""

    def one(cut):
        logits = masked_forward(decoder, TASK.clean, cut, patch, TASK.mask)
        return TASK.metric(jnp.take_along_axis(logits, TASK.position[:, None, None], 1))

    return jax.lax.map(one, cuts)


def expected(decoder, circuits, ablation):
    graph = Graph.of(decoder.config)
    edges = np.broadcast_to(graph.edges_like(circuits[0]), circuits[0].shape)
    cuts = jnp.asarray(edges[None] & ~np.stack(circuits), jnp.float32)
    return np.asarray(masked_metrics(decoder, cuts, ablation_values(decoder, TASK, ablation)))


def close(found, wanted):
    np.testing.assert_allclose(found, wanted, atol=TOLERANCE * max(1.0, float(np.abs(wanted).max())))


def random_masks(graph, n_pos=None):
    masks = [drawn(graph, share, n_pos, seed=seed) for seed, share in enumerate(SHARES)]
    beside = graph.mask(["input->a1.h0<q>", "input->a1.h1<v>", "a1.h0->logits", "a0.h1->a1.h1<q>"])
    return [*masks, np.broadcast_to(beside.reshape(beside.shape + (1,) * (masks[0].ndim - 2)), masks[0].shape)]


@pytest.mark.parametrize("name", NAMES)
def test_pruning_leaves_every_run_as_it_is(name):
    decoder = deep(name)
    graph = Graph.of(decoder.config)
    for ablation in ABLATIONS:
        masks = random_masks(graph)
        smaller = [pruned(mask, graph, "connected", ablation=ablation) for mask in masks]
        assert sum(mask.sum() for mask in smaller) < sum(mask.sum() for mask in masks)
        assert sum(bool(mask.any()) for mask in smaller) > 0
        close(expected(decoder, smaller, ablation), expected(decoder, masks, ablation))


def test_pruning_token_edges_leaves_every_run_as_it_is():
    for name in ("llama", "olmo2"):
        decoder = deep(name)
        graph = Graph.of(decoder.config)
        masks = random_masks(graph, TASK.clean.shape[1])
        for ablation in ("resample", "mean"):
            smaller = [graph.prune(mask, ablation=ablation) for mask in masks]
            assert sum(mask.sum() for mask in smaller) < sum(mask.sum() for mask in masks)
            close(expected(decoder, smaller, ablation), expected(decoder, masks, ablation))
            close(circuit_runs(decoder, TASK, masks, ablation=ablation).metric, expected(decoder, masks, ablation))


@pytest.mark.parametrize("name", NAMES)
def test_runs_leave_out_only_what_changes_nothing(name):
    decoder = deep(name)
    graph = Graph.of(decoder.config)
    masks = [drawn(graph, s, seed=7) for s in SHARES]
    skipped = [~layers_on_paths(graph, mask, ablation="resample") for mask in masks]
    assert 0 < np.sum(skipped) < 3 * len(masks)
    close(circuit_runs(decoder, TASK, masks).metric, expected(decoder, masks, "resample"))
    # given values, of which it is not known that they are of a run
    patch = ablation_values(decoder, TASK, "mean-positional")
    close(circuit_runs(decoder, TASK, masks, ablation=patch).metric, expected(decoder, masks, patch))


@pytest.mark.parametrize("n_layers", [1, 2, 8])
def test_however_many_layers_there_are(n_layers):
    """One layer is the last alone; eight are more than one chunk."""
    decoder = deep("gpt2", n_layers)
    graph = Graph.of(decoder.config)
    masks = [drawn(graph, share, seed=n_layers) for share in (0.0, 0.02, 0.2, 1.0)]
    close(circuit_runs(decoder, TASK, masks).metric, expected(decoder, masks, "resample"))
    close(circuit_runs(decoder, TASK, masks, batch_size=2).metric, expected(decoder, masks, "resample"))


def test_token_edges_and_layers_without_mlp():
    for config in (CONFIG, ATTENTION_ONLY):
        decoder = noisy(dataclasses.replace(config, n_layers=3))
        graph = Graph.of(decoder.config)
        masks = [drawn(graph, share, TASK.clean.shape[1]) for share in (0.05, 0.3)]
        close(circuit_runs(decoder, TASK, masks).metric, expected(decoder, masks, "resample"))


def test_dtypes_of_the_model_and_of_given_values_may_differ():
    decoder = deep("neox")
    graph = Graph.of(decoder.config)
    circuits = np.stack([drawn(graph, share, seed=3) for share in (0.05, 0.5)])
    patch = source_outputs(decoder, TASK.corrupt, TASK.mask)
    exact = circuit_runs(decoder, TASK, circuits, ablation=patch.astype(jnp.bfloat16).astype(jnp.float32))
    low = circuit_runs(decoder, TASK, circuits, ablation=patch.astype(jnp.bfloat16))
    np.testing.assert_array_equal(low.metric, exact.metric)
    # a stream in more bits than the unembedding is not rounded to it
    rows = decoder.unembedding.astype(jnp.bfloat16)
    mixed = eqx.tree_at(lambda d: d.unembed, decoder, rows)
    same = eqx.tree_at(lambda d: d.unembed, decoder, rows.astype(jnp.float32))
    with jax.numpy_dtype_promotion("standard"):
        found = circuit_runs(mixed, TASK, circuits)
    np.testing.assert_allclose(found.metric, circuit_runs(same, TASK, circuits).metric, atol=TOLERANCE)


def test_float16_keeps_its_range():
    """The norm comes before the product where the product could leave the range of the dtype."""
    decoder = deep("llama")
    large = jax.tree.map(lambda x: x.astype(jnp.float16), decoder)
    norms = large.blocks.attn_norm.weight
    large = eqx.tree_at(lambda d: (d.embed, d.blocks.attn_norm.weight), large, (large.embed * 4000, norms * 20))
    runs = circuit_runs(large, TASK, drawn(Graph.of(decoder.config), 0.5)[None])
    assert np.isfinite(runs.metric).all()


def test_where_a_norm_follows_a_bias_nothing_is_left_out():
    """What is left of the bias depends on the run, and every reader sees it."""
    decoder = noisy(dataclasses.replace(FAMILIES["gemma"], o_bias=True))
    graph = Graph.of(decoder.config)
    assert graph.normed_bias
    masks = [drawn(graph, share, seed=1) for share in (0.02, 0.1, 0.5)]
    for mask in masks:
        np.testing.assert_array_equal(graph.prune(mask), mask)
    close(circuit_runs(decoder, TASK, masks).metric, expected(decoder, masks, "resample"))
