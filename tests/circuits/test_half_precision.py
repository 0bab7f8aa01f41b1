"""Every public method of circuits in half precision, beside float32 on the very same numbers.

The bar is what the dtype can give: weights are rounded to it, so a result may be off from float32 about as far as
float32 itself moves when its weights are rounded. Accumulators in half precision miss that by far, or give zeros.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from mi_jax.circuits import METHODS, Graph, ablation_values, edge_scores, exact_edges, faithfulness, kl_divergence
from mi_jax.circuits.das import Triples, fit_das
from mi_jax.circuits.metrics import circuit_metrics, completeness, hypothesis_tests, minimality
from mi_jax.circuits.runs.neurons import neuron_faithfulness
from mi_jax.circuits.scores.neurons import neuron_scores, random_neurons
from mi_jax.circuits.scores.nodes import node_scores
from mi_jax.circuits.scrubbing import Hypothesis, Interpretation, Read, causal_scrub
from mi_jax.circuits.search import acdc, learn_mask
from mi_jax.circuits.search.learned import MASK_METHODS, MaskTraining
from mi_jax.circuits.search.objective import OBJECTIVES, loss_of
from tests.circuits.wide_task import N, task
from tests.models.tiny_families import FAMILIES, family

TASK, KEY = task(), jax.random.key(0)
GRAPH = Graph.of(FAMILIES["llama"])
CIRCUIT = GRAPH.edges & (np.random.default_rng(0).random(GRAPH.edges.shape) < 0.7)
# rounding of the weights is one of several roundings that a run goes through
ROUNDINGS = 6
SHORT = MaskTraining(steps=4)


def edges_by(method):
    return lambda model: edge_scores(model, TASK, method=method, steps=2)[GRAPH.edges]


def learned(method):
    return lambda model: learn_mask(model, TASK, method=method, n_edges=20, key=KEY, config=SHORT).losses


def faithfulness_under(ablation):
    def found(model):
        # so that clean and ablated metric are far enough apart
        values = ablation_values(model, TASK, ablation)
        assert values.dtype == model.unembedding.dtype
        return faithfulness(model, TASK, [CIRCUIT], ablation=values)

    return found


def neurons(model):
    like = neuron_scores(model, TASK)
    return neuron_faithfulness(model, TASK, [random_neurons(like, 30, seed=0)], ablation="mean")


def scrubbed(model):
    everything = Interpretation("all", GRAPH.sources, np.arange(N) % 2)
    return causal_scrub(model, TASK, Hypothesis((Read(everything),)), key=KEY, samples=2, null_samples=2).metric


def hypotheses(model):
    found = hypothesis_tests(model, TASK, CIRCUIT, key=KEY, random=4, max_edges=4, permutations=20)
    return [found.non_equivalence.statistic, found.independence.statistic]


def aligned(model):
    triples = Triples(TASK.clean, TASK.corrupt, TASK.answer, position=TASK.position)
    options = {"layers": (0,), "positions": (3,), "k": 2, "steps": 3, "seeds": 1, "controls": ()}
    return fit_das(model, triples, **options, key=KEY).losses


# those that run by default; the others are slow, for each compiles two programs
QUICK = (("eap", jnp.bfloat16), ("atp+qk", jnp.float16), ("exact", jnp.bfloat16), ("ugs", jnp.bfloat16))
CASES = {
    **{name: edges_by(name) for name in METHODS if name != "eap-ig-inputs"},
    "exact in a circuit": lambda model: exact_edges(model, TASK, base=CIRCUIT)[GRAPH.edges],
    **{f"nodes {m}": functools.partial(node_scores, task=TASK, method=m) for m in ("nap", "nap-ig", "exact")},
    **{
        f"neurons {m}": lambda model, m=m: neuron_scores(model, TASK, method=m, steps=2).flat
        for m in ("atp", "ig", "ig-activations", "exact")
    },
    "neuron runs": neurons,
    **{name: learned(name) for name in MASK_METHODS},
    **{f"faithfulness {a}": faithfulness_under(a) for a in ("resample", "zero", "mean", "mean-positional", "optimal")},
    "acdc": lambda model: acdc(model, TASK, 1e-3).scores[GRAPH.edges],
    "metrics": lambda model: circuit_metrics(model, TASK, CIRCUIT, key=KEY, null_circuits=1).kl.found.value,
    "completeness": lambda model: completeness(model, TASK, CIRCUIT, key=KEY, knockouts=2, null_circuits=1).circuit,
    "minimality": lambda model: minimality(model, TASK, CIRCUIT, knockouts=1, max_parts=4).alone,
    "hypotheses": hypotheses,
    "scrubbing": scrubbed,
    "das": aligned,
}
# their decisions and paths can turn with any rounding, so what is asked is that they run and stay near
UNSTABLE = ("acdc", "eap-gp", "hypotheses", "completeness", "minimality")


def cast(model, dtype):
    return jax.tree.map(lambda x: x.astype(dtype), model)


def chosen(name, dtype):
    quick = (name, dtype) in QUICK
    return pytest.param(name, dtype, marks=() if quick else pytest.mark.slow, id=f"{name}-{jnp.dtype(dtype)}")


@pytest.mark.parametrize(
    ("name", "dtype"), [chosen(name, dtype) for name in CASES for dtype in (jnp.bfloat16, jnp.float16)]
)
def test_in_half_precision_beside_float32(name, dtype):
    full = family("llama")
    half = cast(full, dtype)
    found, expected, unrounded = (
        np.asarray(CASES[name](m), np.float64).ravel() for m in (half, cast(half, jnp.float32), full)
    )
    assert np.isfinite(found).all()
    error, rounding = (np.linalg.norm(x - expected) / np.linalg.norm(expected) for x in (found, unrounded))
    if name in UNSTABLE:
        assert error < 1
        return
    assert error < ROUNDINGS * rounding + 16 * float(jnp.finfo(dtype).eps)
    if len(found) > 10:
        assert np.corrcoef(found, expected)[0, 1] > 0.99
        # a change of one run that is below the last bit of its logits is 0; sums of gradients never are
        lost = ((found == 0) & (expected != 0)).mean()
        assert lost <= (0.05 if "exact" in name else 0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_divergences_metrics_and_objectives_of_half_precision_logits(dtype):
    """Against double precision on the same logits, of runs that are close to each other."""
    reference = (3 * jax.random.normal(jax.random.key(1), (N, 1, 4000))).astype(dtype)
    logits = reference + (0.05 * jax.random.normal(jax.random.key(2), reference.shape)).astype(dtype)
    p, q = (scipy.special.log_softmax(np.asarray(x[:, 0], np.float64), -1) for x in (reference, logits))
    expected = (np.exp(p) * (p - q)).sum(-1)
    found = kl_divergence(logits, reference)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-7)
    exact = np.asarray(logits[:, 0], np.float64)
    wide = {"kl": expected.mean(), "squared": np.square(exact - np.asarray(reference[:, 0], np.float64)).mean()}
    rows = np.arange(N)
    wide["metric"] = -(exact[rows, TASK.answer] - exact[rows, TASK.distractor]).mean()
    for objective in OBJECTIVES:
        np.testing.assert_allclose(loss_of(objective, TASK, reference)(logits), wide[objective], rtol=1e-3)
    np.testing.assert_allclose(TASK.answer_probability(logits), np.exp(q)[rows, TASK.answer], rtol=1e-4)
