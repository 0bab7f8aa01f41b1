"""Scores and runs of neurons against hooked runs, and what a circuit of all or no neurons must do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mi_jax as mi
from mi_jax.circuits.graph import Graph
from mi_jax.circuits.runs.neurons import neuron_curve, neuron_faithfulness, neuron_runs
from mi_jax.circuits.scores.neurons import Neurons, neuron_scores, random_neurons, top_neurons
from mi_jax.circuits.scores.nodes import node_scores
from mi_jax.core.errors import InputError
from tests.circuits.tiny_task import CONFIG, model, task
from tests.models.tiny_families import family

GRAPH = Graph.of(CONFIG)
TASK = task()
TOLERANCE = 1e-5


def test_neurons_of_a_head_add_up_to_its_first_order_score():
    scores = neuron_scores(model(), TASK)
    nodes = node_scores(model(), TASK, method="nap")
    assert scores.mlp is not None
    by_source = np.concatenate([scores.heads.sum(-1), scores.mlp.sum(-1)[:, None]], 1).ravel()
    np.testing.assert_allclose(by_source, nodes[1:], atol=1e-5)


def test_edges_of_a_neuron_circuit_count_by_the_share_of_neurons():
    scores = neuron_scores(model(), TASK)
    everything = top_neurons(scores, len(scores.flat))
    assert everything.weighted_edge_count(GRAPH) == GRAPH.n_edges
    heads, mlp = np.zeros(scores.heads.shape, bool), np.zeros((2, 6), bool)
    mlp[0, :3] = True
    half = Neurons(heads, mlp)
    # input->m0 and input->logits whole, m0->logits half
    assert half.weighted_edge_count(GRAPH) == pytest.approx(2.5)
    assert top_neurons(scores, 5).flat.sum() == 5


def hooked(circuit, values):
    """Logits of a run whose taps replace what is not in the circuit, one transform for every layer and site."""
    edits = [
        mi.transform(site, lambda x, k=kept[n], v=values[site][n]: jnp.where(k, x, v), layer=n)
        for site, kept in (("attn.z", circuit.heads), ("mlp.post", circuit.mlp))
        for n in range(CONFIG.n_layers)
    ]
    return mi.intervene(model(), *edits)(TASK.clean, TASK.mask, output_pos=TASK.position)


@pytest.mark.parametrize("ablation", ["resample", "zero", "mean"])
def test_a_run_is_the_hooked_run(ablation):
    scores = neuron_scores(model(), TASK)
    circuits = [random_neurons(scores, n, seed=n) for n in (0, 3, 9, 20, len(scores.flat))]
    _, values = model()(TASK.corrupt, TASK.mask, capture=("attn.z", "mlp.post"))
    real = np.asarray(TASK.mask)
    if ablation == "mean":
        values = {k: np.asarray(v)[:, real].mean(1)[:, None, None] for k, v in values.items()}
    elif ablation == "zero":
        values = jax.tree.map(jnp.zeros_like, values)
    runs = neuron_runs(model(), TASK, circuits, ablation=ablation)
    for i, circuit in enumerate(circuits):
        logits = hooked(circuit, values)
        np.testing.assert_allclose(runs.metric[i], TASK.metric(logits), atol=TOLERANCE)
        np.testing.assert_array_equal(runs.prediction[i], logits[:, 0].argmax(-1))
    assert len(set(np.round(runs.metric.mean(1), 4))) == len(circuits)
    np.testing.assert_allclose(runs.kl[-1], 0, atol=1e-6)


def test_faithfulness_is_between_no_neuron_and_all():
    scores = neuron_scores(model(), TASK)
    total = len(scores.flat)
    f = neuron_faithfulness(model(), TASK, [top_neurons(scores, n) for n in (0, 7, total)])
    np.testing.assert_allclose(f[[0, 2]], [0, 1], atol=1e-6)
    curve = neuron_curve(model(), TASK, scores, (0.2, 7 / total, 1.0))
    assert curve.edges == curve.kept == (round(0.2 * total), 7, total)
    np.testing.assert_allclose(curve.values[1:], f[1:], atol=1e-5)
    low, _, high = (getattr(curve.intervals(key=jax.random.key(0))["cpr"], k) for k in ("ci_low", "value", "ci_high"))
    assert low <= curve.cpr <= high


def test_random_neurons_are_nested_and_of_the_size():
    like = Neurons(np.zeros((2, 3, 4)), None)
    small, large = (random_neurons(like, n, seed=5) for n in (6, 15))
    assert small.flat.sum() == 6
    assert large.flat.sum() == 15
    assert small.mlp is None
    assert not (small.flat & ~large.flat).any()
    assert (random_neurons(like, 6, seed=6).flat != small.flat).any()


def test_what_does_not_fit_is_named():
    with pytest.raises(InputError, match="neurons; n is"):
        top_neurons(Neurons(np.zeros((1, 1, 2)), None), 3)
    with pytest.raises(InputError, match="choose neurons of scores with `top_neurons`"):
        neuron_runs(model(), TASK, [neuron_scores(model(), TASK)])
    everything = top_neurons(neuron_scores(model(), TASK), 0)
    with pytest.raises(InputError, match="resample, zero, mean, got 'optimal'"):
        neuron_runs(model(), TASK, [everything], ablation="optimal")
    with pytest.raises(InputError, match="at least one `Neurons`, True where it has a neuron; got none"):
        neuron_faithfulness(model(), TASK, [])
    with pytest.raises(InputError, match="4 neurons have NaN"):
        top_neurons(Neurons(np.full((1, 1, 4), np.nan), None), 3)
    scores = neuron_scores(model(), TASK)
    with pytest.raises(InputError, match=r"select is one of .*, got 'greedy'"):
        neuron_curve(model(), TASK, scores, select="greedy")
    for fractions in ((), (1.5,)):
        with pytest.raises(InputError, match="fractions are shares"):
            neuron_curve(model(), TASK, scores, fractions)
    with pytest.raises(InputError, match="mixture of experts"):
        neuron_runs(family("mixture"), TASK, [everything])
