"""Circuits in the structures of other families: biases, parallel blocks, mixtures; and what has no graph."""

import dataclasses

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest

import mi_jax as mi
from mi_jax.circuits import Graph, masked_forward, source_outputs
from mi_jax.circuits.scores import edge_scores
from mi_jax.core.errors import InputError
from mi_jax.models import Decoder
from tests.circuits.tiny_task import task
from tests.models.tiny_families import FAMILIES, family, noisy

TOLERANCE = 2e-5
TASK = task()
NAMES = ("gpt2", "neox", "gptj", "mixture")


@eqx.filter_jit
def masked(model: Decoder, edges):
    patch = source_outputs(model, TASK.corrupt, TASK.mask)
    return masked_forward(model, TASK.clean, edges, patch, TASK.mask)


@pytest.mark.parametrize("name", NAMES)
def test_no_edges_all_edges_and_one_edge(name):
    model, graph = family(name), Graph.of(FAMILIES[name])
    real = np.asarray(TASK.mask)
    clean, corrupt = (mi.jit(mi.capture(model, "mlp_out", "embed"))(x, TASK.mask) for x in (TASK.clean, TASK.corrupt))
    found = {
        edges: masked(model, jnp.asarray(mask, jnp.float32))
        for edges, mask in (("none", 0 * graph.edges), ("all", graph.edges), ("input->m1", graph.mask(["input->m1"])))
    }
    np.testing.assert_allclose(found["none"], clean[0], atol=TOLERANCE)
    np.testing.assert_allclose(np.asarray(found["all"])[real], np.asarray(corrupt[0])[real], atol=TOLERANCE)
    difference = corrupt[1]["embed"] - clean[1]["embed"]
    one = mi.jit(mi.intervene(model, mi.add("mlp.in", difference, layer=1)))(TASK.clean, TASK.mask)
    np.testing.assert_allclose(found["input->m1"], one, atol=TOLERANCE)
    assert np.abs(one - clean[0]).max() > 1e-3
    assert np.abs(corrupt[0] - clean[0]).max() > 0.1


def test_in_a_parallel_block_no_head_writes_to_the_mlp_beside_it():
    parallel, sequential = Graph(2, 2, 2, True, parallel=True), Graph(2, 2, 2, True)
    names = set(parallel.names(parallel.edges))
    assert set(sequential.names(sequential.edges)) - names == {f"a{i}.h{h}->m{i}" for i in (0, 1) for h in (0, 1)}
    assert names <= set(sequential.names(sequential.edges))
    assert Graph.of(FAMILIES["gptj"]).parallel
    assert not Graph.of(FAMILIES["gpt2"]).parallel
    np.testing.assert_array_equal(parallel.prune(parallel.edges), parallel.edges)
    # the layer's heads have no influence on its MLP
    model = family("neox")
    _, before = mi.jit(mi.capture(model, "mlp_out"))(TASK.clean)
    _, after = mi.jit(mi.capture(mi.intervene(model, mi.add("attn.z", 1.0, layer=1)), "mlp_out"))(TASK.clean)
    np.testing.assert_array_equal(before["mlp_out"][:2], after["mlp_out"][:2])


@pytest.mark.parametrize("name", ["gptj", "mixture"])
def test_the_gradient_of_an_edge_is_that_of_the_masked_forward(name):
    """Attribution is the derivative of the masked run in the edge, at no edges; exact scores exist too."""
    model, graph = family(name), Graph.of(FAMILIES[name])
    scores = edge_scores(model, TASK, method="eap")
    rng = np.random.default_rng(0)
    direction = jnp.asarray(graph.edges * rng.normal(size=graph.edges.shape), jnp.float32)

    def metric(strength):
        logits = masked(model, strength * direction)
        rows = jnp.take_along_axis(logits, TASK.position[:, None, None], axis=1)
        return float(TASK.logit_difference(rows).mean())

    step = 1e-2
    found = (metric(step) - metric(-step)) / (2 * step)
    np.testing.assert_allclose(found, (scores * np.asarray(direction)).sum(), rtol=2e-2, atol=1e-3)
    exact = edge_scores(model, TASK, method="exact")
    assert np.isfinite(exact).all()
    assert np.abs(exact).max() > 1e-2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gemma", r"no graph of edges for gemma-like: its heads go through a norm .*\(norms='sandwich'\)"),
        ("olmo2", r"no graph of edges for olmo2-like: its heads go through a norm .*\(norms='output'\)"),
        ("vit", "no graph of edges for vit-like: its inputs are images"),
        ("bert", "no graph of edges for bert-like: its norms stand on the stream"),
    ],
)
def test_what_has_no_graph_is_named(name, message):
    with pytest.raises(InputError, match=message):
        Graph.of(FAMILIES[name])


def test_an_encoder_without_a_head_has_no_graph():
    config = dataclasses.replace(FAMILIES["gpt2"], causal=False, head="none")
    with pytest.raises(InputError, match="encoder without a head and has no logits"):
        source_outputs(noisy(config), TASK.clean)
