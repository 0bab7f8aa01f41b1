"""The masked-edge forward: its two ends, and single edges against the same edit made with nested interventions."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mi_jax as mi
from mi_jax.circuits import Graph, masked_forward, source_outputs
from mi_jax.circuits.runs.masked import chunks
from mi_jax.core.errors import InputError
from mi_jax.models import init_decoder
from tests.circuits.tiny_task import CONFIG, model, task

TOLERANCE = 1e-5
TASK = task()
REAL = np.asarray(TASK.mask)


@eqx.filter_jit
def _masked(decoder, edges):
    patch = source_outputs(decoder, TASK.corrupt, TASK.mask)
    return masked_forward(decoder, TASK.clean, edges, patch, TASK.mask)


def masked(decoder, mask):
    return np.asarray(_masked(decoder, jnp.asarray(mask, jnp.float32)))


@pytest.mark.parametrize("attention_only", [False, True])
def test_no_edges_is_the_clean_run_and_all_edges_the_corrupt_one(attention_only):
    decoder = model(attention_only)
    edges = Graph.of(decoder.config).edges
    clean, corrupt = (np.asarray(mi.jit(decoder)(t, TASK.mask)) for t in (TASK.clean, TASK.corrupt))
    np.testing.assert_allclose(masked(decoder, 0 * edges), clean, atol=TOLERANCE)
    np.testing.assert_allclose(masked(decoder, edges), corrupt, atol=TOLERANCE)
    assert np.abs(clean - corrupt)[REAL].max() > 0.1


def test_sources_add_up_to_the_stream():
    decoder = model()
    sources = mi.jit(source_outputs)(decoder, TASK.clean, TASK.mask)
    _, acts = mi.jit(mi.capture(decoder, "resid_post", "embed"))(TASK.clean, TASK.mask)
    graph = Graph.of(decoder.config)
    np.testing.assert_allclose(sources[0], acts["embed"], atol=TOLERANCE)
    for layer in range(2):
        upto = 1 + (layer + 1) * graph.layer_sources
        np.testing.assert_allclose(sources[:upto].sum(0), acts["resid_post"][layer], atol=TOLERANCE)


# where a source is written, and where a reader reads, as sites of the decoder
SOURCES = {
    "input": lambda a: a["embed"],
    "a0.h1": lambda a: a["attn.head_out"][0, :, :, 1],
    "m0": lambda a: a["mlp_out"][0],
    "a1.h0": lambda a: a["attn.head_out"][1, :, :, 0],
}
READERS = {
    "a1.h1<q>": lambda d: mi.add("attn.q_in", d[:, :, None, :], layer=1, head=1),
    "a1.h0<k>": lambda d: mi.add("attn.k_in", d[:, :, None, :], layer=1, head=0),
    "a0.h0<v>": lambda d: mi.add("attn.v_in", d[:, :, None, :], layer=0, head=0),
    "a1.h0<v>": lambda d: mi.add("attn.v_in", d[:, :, None, :], layer=1, head=0),
    "m0": lambda d: mi.add("mlp.in", d, layer=0),
    "m1": lambda d: mi.add("mlp.in", d, layer=1),
    "logits": lambda d: mi.add("resid_post", d, layer=1),
}
EDGES = (
    "input->a1.h1<q>",
    "m0->a1.h1<q>",
    "a0.h1->a1.h0<k>",
    "input->a0.h0<v>",
    "m0->a1.h0<v>",
    "a0.h1->m0",
    "a1.h0->m1",
    "input->logits",
    "a1.h0->logits",
)


@pytest.fixture(scope="module")
def runs():
    capture = mi.jit(mi.capture(model(), "embed", "attn.head_out", "mlp_out"))
    return capture(TASK.clean, TASK.mask)[1], capture(TASK.corrupt, TASK.mask)[1]


@pytest.mark.parametrize("edge", EDGES)
def test_one_edge_is_the_readers_own_input_changed(runs, edge):
    """The edited run upstream of one edge is the clean run, so the difference of the two plain runs is what it adds."""
    clean, corrupt = runs
    source, reader = edge.split("->")
    difference = SOURCES[source](corrupt) - SOURCES[source](clean)
    expected = mi.jit(mi.intervene(model(), READERS[reader](difference)))(TASK.clean, TASK.mask)
    found = masked(model(), Graph.of(model().config).mask([edge]))
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)
    assert np.abs(found - masked(model(), np.zeros((7, 11))))[REAL].max() > 1e-4


def test_two_edges_in_a_row_use_what_the_edited_run_wrote(runs):
    """With input->a0.h0<v> and a0.h0->logits, the logits read the corrupt head, whatever the clean one now writes."""
    graph = Graph.of(model().config)
    both = masked(model(), graph.mask(["input->a0.h0<v>", "a0.h0->logits"]))
    clean, corrupt = runs
    value = mi.add("attn.v_in", (corrupt["embed"] - clean["embed"])[:, :, None, :], layer=0, head=0)
    logits, edited = mi.jit(mi.capture(mi.intervene(model(), value), "attn.head_out"))(TASK.clean, TASK.mask)
    direct = corrupt["attn.head_out"][0, :, :, 0] - edited["attn.head_out"][0, :, :, 0]
    expected = mi.jit(mi.intervene(model(), value, mi.add("resid_post", direct, layer=1)))(TASK.clean, TASK.mask)
    np.testing.assert_allclose(both, expected, atol=TOLERANCE)
    assert np.abs(np.asarray(logits) - both)[REAL].max() > 1e-4


def test_output_pos_is_the_same_rows():
    patch = source_outputs(model(), TASK.corrupt, TASK.mask)
    edges = jnp.asarray(Graph.of(model().config).mask(["m0->logits"]), jnp.float32)
    some = masked_forward(model(), TASK.clean, edges, patch, TASK.mask, output_pos=TASK.position)
    whole = masked(model(), edges)
    np.testing.assert_allclose(some[:, 0], [whole[0, 3], whole[1, 2]], atol=TOLERANCE)


def test_edges_at_one_position_change_the_reader_there():
    """A token edge into the MLP is the MLP's input changed at that position; at all positions, the plain edge."""
    graph = Graph.of(model().config)
    patch = source_outputs(model(), TASK.corrupt, TASK.mask)
    edges = np.zeros((*graph.edges.shape, 4), np.float32)
    edges[(*graph.index("input->m1"), 1)] = 1
    run = eqx.filter_jit(lambda e, at=None: masked_forward(model(), TASK.clean, e, patch, TASK.mask, output_pos=at))
    difference = patch[0] - source_outputs(model(), TASK.clean, TASK.mask)[0]
    added = mi.add("mlp.in", difference, layer=1, pos=1)
    expected = mi.jit(mi.intervene(model(), added))(TASK.clean, TASK.mask)
    np.testing.assert_allclose(run(jnp.asarray(edges)), expected, atol=TOLERANCE)
    rng = np.random.default_rng(0)
    some = (rng.random(graph.edges.shape) < 0.5) & graph.edges
    everywhere = jnp.asarray(np.repeat(some[:, :, None], 4, 2), jnp.float32)
    whole = run(everywhere)
    np.testing.assert_allclose(whole, masked(model(), some), atol=TOLERANCE)
    np.testing.assert_allclose(run(everywhere, TASK.position)[:, 0], [whole[0, 3], whole[1, 2]], atol=TOLERANCE)
    into_logits = jnp.zeros_like(everywhere).at[graph.index("m0->logits")].set(jnp.array([0.0, 0.0, 1.0, 0.0]))
    at_answer = run(into_logits, TASK.position)[:, 0]
    clean, changed = masked(model(), 0 * graph.edges), masked(model(), graph.mask(["m0->logits"]))
    np.testing.assert_allclose(at_answer, [clean[0, 3], changed[1, 2]], atol=TOLERANCE)


def test_chunks_and_remat_change_neither_the_logits_nor_the_gradient():
    config = dataclasses.replace(CONFIG, n_layers=3)
    decoder = jax.tree.map(lambda x: 1.5 * x, init_decoder(config, key=jax.random.key(1)))
    graph = Graph.of(config)
    assert chunks(3) == [range(3)]
    assert chunks(12) == [range(4), range(4, 8), range(8, 12)]
    patch = source_outputs(decoder, TASK.corrupt, TASK.mask)
    edges = jnp.asarray(np.random.default_rng(0).random(graph.edges.shape) * graph.edges, jnp.float32)

    def gradient(**options):
        def metric(edges, patch):
            logits = masked_forward(decoder, TASK.clean, edges, patch, TASK.mask, output_pos=TASK.position, **options)
            return TASK.metric(logits).sum()

        return jax.jit(jax.value_and_grad(metric, argnums=(0, 1)))(edges, patch)

    one, *others = (gradient(), gradient(chunk=2, remat=False))
    for other in others:
        for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(x, y, atol=2e-5)
    assert float(jnp.abs(one[1][0]).max()) > 1e-2


def test_shapes_that_do_not_fit_are_named():
    patch = source_outputs(model(), TASK.corrupt, TASK.mask)
    with pytest.raises(
        InputError, match=r"\(7, 11\) \[source reader\], or \(7, 11, 4\) .* got edges of shape \(7, 10\)"
    ):
        masked_forward(model(), TASK.clean, jnp.zeros((7, 10)), patch)
    with pytest.raises(InputError, match=r"and the patch has \(7, 2, 4\) .* and a patch of shape \(6, 2, 4, 8\)"):
        masked_forward(model(), TASK.clean, jnp.zeros((6, 11)), patch[:6])
