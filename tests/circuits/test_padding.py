"""Every method of circuits is unchanged by more columns of padding and by other tokens in the padding."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mi_jax.circuits import METHODS, Graph, ablation_values, edge_scores, exact_edges, faithfulness
from mi_jax.circuits.metrics import minimality
from mi_jax.circuits.runs.neurons import neuron_faithfulness
from mi_jax.circuits.scores.neurons import neuron_scores, random_neurons
from mi_jax.circuits.scores.nodes import node_scores
from mi_jax.circuits.scrubbing import Hypothesis, Interpretation, Read, causal_scrub
from mi_jax.circuits.search import acdc, learn_mask
from mi_jax.circuits.search.learned import MaskTraining
from tests.circuits.tiny_task import task
from tests.models.tiny_families import FAMILIES, family

# relative to the largest number; the order of sums changes with the shape
TOLERANCE = 5e-5
TASK, KEY = task(), jax.random.key(0)
# learned positions and layer norms, rotary positions and RMS norms, norms of outputs, experts
NAMES = ("gpt2", "llama", "gemma", "mixture")
ABLATIONS = ("resample", "zero", "mean", "mean-positional", "optimal")


def padded(columns=0, clean=0, corrupt=0):
    """The task with more columns, and with tokens at padding moved on by so many."""

    def tokens(x, shift):
        moved = jnp.where(TASK.mask, x, (x + shift) % 13)
        return jnp.pad(moved, ((0, 0), (0, columns)), constant_values=shift)

    mask = jnp.pad(TASK.mask, ((0, 0), (0, columns)))
    return dataclasses.replace(TASK, clean=tokens(TASK.clean, clean), corrupt=tokens(TASK.corrupt, corrupt), mask=mask)


def circuit(name):
    edges = Graph.of(FAMILIES[name]).edges
    return edges & (np.random.default_rng(0).random(edges.shape) < 0.7)


def scrubbed(name, pairs):
    everything = Interpretation("all", Graph.of(FAMILIES[name]).sources, np.arange(2))
    return causal_scrub(family(name), pairs, Hypothesis((Read(everything),)), key=KEY, samples=1, null_samples=2).metric


def neurons(name, pairs):
    like = neuron_scores(family(name), pairs, method="exact")
    chosen = [random_neurons(like, 20, seed=0)]
    runs = [neuron_faithfulness(family(name), pairs, chosen, ablation=a) for a in ("resample", "mean")]
    return np.concatenate([like.flat, *runs])


def learned(name, pairs):
    options = {"n_edges": 20, "key": KEY, "config": MaskTraining(steps=3), "ablation": "mean"}
    return learn_mask(family(name), pairs, **options).losses


def edges_by(method, ablation, name, pairs):
    return edge_scores(family(name), pairs, method=method, steps=2, ablation=ablation)


CASES = {
    **{
        f"{m}/{a}": functools.partial(edges_by, m, a)
        for m in METHODS
        for a in ("resample", "mean")
        if m not in ("eap-ig-inputs", "exact")
    },
    **{f"eap/{a}": functools.partial(edges_by, "eap", a) for a in ABLATIONS},
    **{f"faithfulness/{a}": lambda n, t, a=a: faithfulness(family(n), t, [circuit(n)], ablation=a) for a in ABLATIONS},
    "exact": lambda n, t: exact_edges(family(n), t),
    "exact in a circuit": lambda n, t: exact_edges(family(n), t, base=circuit(n), ablation="mean"),
    "nodes": lambda n, t: node_scores(family(n), t, ablation="mean"),
    "neurons": neurons,
    "learned": learned,
    "acdc": lambda n, t: acdc(family(n), t, 1e-3, ablation="mean").mask,
    "minimality": lambda n, t: minimality(family(n), t, circuit(n), knockouts=1, max_parts=3).alone,
    "scrubbing": scrubbed,
}
QUICK = (("eap-gp/mean", "gpt2"),)
OTHERS = {"columns": {"columns": 3}, "clean tokens": {"clean": 5}, "corrupt tokens": {"corrupt": 4}}


def chosen(case, name):
    return pytest.param(case, name, marks=() if (case, name) in QUICK else pytest.mark.slow)


@pytest.mark.parametrize(
    ("case", "name"),
    # a mixture has no neurons
    [chosen(c, n) for c in CASES for n in NAMES if c != "neurons" or not FAMILIES[n].n_experts],
)
def test_padding_changes_nothing(case, name):
    expected = np.asarray(CASES[case](name, TASK))
    scale = np.abs(expected).max()
    assert scale > 0
    for how, change in OTHERS.items():
        found = np.asarray(CASES[case](name, padded(**change)))
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * scale, err_msg=how)


def test_values_of_real_tokens_do_not_depend_on_padding():
    model, real = family("gpt2"), np.asarray(TASK.mask)
    # optimal ones go through the whole fit; the slow cases have them
    for ablation in ABLATIONS[:-1]:
        expected = np.asarray(ablation_values(model, TASK, ablation))[:, real]
        found = np.asarray(ablation_values(model, padded(3, 5, 4), ablation))[:, :, :4][:, real]
        np.testing.assert_allclose(found, expected, atol=1e-4, err_msg=ablation)
