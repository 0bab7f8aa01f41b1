"""Circuits in other families: biases, parallel blocks, norms of outputs, mixtures; and what has no graph."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mi_jax as mi
from mi_jax.circuits import Graph, masked_forward, source_outputs
from mi_jax.circuits.runs.sources import shares
from mi_jax.core.errors import InputError
from mi_jax.models import Decoder
from mi_jax.models.norm import Norm
from tests.circuits.tiny_task import task
from tests.models.tiny_families import FAMILIES, family, noisy

TOLERANCE = 2e-5
TASK = task()
NAMES = ("gpt2", "neox", "gptj", "gemma", "olmo2", "mixture")


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


@pytest.mark.parametrize("name", NAMES)
def test_sources_and_biases_add_up_to_the_stream(name):
    model, graph = family(name), Graph.of(FAMILIES[name])
    found = np.asarray(mi.jit(source_outputs)(model, TASK.clean, TASK.mask))
    _, acts = mi.jit(mi.capture(model, "resid_post", "attn_out", "mlp_out"))(TASK.clean, TASK.mask)
    biases = model.blocks.attn.o_bias
    total = found[0]
    for layer, written in enumerate(found[1:].reshape(2, graph.layer_sources, *found.shape[1:])):
        heads, rest = written[: graph.n_heads].sum(0), written[graph.n_heads :].sum(0)
        bias = 0 if biases is None else np.asarray(biases[layer])
        np.testing.assert_allclose(heads + bias, acts["attn_out"][layer], atol=TOLERANCE)
        np.testing.assert_allclose(rest, acts["mlp_out"][layer], atol=TOLERANCE)
        total = total + heads + rest + bias
        np.testing.assert_allclose(total, acts["resid_post"][layer], atol=TOLERANCE)


@pytest.mark.parametrize("bias", [None, [0.1, -0.2, 0.3]])
def test_shares_of_a_norm_add_up_to_it_without_its_bias(bias):
    norm = Norm(jnp.array([0.5, 1.0, -2.0]), None if bias is None else jnp.array(bias), 1e-5, 1.0)
    parts = jax.random.normal(jax.random.key(0), (4, 1, 2, 3))
    added = jnp.array([0.3, 0.0, 1.0])
    # the added bias as a part more has the share that is missing
    five = jnp.concatenate([parts, jnp.broadcast_to(added, (1, 1, 2, 3))])
    expected = norm(five.sum(0)) - (0 if bias is None else jnp.array([[bias]]))
    np.testing.assert_allclose(shares(norm, five).sum(0), expected, atol=1e-6)
    np.testing.assert_allclose(shares(norm, parts, added), shares(norm, five)[:4], atol=1e-6)
    np.testing.assert_array_equal(shares(None, parts), parts)


def test_experts_are_sources_of_what_they_add():
    """Experts that the router did not choose write nothing; one expert to one query is that query's input changed."""
    model, graph = family("mixture"), Graph.of(FAMILIES["mixture"])
    assert graph.sources[:10] == ("input", *(f"a0.h{h}" for h in range(4)), *(f"m0.e{i}" for i in range(4)), "a1.h0")
    capture = mi.jit(mi.capture(model, "mlp.gates", "mlp.expert_out"))
    clean, corrupt = (capture(x, TASK.mask)[1] for x in (TASK.clean, TASK.corrupt))
    written, other = (np.asarray(a["mlp.gates"][..., None] * a["mlp.expert_out"])[0, :, :, 2] for a in (clean, corrupt))
    sources = source_outputs(model, TASK.clean, TASK.mask)
    np.testing.assert_allclose(sources[graph.sources.index("m0.e2")], written, atol=TOLERANCE)
    assert (np.abs(np.asarray(sources[5:9])).max(-1) > 0).sum(0).tolist() == [[2] * 4] * 2
    edited = mi.intervene(model, mi.add("attn.q_in", jnp.asarray(other - written)[:, :, None, :], layer=1, head=3))
    expected = np.asarray(mi.jit(edited)(TASK.clean, TASK.mask))
    found = masked(model, jnp.asarray(graph.mask(["m0.e2->a1.h3<q>"]), jnp.float32))
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)
    assert np.abs(expected - mi.jit(model)(TASK.clean, TASK.mask)).max() > 1e-4


@pytest.mark.parametrize("name", ["gemma", "olmo2"])
def test_a_head_before_a_norm_writes_its_share_with_the_scale_of_its_run(name):
    model, graph = family(name), Graph.of(FAMILIES[name])
    capture, norm = mi.jit(mi.capture(model, "attn.head_out")), model.blocks.attn_post_norm
    assert norm is not None
    assert norm.weight is not None
    weight = np.asarray(norm.weight[0]) + norm.offset

    def share(tokens):
        heads = np.asarray(capture(tokens, TASK.mask)[1]["attn.head_out"][0])
        mean_square = np.square(heads.sum(2)).mean(-1, keepdims=True)
        return heads[:, :, 1] * weight / np.sqrt(mean_square + norm.eps)

    difference = jnp.asarray(share(TASK.corrupt) - share(TASK.clean))
    expected = mi.jit(mi.intervene(model, mi.add("mlp.in", difference, layer=1)))(TASK.clean, TASK.mask)
    found = masked(model, jnp.asarray(graph.mask(["a0.h1->m1"]), jnp.float32))
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)
    assert np.abs(found - mi.jit(model)(TASK.clean, TASK.mask)).max() > 1e-4


@pytest.mark.parametrize("name", ["gemma", "mixture"])
def test_the_derivative_in_the_edges_is_a_difference_quotient(name):
    model, graph = family(name), Graph.of(FAMILIES[name])
    rng = np.random.default_rng(0)
    direction = jnp.asarray(graph.edges * rng.normal(size=graph.edges.shape), jnp.float32)

    @jax.jit
    def metric(strength):
        rows = jnp.take_along_axis(masked(model, strength * direction), TASK.position[:, None, None], axis=1)
        return TASK.metric(rows).mean()

    step = 1e-2
    found = jax.grad(metric)(jnp.zeros(()))
    expected = (metric(jnp.asarray(step)) - metric(jnp.asarray(-step))) / (2 * step)
    np.testing.assert_allclose(found, expected, rtol=2e-2, atol=1e-3)
    assert abs(expected) > 1e-2


@pytest.mark.parametrize(
    ("name", "message"),
    [
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
