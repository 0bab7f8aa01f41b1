"""Causal scrubbing against trivial hypotheses, and against patched runs of the model put together by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from mi_jax.circuits.graph import Graph
from mi_jax.circuits.runs.masked import source_outputs
from mi_jax.circuits.scrubbing import Hypothesis, Interpretation, Read, causal_scrub
from mi_jax.circuits.scrubbing.hypothesis import agreeing_groups, treeify
from mi_jax.circuits.scrubbing.sampling import agreeing_rows, draw_rows
from mi_jax.circuits.scrubbing.scrub import _scrubbed
from mi_jax.core.edits import Patch
from mi_jax.core.errors import InputError
from mi_jax.core.index import Index
from tests.circuits.tiny_task import model
from tests.circuits.wide_task import N, task
from tests.models.tiny_families import family

TOLERANCE = 1e-5
KEY = jax.random.key(0)
GRAPH = Graph.of(model().config)
TASK = task()


def by_layer(layer):
    return tuple(s for s in GRAPH.sources if s[1:].startswith(str(layer)))


def test_a_hypothesis_that_allows_nothing_to_change_recovers_all():
    """Every prompt agrees with itself only, and every edge is spoken for, through one, two and three runs."""
    alone = np.arange(N)
    first = Interpretation("input and heads", ("input", *by_layer(0)[:2]), alone)
    mlp = Interpretation("layer 0 MLP", ("m0",), alone, (Read(first),))
    heads = Interpretation("layer 1 heads", by_layer(1)[:2], alone, (Read(first), Read(mlp)))
    late = Interpretation("layer 1 MLP", ("m1",), alone, (Read(first), Read(mlp), Read(heads)))
    hypothesis = Hypothesis((Read(first), Read(mlp), Read(heads), Read(late)))
    found = causal_scrub(model(), TASK, hypothesis, key=KEY, samples=2, null_samples=3)
    np.testing.assert_allclose(found.metric, found.model_metric, atol=TOLERANCE)
    assert found.recovered.value == pytest.approx(1, abs=TOLERANCE)
    assert found.recovered.ci_low == pytest.approx(1, abs=1e-3)
    # values of all prompts differ, so a shuffle of them still allows nothing to change
    assert found.null.smallest == pytest.approx(1, abs=TOLERANCE)
    # each of the four reads all before it, so the tree doubles with each
    assert found.runs == 2**4


@pytest.mark.parametrize("name", ["gptj", "gemma", "mixture"])
def test_other_families(name):
    """Parallel blocks, norms of what is written, and experts: nothing may change, so all is recovered."""
    other, alone = family(name), np.arange(N)
    graph = Graph.of(other.config)
    last = graph.sources[-graph.layer_sources :]
    rest = Interpretation("before", graph.sources[: -graph.layer_sources], alone)
    heads = Interpretation("heads", last[: graph.n_heads], alone, (Read(rest),))
    below = (Read(rest),) if graph.parallel else (Read(rest), Read(heads))
    mlp = Interpretation("mlp", last[graph.n_heads :], alone, below)
    hypothesis = Hypothesis((Read(rest), Read(heads), Read(mlp)))
    found = causal_scrub(other, TASK, hypothesis, key=KEY, samples=1, null_samples=1)
    assert found.recovered.value == pytest.approx(1, abs=1e-4)
    np.testing.assert_allclose(found.metric, found.model_metric, atol=1e-4)


def test_samples_are_patched_runs_put_together_by_hand():
    """The logits read m1, which reads a0.h1, which reads the input by its queries: all else comes edge by edge."""
    token = Interpretation("token", ("input",), np.array([0, 0, 1, 1, 2, 2]))
    head = Interpretation("head", ("a0.h1",), np.array([0, 0, 0, 1, 1, 1]), (Read(token, by=("q",)),))
    mlp = Interpretation("mlp", ("m1",), np.zeros(N, int), (Read(head, by=("mlp",)),))
    nodes, interpretations = treeify(Hypothesis((Read(mlp),)), GRAPH)
    assert [n.interpretation for n in nodes] == [-1, 0, 1, 2]
    groups = [agreeing_groups(i, TASK) for i in interpretations]
    size = {"n_prompts": N, "n_sources": GRAPH.n_sources, "together": False, "permuted": False, "seed": 2}
    rows, others = draw_rows(nodes, groups, samples=2, **size)
    found, full, random = _scrubbed(model(), TASK, nodes, jnp.asarray(rows), jnp.asarray(others))

    sources = np.asarray(source_outputs(model(), TASK.clean, TASK.mask))
    streams = {
        site: np.asarray(model()(TASK.clean, TASK.mask, capture=(site,), output=False)[1][site])
        for site in ("resid_pre", "resid_mid", "resid_post")
    }

    def read(stream, reader, t, sample, important):
        """The stream of the node's prompt, with the value of every source exchanged."""
        x = stream[rows[sample, t]].copy()
        for s in np.flatnonzero(GRAPH.edges[:, GRAPH.readers.index(reader)]):
            given = sources[s][others[sample, t, s]]
            given = important.get(GRAPH.sources[s], given)
            x += given - sources[s][rows[sample, t]]
        return jnp.asarray(x)

    def run(t, sample, edits, site):
        mine = rows[sample, t]
        taps = {e.site: (e,) for e in edits}
        out = model()(TASK.clean[mine], TASK.mask[mine], taps=taps, capture=(site,), output=False)
        return np.asarray(out[1][site])

    for sample in range(2):
        token_value = sources[0][rows[sample, 3]]
        q = read(streams["resid_pre"][0], "a0.h1<q>", 2, sample, {"input": token_value})
        k = read(streams["resid_pre"][0], "a0.h0<k>", 2, sample, {})
        v = read(streams["resid_pre"][0], "a0.h0<v>", 2, sample, {})
        first = jnp.asarray(0, jnp.int32)
        edits = [
            Patch("attn.q_in", Index(layer=first, head=jnp.asarray(1, jnp.int32)), q[:, :, None]),
            Patch("attn.k_in", Index(layer=first), k[:, :, None]),
            Patch("attn.v_in", Index(layer=first), v[:, :, None]),
        ]
        head_value = run(2, sample, edits, "attn.head_out")[0][:, :, 1]
        x = read(streams["resid_mid"][1], "m1", 1, sample, {"a0.h1": head_value})
        mlp_value = run(1, sample, [Patch("mlp.in", Index(layer=jnp.asarray(1, jnp.int32)), x)], "mlp_out")[1]
        x = read(streams["resid_post"][1], "logits", 0, sample, {"m1": mlp_value})
        taps = {"resid_post": (Patch("resid_post", Index(layer=jnp.asarray(1, jnp.int32)), x),)}
        logits = model()(TASK.clean, TASK.mask, taps=taps, output_pos=TASK.position)
        np.testing.assert_allclose(found[sample], TASK.metric(logits), atol=1e-4)

    logits = model()(TASK.clean, TASK.mask, output_pos=TASK.position)
    np.testing.assert_allclose(full, TASK.metric(logits), atol=TOLERANCE)
    pairs = np.stack([np.asarray(TASK.metric(jnp.repeat(logits[j : j + 1], N, 0))) for j in range(N)])
    np.testing.assert_allclose(random, pairs.mean(0), atol=TOLERANCE)


def test_rows_agree_and_are_uniform_among_those_that_do():
    groups, rows = np.array([0, 1, 0, 1, 0, 2]), np.arange(6)
    rng = np.random.default_rng(0)
    drawn = np.stack([agreeing_rows(groups, rows, rng) for _ in range(3000)])
    assert (groups[drawn] == groups[None, :]).all()
    for row in range(5):
        counts = np.bincount(drawn[:, row], minlength=6)[groups == groups[row]]
        assert scipy.stats.chisquare(counts).pvalue > 1e-3


def test_shuffled_groups_keep_their_sizes_only():
    nodes, _ = treeify(Hypothesis((Read(Interpretation("x", ("m0",), [0, 0, 1, 1, 2, 2])),)), GRAPH)
    size = {"n_prompts": N, "n_sources": 3, "together": True, "seed": 0, "samples": 400}
    groups = [np.array([0, 0, 1, 1, 2, 2])]
    kept, others = draw_rows(nodes, groups, permuted=False, **size)
    assert (groups[0][kept[:, 1]] == groups[0][None]).all()
    assert (others == others[:, :, :1]).all()
    null, _ = draw_rows(nodes, groups, permuted=True, **size)
    # in a group of two a prompt meets itself half the time, otherwise any other
    assert (null[:, 1] == np.arange(N)[None]).mean() == pytest.approx(0.5, abs=0.05)
    assert (groups[0][null[:, 1]] == groups[0][None]).mean() == pytest.approx(0.5 + 0.5 / 5, abs=0.05)


@pytest.mark.parametrize(
    "values", [[0, 1, 0, 1, 2, 2], ["a", "b", "a", "b", "c", "c"], [(0, 1), (1, 1), (0, 1), (1, 1), (2, 0), (2, 0)]]
)
def test_groups_of_any_values(values):
    np.testing.assert_array_equal(agreeing_groups(Interpretation("x", ("m0",), values), TASK), [0, 1, 0, 1, 2, 2])
    node = Interpretation("x", ("m0",), lambda task: task.answer)
    groups = agreeing_groups(node, TASK)
    same = np.asarray(TASK.answer)
    assert ((groups[:, None] == groups[None]) == (same[:, None] == same[None])).all()


def test_bad_hypotheses_are_named():
    x = Interpretation("x", ("m0",), np.arange(N))
    bad = [
        (Hypothesis(()), "says nothing"),
        (Hypothesis((Read(Interpretation("y", ("a9.h0",), np.arange(N))),)), "'y': no source 'a9.h0'"),
        (Hypothesis((Read(Interpretation("y", (), np.arange(N))),)), "'y' names no source"),
        (Hypothesis((Read(x, by=("o",)),)), "'logits' reads 'x' by 'o'"),
        (Hypothesis((Read(x, by=("q",)),)), "'logits' cannot read 'x' by q"),
        (Hypothesis((Read(x), Read(x))), "two reads of 'logits' claim the edge m0->logits"),
        (Hypothesis((Read(Interpretation("y", ("m0",), [1, 2])),)), "'y' has 2 values; the task has 6 prompts"),
    ]
    for hypothesis, message in bad:
        with pytest.raises(InputError, match=message):
            causal_scrub(model(), TASK, hypothesis, key=KEY)
    with pytest.raises(InputError, match="'independent' or 'together', got 'both'"):
        causal_scrub(model(), TASK, Hypothesis((Read(x),)), key=KEY, unimportant="both")
