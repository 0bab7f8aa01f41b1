"""Runs of circuits against the masked forward, in every structure of models; and what they need not compute."""

import dataclasses
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mi_jax.circuits.ablation import ablation_values
from mi_jax.circuits.graph import Graph
from mi_jax.circuits.kept import _CHUNK, circuit_stream
from mi_jax.circuits.masked import masked_forward, masked_stream
from mi_jax.circuits.needed import needed
from mi_jax.circuits.runs import circuit_runs
from mi_jax.circuits.search.layers import depend_on_each_other
from mi_jax.circuits.shared import has_constant_rest, shared, shared_with_run, splits_by_run
from mi_jax.circuits.sources import source_outputs
from tests.circuits.tiny_task import ATTENTION_ONLY, CONFIG, task
from tests.models.tiny_families import FAMILIES, family, noisy

TOLERANCE = 2e-5
TASK = task()
NAMES = ("llama", "gpt2", "neox", "gptj", "gemma", "olmo2", "mixture")


def drawn(graph, share, n_pos=None, seed=0):
    shape = graph.edges.shape if n_pos is None else (*graph.edges.shape, n_pos)
    edges = graph.edges.reshape(graph.edges.shape + (1,) * (len(shape) - 2))
    return edges & (np.random.default_rng(seed).random(shape) < share)


@functools.cache
def deep(name, n_layers):
    """A family's structure in so many layers: two have none between the first and the last."""
    config = FAMILIES[name]
    return noisy(dataclasses.replace(config, n_layers=n_layers, windows=(config.windows * n_layers)[:n_layers]))


@eqx.filter_jit
def both(decoder, kept, edges, needs, patch, with_run):
    """The stream of a circuit, with what ablated sources write given or run, and that of the masked forward."""
    common = shared(decoder, TASK.clean, patch)
    if with_run:
        common, _ = shared_with_run(decoder, TASK.clean, TASK.corrupt, TASK.mask)
    stream = circuit_stream(decoder, common, kept, TASK.mask, TASK.position, needs)
    cut = edges - kept
    return stream, masked_stream(decoder, TASK.clean, cut, patch, TASK.mask, output_pos=TASK.position)


def checked(decoder, circuit, *, patch=None, skip=True, with_run=False):
    graph = Graph.of(decoder.config)
    dependent = depend_on_each_other(decoder.config)
    needs = needed(graph, circuit[None], from_input=patch is None, dependent=dependent)
    needs = jax.tree.map(lambda a: jnp.asarray(a[0]), needs)
    patch = source_outputs(decoder, TASK.corrupt, TASK.mask) if patch is None else patch
    edges = np.broadcast_to(graph.edges.reshape(graph.edges.shape + (1,) * (circuit.ndim - 2)), circuit.shape)
    kept, edges = (jnp.asarray(a, jnp.float32) for a in (circuit, edges))
    stream, expected = both(decoder, kept, edges, needs if skip else None, patch, with_run)
    np.testing.assert_allclose(stream, expected, atol=TOLERANCE * float(jnp.abs(expected).max()))
    return np.asarray(stream)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_masked_forward(name):
    decoder = deep(name, 3)
    graph = Graph.of(decoder.config)
    assert has_constant_rest(decoder)
    by_run = splits_by_run(decoder)
    assert by_run == (name not in ("gemma", "olmo2", "mixture"))
    found = [checked(decoder, drawn(graph, share), with_run=by_run) for share in (0.0, 0.03, 0.15, 0.6, 1.0)]
    # a patch that is no run of the model
    patch = 0.3 * jax.random.normal(jax.random.key(0), (graph.n_sources, *TASK.clean.shape, decoder.config.d_model))
    for share in (0.03, 0.3):
        checked(decoder, drawn(graph, share), patch=patch)
    assert np.abs(found[0] - found[-1]).max() > 0.05


@pytest.mark.parametrize("n_layers", [1, 2, 8])
def test_however_many_layers_there_are(n_layers):
    """One layer is the first and the last; eight have more between them than one loop goes through."""
    decoder = deep("gpt2", n_layers)
    assert n_layers < 8 or n_layers - 2 > _CHUNK
    for share in (0.02, 0.2, 1.0):
        checked(decoder, drawn(Graph.of(decoder.config), share, seed=n_layers), with_run=True)


@pytest.mark.parametrize("attention_only", [False, True], ids=["mlp", "attention-only"])
def test_token_edges_and_layers_without_mlp(attention_only):
    config = dataclasses.replace(ATTENTION_ONLY if attention_only else CONFIG, n_layers=3)
    decoder = noisy(config)
    graph = Graph.of(config)
    for circuit in (drawn(graph, 0.2, TASK.clean.shape[1]), drawn(graph, 0.2)):
        for skip in (True, False):
            checked(decoder, circuit, skip=skip, with_run=skip)


def test_only_what_lies_on_a_path_is_needed():
    graph = Graph(3, 2, 2, True)
    circuit = graph.mask(["input->a0.h0<v>", "a0.h0->m1", "m1->logits", "m0->a2.h1<q>", "input->m2"])
    whole = needed(graph, circuit[None], from_input=True, dependent=False).parts[0]
    np.testing.assert_array_equal(whole, [[True, False], [False, True], [False, False]])
    # a key that something useful reads needs what it is made of, whether the input reaches it or not
    circuit = graph.mask(["m0->a1.h0<k>", "a1.h0->logits"])
    np.testing.assert_array_equal(
        needed(graph, circuit[None], from_input=True, dependent=False).parts[0], np.zeros((3, 2), bool)
    )
    any_patch = needed(graph, circuit[None], from_input=False, dependent=False).parts[0]
    np.testing.assert_array_equal(any_patch, [[False, True], [True, False], [False, False]])
    assert needed(graph, graph.edges[None], from_input=True, dependent=False).parts.all()
    # of attention's readers, those that computed sources write to and that something needed is made of
    joined = graph.mask(["input->a0.h0<v>", "a0.h0->a1.h1<q>", "a0.h1->a1.h1<k>", "a1.h1->logits", "input->a2.h0<q>"])
    readers = needed(graph, joined[None], from_input=True, dependent=False).readers[0]
    assert [graph.readers[7 * layer + r] for layer, r in np.argwhere(readers)] == ["a0.h0<v>", "a1.h1<q>"]
    assert needed(graph, graph.edges[None], from_input=False, dependent=False).readers.all()
    token = np.zeros((1, *graph.edges.shape, 4), bool)
    token[0, :, :, 2] = circuit
    np.testing.assert_array_equal(needed(graph, token, from_input=False, dependent=False).parts[0], any_patch)
    # what the heads of a layer write depends on each other where a norm follows them: then all of them are needed
    both_heads = graph.mask(["input->a1.h0<v>", "input->a1.h1<v>", "a1.h0->logits"])
    found = [needed(graph, both_heads[None], from_input=True, dependent=d).readers[0, 1].sum() for d in (False, True)]
    assert found == [1, 2]
    # in blocks, where circuits are many
    many = np.stack([drawn(graph, 0.2, seed=seed) for seed in range(70)])
    together = needed(graph, many, from_input=True, dependent=False)
    for i in (0, 63, 64, 69):
        alone = needed(graph, many[i : i + 1], from_input=True, dependent=False)
        np.testing.assert_array_equal(together.parts[i], alone.parts[0])
        np.testing.assert_array_equal(together.readers[i], alone.readers[0])


@eqx.filter_jit
def masked_metrics(decoder, cuts, patch):
    def one(cut):
        return TASK.metric(masked_forward(decoder, TASK.clean, cut, patch, TASK.mask, output_pos=TASK.position))

    return jax.lax.map(one, cuts)


@pytest.mark.parametrize(
    ("name", "ablation", "batch_size"),
    [*((name, "resample", 1) for name in NAMES), ("olmo2", "mean", 1), ("neox", "mean", 1), ("gemma", "resample", 2)]
    + [("llama", "resample", 2)],
)
def test_circuit_runs_decide_right_what_to_compute(name, ablation, batch_size):
    decoder = deep(name, 3)
    graph = Graph.of(decoder.config)
    # a head that no kept path leads on from, beside one that does
    beside = graph.mask(["input->a1.h0<v>", "input->a1.h1<v>", "a1.h0->logits"])
    circuits = np.stack([beside, *(drawn(graph, share, seed=7) for share in (0.03, 0.1, 0.5))])
    runs = circuit_runs(decoder, TASK, circuits, ablation=ablation, batch_size=batch_size)
    cuts = jnp.asarray(graph.edges[None] & ~circuits, jnp.float32)
    expected = masked_metrics(decoder, cuts, ablation_values(decoder, TASK, ablation))
    np.testing.assert_allclose(runs.metric, expected, atol=TOLERANCE * max(1.0, float(jnp.abs(expected).max())))


def test_dtypes_of_the_model_and_of_given_values_may_differ():
    decoder = deep("neox", 3)
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
    decoder = deep("llama", 3)
    large = jax.tree.map(lambda x: x.astype(jnp.float16), decoder)
    norms = large.blocks.attn_norm.weight
    large = eqx.tree_at(lambda d: (d.embed, d.blocks.attn_norm.weight), large, (large.embed * 4000, norms * 20))
    runs = circuit_runs(large, TASK, drawn(Graph.of(decoder.config), 0.5)[None])
    assert np.isfinite(runs.metric).all()


def test_a_norm_after_a_bias_is_run_as_it_is():
    """What is left of the bias then depends on the run, and `shared` is not asked."""
    config = FAMILIES["gemma"]
    decoder = family("gemma")
    bias = 0.5 * jax.random.normal(jax.random.key(3), (config.n_layers, config.d_model))
    decoder = eqx.tree_at(lambda d: d.blocks.attn.o_bias, decoder, bias, is_leaf=lambda leaf: leaf is None)
    assert not has_constant_rest(decoder)
    circuits = np.stack([drawn(Graph.of(config), 0.5, seed=seed) for seed in range(2)])
    patch = source_outputs(decoder, TASK.corrupt, TASK.mask)
    runs = circuit_runs(decoder, TASK, circuits)
    for i, circuit in enumerate(circuits):
        cut = jnp.asarray(Graph.of(config).edges & ~circuit, jnp.float32)
        logits = masked_forward(decoder, TASK.clean, cut, patch, TASK.mask, output_pos=TASK.position)
        np.testing.assert_allclose(runs.metric[i], TASK.metric(logits), atol=TOLERANCE)
