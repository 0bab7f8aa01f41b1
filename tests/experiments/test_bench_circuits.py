"""The limit of edge scores, what two programs are compared by, and one tiny run with peers that are stand-ins."""

import dataclasses
import io
import json
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from experiments.bench import circuits, circuits_limit
from experiments.bench.circuits import Bench, CircuitsBenchConfig, run_bench
from experiments.bench.circuits_peers import SCRIPTS, Peers
from experiments.bench.circuits_setting import (
    FOUR_LAYERS,
    SHAPES,
    jaccard,
    mask_gradients,
    metric_without,
    relative_difference,
    sampled_edges,
    scores_of,
    swapped,
    task_of,
)
from experiments.bench.peer import dependencies
from experiments.bench.setting import SMOKE, Setting, setting
from mi_jax.circuits.ablation.values import ablation_values
from mi_jax.circuits.graph import Graph
from mi_jax.circuits.runs.exact import exact_edges
from mi_jax.circuits.scores import edge_scores
from mi_jax.circuits.search.acdc import acdc
from mi_jax.core.errors import InputError
from mi_jax.data.task import Task

GRAPH = Graph.of(SMOKE)
# one layer of 2 heads of 2 components, width 3, 5 neurons
SHAPE = dataclasses.replace(SMOKE, n_layers=2, d_model=3, n_heads=2, n_kv_heads=2, d_head=2, d_mlp=5, d_vocab=7)


@pytest.fixture(scope="module")
def made() -> tuple[Setting, Task]:
    found = setting(*SHAPES["smoke"], key=jax.random.key(0))
    return found, task_of(found)


def test_the_shapes_have_the_edges_that_they_are_said_to_have():
    assert Graph.of(SHAPES["gpt2-small"][0]).n_edges == 32_491
    assert Graph.of(FOUR_LAYERS).n_edges == 1519


def test_operations_of_a_backward_pass():
    heads, mlp = 2 * 2, 2 * 3 * 5
    # first layer: three tokens; last layer: keys and values of three, the rest of one
    products = 3 * (4 * 3 * heads + mlp) + 3 * 2 * 3 * heads + 2 * 3 * heads + mlp
    attended = heads * (1 + 2 + 3) + heads * 3
    # scores and weighted values, each with two gradients
    assert circuits_limit.activation_backward_flops(SHAPE, 5, 3) == 5 * (2 * products + 4 * 2 * attended)


def test_operations_of_joining():
    # sources: input, two heads and an MLP a layer; t is 3, but 1 for the last queries, the last MLP and the logits
    first = 6 * 1 * 3 + 3 * 3
    last = 2 * 4 * 1 + 4 * 4 * 3 + 6 * 1
    assert circuits_limit.joining_flops(SHAPE, 5, 3) == 2 * 5 * 3 * (first + last + 7 * 1)


def test_operations_of_edge_scores_are_those_of_their_parts():
    one, two, three = (circuits_limit.eap_ig_flops(SHAPE, 5, 3, steps=n, logits=2) for n in (1, 2, 3))
    backward = circuits_limit.activation_backward_flops(SHAPE, 5, 3)
    forward = three - two - backward - 2 * 2 * 5 * 2 * 3
    assert 0 < forward < backward
    assert one == 2 * forward + backward + 2 * 2 * 5 * 2 * 3 + circuits_limit.joining_flops(SHAPE, 5, 3)


def test_scores_by_name_are_put_where_they_belong():
    scores = np.where(GRAPH.edges, np.random.default_rng(0).standard_normal(GRAPH.edges.shape), 0)
    named = {name: float(scores[GRAPH.index(name)]) for name in reversed(GRAPH.names(GRAPH.edges))}
    np.testing.assert_array_equal(scores_of(GRAPH, named), scores)
    named.pop("m0->logits")
    with pytest.raises(InputError, match="46 edges, and there are 45 scores"):
        scores_of(GRAPH, named)
    with pytest.raises(InputError, match="no edge 'm1->m0'"):
        scores_of(GRAPH, named | {"m1->m0": 1.0})


def test_what_programs_are_compared_by():
    assert relative_difference(np.array([1.0, 2.0]), np.array([1.5, -4.0])) == 6 / 4
    first, second = np.array([[True, True, False]]), np.array([[True, False, True]])
    assert jaccard(first, second) == pytest.approx(1 / 3)
    assert jaccard(first & ~first, second & ~second) == 1


def test_edges_are_drawn_once_each():
    assert sorted(sampled_edges(GRAPH, 100, seed=0)) == sorted(GRAPH.names(GRAPH.edges))
    drawn = sampled_edges(GRAPH, 20, seed=0)
    assert len(set(drawn)) == 20
    assert drawn == sampled_edges(GRAPH, 20, seed=0) != sampled_edges(GRAPH, 20, seed=1)


def test_a_loop_over_edges_finds_the_exact_scores(made):
    found, task = made
    patch, scores = ablation_values(found.model, task), exact_edges(found.model, task)
    whole = task.metric(found.model(task.clean, task.mask, output_pos=task.position)).mean()
    for name in ("input->a1.h1<q>", "a0.h1->m0", "m1->logits"):
        edge = jnp.asarray(GRAPH.index(name), jnp.int32)
        alone = whole - metric_without(found.model, task, patch, edge)
        assert float(alone) == pytest.approx(scores[GRAPH.index(name)], abs=1e-5)


def test_the_gradient_of_masks_at_zero_is_attribution(made):
    found, task = made
    patch = ablation_values(found.model, task)
    expected = edge_scores(found.model, task, method="eap")
    # a sum over points: six times the same is six times as much
    six = mask_gradients(found.model, task, patch, jnp.zeros(6, jnp.float32))
    np.testing.assert_allclose(six, 6 * expected, atol=1e-4)


def test_swapped_prompts_are_those_of_the_other_run(made):
    task = made[1]
    other = swapped(task)
    np.testing.assert_array_equal(other.clean, task.corrupt)
    np.testing.assert_array_equal(other.corrupt, task.clean)
    assert (np.asarray(task.clean) != np.asarray(task.corrupt)).all()


def test_the_scripts_name_what_they_need():
    needed = {
        "auto_circuit": "auto-circuit",
        "eap_ig_package": "transformer-lens",
        "transformer_lens": "transformer-lens",
        "loop": "transformer-lens",
        "acdc": "auto-circuit",
    }
    assert needed.keys() == SCRIPTS.keys()
    for peer, package in needed.items():
        assert {name.split("==")[0] for name in dependencies(SCRIPTS[peer])} >= {"torch", package}


def executable(path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


@pytest.mark.skipif(os.name == "nt", reason="the stand-in is started by its first line")
def test_a_peer_that_fails_is_left_out_after_one_line(tmp_path):
    out = io.StringIO()
    broken = executable(tmp_path / "broken", "#!/bin/sh\necho out of memory >&2\nexit 1\n")
    peers = Peers({"auto_circuit": broken}, "", Console(file=out, width=200), used=True, threads=2)
    for _ in range(2):
        assert peers.run("auto_circuit") is None
        assert peers.run("eap_ig_package") is None
    lines = out.getvalue().splitlines()
    assert lines[0] == "without auto_circuit: edge_scores_auto_circuit.py failed: out of memory"
    assert "--config.eap_ig_source=DIR" in lines[1]
    assert len(lines) == 2
    assert Peers({}, "", Console(file=out), used=False, threads=2).run("auto_circuit") is None
    assert len(out.getvalue().splitlines()) == 2


# what stands in for the peers: says what it was asked for, and answers with what it is told to have found
STAND_IN = """#!{python}
import json, os, sys
script = os.path.basename(sys.argv[1])
arguments = dict((a[2:] + "=").split("=", 1) for a in sys.argv[2:])
found = json.load(open({found!r}))
key = script + " " + arguments.get("method", "=")[:-1]
assert open(arguments["arrays"][:-1], "rb").read() == open({arrays!r}, "rb").read()
answer = {{"versions": {{"torch": "0"}}, "seconds": [4.0 if "auto" in script else 8.0], "cached_seconds": [1.0],
           "peak_rss_bytes": 2e9, "scores": found.get(key, {{}}), "kept": found["kept"]}}
if "edges" in arguments:
    names = json.load(open(arguments["edges"][:-1]))
    answer["scores"] = {{name: found["exact"][name] for name in names}}
if "order" in arguments:
    assert sorted(json.load(open(arguments["order"][:-1]))) == sorted(found["exact"])
print(json.dumps(answer))
"""


def named(scores) -> dict[str, float]:
    return {name: float(scores[GRAPH.index(name)]) for name in GRAPH.names(GRAPH.edges)}


@pytest.mark.skipif(os.name == "nt", reason="the stand-in is started by its first line")
def test_a_tiny_run(tmp_path, monkeypatch, made):
    measured = {"peak_rss_bytes": 10**9, "seconds": 0.5, "cold_seconds": 1.0}
    monkeypatch.setattr(circuits, "_own_process", lambda subject, seed: measured)
    # the first calls are not timed here: programs that were compiled before are used again
    monkeypatch.setattr(jax, "clear_caches", lambda: None)
    found, task = made
    found.save(tmp_path / "arrays")
    integral = edge_scores(found.model, task, method="eap-ig", steps=5)
    gradient = edge_scores(found.model, task, method="eap")
    points = jnp.asarray([0, 0.2, 0.4, 0.6, 0.8, 1], jnp.float32)
    masks = np.asarray(mask_gradients(found.model, task, ablation_values(found.model, task), points))
    kept = acdc(found.model, task, circuits.SMOKE_THRESHOLD).mask
    package, circuit = "edge_scores_eap_ig.py", "edge_scores_auto_circuit.py"
    # the package's integral is said to be a tenth larger than it is, and one edge not to be kept
    answers = {
        f"{package} eap-ig": named(1.1 * integral),
        f"{package} eap": named(gradient),
        f"{circuit} eap-ig": named(masks),
        f"{circuit} eap": named(gradient),
        "edge_scores_transformer_lens.py eap": named(-edge_scores(found.model, swapped(task), method="eap")),
        "exact": named(exact_edges(found.model, task)),
        "kept": GRAPH.names(kept)[1:],
    }
    (tmp_path / "found").write_text(json.dumps(answers))
    paths = {"found": str(tmp_path / "found"), "arrays": str(tmp_path / "arrays")}
    python = executable(tmp_path / "python", STAND_IN.format(python=sys.executable, **paths))
    pythons = dict.fromkeys(("auto_circuit_python", "hooked_python", "peer_python"), python)
    config = CircuitsBenchConfig(smoke=True, **pythons, eap_ig_source="src", smollm2=False, rounds=1, pairs=2)
    results = run_bench(config, str(tmp_path / "run"), console=Console(file=io.StringIO(), width=200))

    taken = results["eap_ig.seconds"]
    assert results["eap_ig.seconds_high"] >= taken >= results["eap_ig.seconds_low"] > 0
    assert results["eap_ig.best_peer"] == "auto_circuit"
    assert results["eap_ig.vs_best_peer"] == results["eap_ig.vs_auto_circuit"] == pytest.approx(4 / taken)
    assert results["eap_ig.vs_eap_ig_package"] == pytest.approx(8 / taken)
    assert results["eap_ig.memory_vs_best_peer"] == 0.5
    assert results["eap_ig.difference_auto_circuit"] < 1e-5
    assert results["eap_ig.difference"] == pytest.approx(0.1 / 1.1, rel=1e-3)
    assert results["eap.difference"] < 1e-5
    assert results["eap.vs_transformer_lens"] == pytest.approx(8 / results["eap.seconds"])
    assert results["eap_ig.fraction_of_limit"] == pytest.approx(results["limit.eap_ig_seconds"] / taken)
    assert results["exact_edges.vs_loop"] == pytest.approx(9 / results["exact_edges.seconds"])
    assert results["exact_edges.difference"] < 1e-5
    assert 0.05 < results["acdc.fraction_kept"] < 0.5
    assert results["acdc.jaccard_of_kept_edges"] == pytest.approx(1 - 1 / kept.sum())
    assert results["acdc.vs_reference"] == pytest.approx(8 / results["acdc.seconds"])
    low, middle, high = (results[f"faithfulness.ten_sizes_vs_forward{end}"] for end in ("_low", "", "_high"))
    assert 0 < low <= middle <= high


def test_memory_is_left_out_where_there_are_no_weights(monkeypatch):
    out = io.StringIO()

    def missing():
        raise circuits.CheckpointError("not installed")

    monkeypatch.setattr(circuits, "smollm2_path", missing)
    assert Bench(CircuitsBenchConfig(), Console(file=out, width=200)).memory(lambda fraction, note="": None) == {}
    assert out.getvalue() == "without SmolLM2: not installed\n"


def test_memory_is_measured_in_a_process_of_its_own():
    measured = circuits._own_process("smoke", 0)
    assert 0 < measured["seconds"] < measured["cold_seconds"]
    peak = measured["peak_rss_bytes"]
    assert peak is None or 1e8 < peak < 8e9
