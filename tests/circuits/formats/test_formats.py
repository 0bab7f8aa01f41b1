"""Edge files come back as they were written, and what is not for this model is refused."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mi_jax.circuits.formats import EdgeFile, read_eap_ig, read_tensors, write_eap_ig, write_tensors
from mi_jax.circuits.graph import Graph
from mi_jax.core.errors import InputError
from tests.models.tiny import CONFIGS

PLAIN = Graph(2, 2, 2, True)
GROUPED = Graph(2, 6, 2, True)


def edge_file(graph: Graph, seed: int = 0, **extra) -> EdgeFile:
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=graph.edges.shape).astype(np.float32)
    return EdgeFile(graph, scores, rng.random(graph.edges.shape) < 0.4, 8, **extra)


def of_nodes(graph: Graph) -> dict:
    rng = np.random.default_rng(1)
    return {
        "node_scores": np.where(np.arange(graph.n_sources) == 1, np.nan, rng.normal(size=graph.n_sources)),
        "neurons": rng.random((graph.n_sources, 8)) < 0.5,
        "neuron_scores": rng.normal(size=(graph.n_sources, 8)),
    }


def same(a: EdgeFile, b: EdgeFile, tolerance: float = 0.0) -> None:
    assert (a.graph, a.d_model) == (b.graph, b.d_model)
    np.testing.assert_allclose(a.scores, b.scores, rtol=tolerance)
    np.testing.assert_array_equal(a.circuit, b.circuit)
    for field in ("node_scores", "neurons", "neuron_scores"):
        x, y = getattr(a, field), getattr(b, field)
        assert (x is None) == (y is None)
        if x is not None:
            np.testing.assert_array_equal(x, y)


@settings(max_examples=15, deadline=None)
@given(
    graph=st.builds(
        lambda layers, kv, group, mlp, parallel, experts: Graph(layers, kv * group, kv, mlp, parallel, experts * mlp),
        *(st.integers(1, 3), st.integers(1, 2), st.integers(1, 3), st.booleans(), st.booleans(), st.integers(0, 2)),
    ),
    nodes=st.booleans(),
    seed=st.integers(0, 99),
)
def test_what_is_written_is_read(tmp_path_factory, graph, nodes, seed):
    file = edge_file(graph, seed, **(of_nodes(graph) if nodes else {}))
    folder = tmp_path_factory.mktemp("files")
    write_tensors(folder / "a.safetensors", file)
    same(read_tensors(folder / "a.safetensors"), file)
    if graph.n_experts:
        with pytest.raises(InputError, match=r"none for experts; write \.safetensors"):
            write_eap_ig(folder / "a.json", file)
    else:
        write_eap_ig(folder / "a.json", file)
        # three parts of a float32 add up to it but for rounding
        same(read_eap_ig(folder / "a.json"), file, 1e-6)


def test_the_layout_is_eap_igs(tmp_path):
    file = edge_file(PLAIN)
    write_eap_ig(tmp_path / "g.json", file)
    content = json.loads((tmp_path / "g.json").read_text())
    assert content["cfg"] == {"n_layers": 2, "n_heads": 2, "parallel_attn_mlp": False, "d_model": 8}
    assert list(content["nodes"]) == ["input", "a0.h0", "a0.h1", "m0", "a1.h0", "a1.h1", "m1", "logits"]
    edges = list(content["edges"])
    assert edges[:9] == [
        *(f"input->a0.h{h}<{letter}>" for h in (0, 1) for letter in "qkv"),
        *("input->m0", "a0.h0->m0", "a0.h1->m0"),
    ]
    assert edges[-7:] == [f"{n}->logits" for n in ("input", "a0.h0", "a0.h1", "m0", "a1.h0", "a1.h1", "m1")]
    assert len(edges) == PLAIN.n_edges
    for edge, info in content["edges"].items():
        s, r = PLAIN.index(edge)
        assert info == {"score": float(file.scores[s, r]), "in_graph": bool(file.circuit[s, r])}


def test_a_shared_key_is_written_for_every_head_and_read_as_their_sum(tmp_path):
    file = edge_file(GROUPED)
    write_eap_ig(tmp_path / "g.json", file)
    content = json.loads((tmp_path / "g.json").read_text())
    assert content["cfg"]["n_kv_heads"] == 2
    s, r = GROUPED.index("input->a1.h1<k>")
    parts = [content["edges"][f"input->a1.h{h}<k>"] for h in (3, 4, 5)]
    np.testing.assert_allclose([part["score"] for part in parts], float(file.scores[s, r]) / 3, rtol=1e-6)
    assert {part["in_graph"] for part in parts} == {bool(file.circuit[s, r])}

    # scores of a model in which no heads share, which has no n_kv_heads: what one head reads is a part of the sum
    del content["cfg"]["n_kv_heads"]
    for h, score in ((3, 1.0), (4, -4.0), (5, 0.5)):
        content["edges"][f"input->a1.h{h}<k>"] = {"score": score, "in_graph": h == 4}
    (tmp_path / "wide.json").write_text(json.dumps(content))
    assert read_eap_ig(tmp_path / "wide.json").graph.n_kv_heads == 6
    config = dataclasses.replace(CONFIGS["llama"], n_layers=2, n_heads=6, n_kv_heads=2, d_model=8)
    with pytest.raises(
        InputError, match=r"'input->a1.h1<k>' is an input that 3 heads share, and the file has it for 1 of"
    ):
        read_eap_ig(tmp_path / "wide.json", config)
    for shared, kept in (("any", True), ("all", False)):
        found = read_eap_ig(tmp_path / "wide.json", config, shared=shared)
        assert found.circuit[s, r] == kept
        assert found.scores[s, r] == -2.5


def test_nodes_are_those_that_an_edge_leaves_or_enters():
    circuit = GROUPED.mask(["input->a0.h1<k>", "m0->a1.h4<q>"])
    found = dataclasses.replace(edge_file(GROUPED), circuit=circuit).nodes
    named = {name for name, kept in zip(GROUPED.sources, found, strict=True) if kept}
    assert named == {"input", "a0.h3", "a0.h4", "a0.h5", "m0", "a1.h4"}


def test_edges_that_lead_nowhere_are_kept_or_pruned_as_asked(tmp_path):
    circuit = PLAIN.mask(["input->m0", "m0->logits", "m0->m1", "a0.h0->logits"])
    kept = PLAIN.mask(["input->m0", "m0->logits"])
    file = dataclasses.replace(edge_file(PLAIN), circuit=circuit)
    for write, read, path in (
        (write_eap_ig, read_eap_ig, tmp_path / "g.json"),
        (write_tensors, read_tensors, tmp_path / "g.safetensors"),
    ):
        write(path, file)
        np.testing.assert_array_equal(read(path).circuit, circuit)
        np.testing.assert_array_equal(read(path, dangling="prune").circuit, kept)
        write(path, file, dangling="prune")
        np.testing.assert_array_equal(read(path).circuit, kept)
        np.testing.assert_allclose(read(path).scores, file.scores)
    with pytest.raises(InputError, match="dangling='drop'; edges that lead nowhere are kept"):
        EdgeFile.without_dangling.__wrapped__(file, "drop")


def test_a_file_for_another_model_is_refused(tmp_path):
    config = dataclasses.replace(CONFIGS["llama"], name="ours", n_layers=3, n_heads=2, n_kv_heads=2, d_model=8)
    write_eap_ig(tmp_path / "g.json", edge_file(PLAIN))
    write_tensors(tmp_path / "g.safetensors", edge_file(GROUPED))
    with pytest.raises(
        InputError, match=r"edges of another model than ours: n_layers is 2 in the file and 3 in the model$"
    ):
        read_eap_ig(tmp_path / "g.json", config)
    with pytest.raises(
        InputError, match="n_layers is 2 in the file and 3 in the model; n_heads is 6 in the file and 2"
    ):
        read_tensors(tmp_path / "g.safetensors", config)
    fits = dataclasses.replace(config, n_layers=2)
    same(read_eap_ig(tmp_path / "g.json", fits), edge_file(PLAIN))
    with pytest.raises(InputError, match="has_mlp is True in the file and False in the model"):
        read_eap_ig(tmp_path / "g.json", dataclasses.replace(fits, d_mlp=0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("edges"), "is no graph of EAP-IG: it has no edges"),
        (lambda c: c["cfg"].pop("d_model"), "its cfg has no usable d_model"),
        (lambda c: c["edges"].update({"m1->m0": {"score": 1.0, "in_graph": True}}), "no edge 'm1->m0'"),
        (lambda c: c["edges"].update({"input->m0": {"score": "high"}}), "edge 'input->m0' has no score and in_graph"),
        (lambda c: c["edges"].update({"input->m0": {"score": float("nan"), "in_graph": True}}), "is not finite"),
        (lambda c: c["nodes"].update({"m7": {"in_graph": True}}), "no node 'm7' in a model of 2 layers"),
        (lambda c: c["nodes"]["m0"].update({"neurons": [True]}), "node 'm0' has a neurons that is not one number"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, change, message):
    write_eap_ig(tmp_path / "g.json", edge_file(PLAIN))
    content = json.loads((tmp_path / "g.json").read_text())
    change(content)
    (tmp_path / "bad.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        read_eap_ig(tmp_path / "bad.json")


def test_what_is_no_file_of_edges_is_named(tmp_path):
    (tmp_path / "text").write_text("hello")
    for read in (read_eap_ig, read_tensors):
        for name in ("text", "missing"):
            with pytest.raises(InputError, match=name):
                read(tmp_path / name)
    with pytest.raises(InputError, match=r"scores has shape \(3, 3\); this graph needs \(7, 15\)"):
        EdgeFile(PLAIN, np.zeros((3, 3)), np.zeros((3, 3), bool), 8)
