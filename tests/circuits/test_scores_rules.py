"""Scores that depart from the derivative: relevance patching, the QK fix and GradDrop, each against its definition."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mi_jax.circuits.graph import Graph
from mi_jax.circuits.runs.sources import source_outputs
from mi_jax.circuits.scores import edge_scores
from mi_jax.core.atp import grad_drop
from mi_jax.core.edits import Add
from mi_jax.core.errors import InputError
from mi_jax.core.index import Index
from mi_jax.models import init_decoder
from tests.circuits.tiny_task import CONFIG, model, task

TASK = task()
GRAPH = Graph.of(CONFIG)
MODEL = model()
LAYERED = ("resid_pre", "resid_mid", "attn.pattern", "mlp.pre")


DIFFERENCES = np.subtract(*(source_outputs(MODEL, tokens, TASK.mask) for tokens in (TASK.corrupt, TASK.clean)))


def frozen_loss(weights):
    """Minus the metric of a network whose norms' scales, patterns and slopes are numbers of the clean run.

    Every reader reads its own stream; a gated product is half of each factor times the other's number.
    """
    decoder, eps = MODEL, CONFIG.norm_eps
    b = decoder.blocks
    _, clean = decoder(TASK.clean, TASK.mask, capture=LAYERED)
    sources = list(source_outputs(decoder, TASK.clean, TASK.mask))
    change = list(jnp.asarray(DIFFERENCES))
    now = [sources[0]]

    def reads(reader, n_before):
        shifts = [weights[s, reader] * change[s] for s in range(n_before)]
        return sum(now[1:n_before], now[0]) + sum(shifts[1:], shifts[0])

    def scaled(stream, at, weight):
        scale = 1 / jnp.sqrt(jnp.square(at).mean(-1, keepdims=True) + eps)
        return stream * scale * weight[None, None]

    for layer in range(2):
        base, before = layer * GRAPH.layer_readers, 1 + layer * GRAPH.layer_sources
        at = clean["resid_pre"][layer]
        # one key/value head, shared by the two heads
        h = scaled(reads(base + 3, before), at, b.attn_norm.weight[layer])
        v = jnp.einsum("bpd,dh->bph", h, b.attn.v[layer, :, 0])
        for head in range(2):
            z = jnp.einsum("bqp,bph->bqh", clean["attn.pattern"][layer, :, head], v)
            now.append(jnp.einsum("bqh,hd->bqd", z, b.attn.o[layer, head]))
        h = scaled(reads(base + 4, before + 2), clean["resid_mid"][layer], b.mlp_norm.weight[layer])
        pre, up = h @ b.mlp.gate[layer], h @ b.mlp.up[layer]
        value = clean["mlp.pre"][layer]
        clean_h = scaled(clean["resid_mid"][layer], clean["resid_mid"][layer], b.mlp_norm.weight[layer])
        gate, clean_up = jax.nn.sigmoid(value), clean_h @ b.mlp.up[layer]
        post = 0.5 * gate * pre * clean_up + 0.5 * gate * value * up
        now.append(post @ b.mlp.down[layer])
    last = sum(sources[1:], sources[0])
    x = scaled(reads(GRAPH.n_readers - 1, GRAPH.n_sources), last, decoder.final_norm.weight)
    x = jnp.take_along_axis(x, TASK.position[:, None, None], axis=1)
    return -TASK.metric(x @ decoder.unembedding.T).mean()


def test_relevance_patching_is_the_derivative_with_its_constants_frozen():
    none = jnp.zeros(GRAPH.edges.shape)
    run = jax.jit(jax.value_and_grad(frozen_loss))
    value, gradient = run(none)
    decoder = MODEL
    plain = TASK.metric(decoder(TASK.clean, TASK.mask, output_pos=TASK.position)).mean()
    # the rules leave the values as they are
    np.testing.assert_allclose(value, -plain, rtol=1e-4)
    scores = edge_scores(decoder, TASK, method="relp")
    np.testing.assert_allclose(scores, np.where(GRAPH.edges, gradient, 0), atol=1e-5, rtol=1e-3)
    assert np.abs(scores).max() > 0.05
    queries_and_keys = [i for i, name in enumerate(GRAPH.readers) if name.endswith(("<q>", "<k>"))]
    assert (scores[:, queries_and_keys] == 0).all()


@eqx.filter_jit
def pattern_gradient():
    """Of minus the metric, with respect to every pattern of the clean run."""
    shape = (2, *TASK.clean.shape[:1], 2, 4, 4)

    def loss(added):
        taps = {"attn.pattern": (Add("attn.pattern", Index(), added),)}
        return -TASK.metric(MODEL(TASK.clean, TASK.mask, taps=taps, output_pos=TASK.position)).mean()

    return jax.grad(loss)(jnp.zeros(shape))


@eqx.filter_jit
def pattern(name, added):
    """Patterns of layer 1 when its queries or keys read something else."""
    value = jnp.zeros((2, *added.shape)).at[1].set(added)
    taps = {f"attn.{name}_in": (Add(f"attn.{name}_in", Index(), value),)}
    return MODEL(TASK.clean, TASK.mask, taps=taps, capture=("attn.pattern",), output=False)[1]["attn.pattern"][1]


@pytest.mark.parametrize("letter", ["q", "k"])
def test_the_qk_fix_is_the_exact_change_of_the_pattern(letter):
    scores = edge_scores(MODEL, TASK, method="atp+qk")
    gradient = pattern_gradient()[1]
    n_heads = 2 if letter == "q" else 1
    plain = pattern(letter, jnp.zeros((2, 4, n_heads, 8)))
    for source in range(4):
        for head in range(n_heads):
            expected = 0.0
            for position in range(4):
                row = jnp.asarray(DIFFERENCES[source][:, position])
                added = jnp.zeros((2, 4, n_heads, 8)).at[:, position, head].set(row)
                expected += ((pattern(letter, added) - plain) * gradient).sum()
            at = GRAPH.index(f"{GRAPH.sources[source]}->a1.h{head}<{letter}>")
            np.testing.assert_allclose(scores[at], expected, atol=1e-5, rtol=1e-3)


def test_other_edges_of_the_qk_fix_are_those_of_eap():
    fixed, eap = (edge_scores(MODEL, TASK, method=method) for method in ("atp+qk", "eap"))
    others = [i for i, name in enumerate(GRAPH.readers) if not name.endswith(("<q>", "<k>"))]
    np.testing.assert_allclose(fixed[:, others], eap[:, others], atol=1e-6)


def test_grad_drop_averages_absolute_scores_over_layers_without_gradient():
    shape = (2, 2, 4, 1, 8)

    def of_values(gates):
        def metric(added):
            taps = gates | {"attn.v_in": (Add("attn.v_in", Index(), added),)}
            return TASK.metric(MODEL(TASK.clean, TASK.mask, taps=taps, output_pos=TASK.position)).sum()

        gradient = jax.grad(metric)(jnp.zeros(shape))[:, :, :, 0]
        return jnp.einsum("sbpd,lbpd->bsl", jnp.asarray(DIFFERENCES), gradient)

    expected = np.asarray(jax.jit(lambda: grad_drop(of_values, MODEL.site_table))()).mean(0)
    scores = edge_scores(MODEL, TASK, method="atp*")
    for layer in range(2):
        reader = GRAPH.readers.index(f"a{layer}.h0<v>")
        before = 1 + layer * GRAPH.layer_sources
        np.testing.assert_allclose(scores[:before, reader], expected[:before, layer], atol=1e-5, rtol=1e-3)
    assert (scores >= 0).all()


def test_grad_drop_needs_two_layers():
    one = init_decoder(dataclasses.replace(CONFIG, n_layers=1), key=jax.random.key(0))
    with pytest.raises(InputError, match=r"'atp\*' drops one layer at a time and tiny has one: use 'atp\+qk'"):
        edge_scores(one, TASK, method="atp*")
