"""The edges of hand-found circuits, counted by hand, and where they run."""

import dataclasses
import itertools

import numpy as np
import pytest

from mi_jax.circuits.graph import Graph
from mi_jax.circuits.graph.known import IOI_HEADS, induction_circuit, known_circuit
from mi_jax.core.errors import InputError

GPT2 = Graph(12, 12, 12, True)
DOCSTRING = Graph(4, 8, 8, False)
ROLES = {"IO": 2, "S1": 4, "S1+1": 5, "S2": 10, "END": 14}


def test_ioi_has_the_edges_that_its_heads_make():
    assert sum(len(heads) for heads in IOI_HEADS.values()) == 26
    edges = set(known_circuit("ioi", GPT2, mlps="none").edges)
    # 2 previous, 3 duplicate, 4 induction, 4 S-inhibition and 13 mover heads, with the inputs that the paper gives them
    from_input = 2 * 3 + 3 * 3 + 4 * 1 + 13 * 2
    between = 2 * 4 * 2 + 4 * 4 * 2 + 3 * 4 * 2 + 4 * 13
    assert len(edges) == from_input + between + 13 == 182
    assert {"input->a2.h2<q>", "a2.h2->a5.h5<k>", "a5.h5->a7.h3<v>", "a7.h3->a9.h9<q>", "a9.h9->logits"} <= edges
    assert not {"input->a5.h5<q>", "a9.h9->a10.h7<q>", "input->a9.h9<q>", "a2.h2->a7.h3<v>"} & edges
    mask = known_circuit("ioi", GPT2, mlps="none").mask()
    np.testing.assert_array_equal(GPT2.prune(mask), mask)


def test_mlps_between_two_groups_are_those_in_between():
    edges = {mlps: set(known_circuit("ioi", GPT2, mlps=mlps).edges) for mlps in ("between", "first", "none")}
    assert edges["none"] < edges["first"] < edges["between"]
    without = {edge for edge in edges["between"] if "m" not in edge}
    assert without == edges["none"]
    only_first = {edge for edge in edges["between"] - edges["none"] if set(names(edge)) & mlp_names() == {"m0"}}
    assert edges["first"] == edges["none"] | only_first
    # induction heads are in layers 5 and 6, S-inhibition in 7 and 8: what is between are MLPs 5 to 7
    assert {"a5.h5->m5", "m6->a7.h3<k>", "m7->a8.h6<v>"} <= edges["between"]
    assert not {"a7.h3->m6", "a5.h5->m8", "a5.h5->m4"} & edges["between"]
    # after the last heads, up to the logits
    assert {"a9.h9->m11", "m11->logits"} <= edges["between"]
    for found in edges.values():
        mask = GPT2.mask(found)
        np.testing.assert_array_equal(GPT2.prune(mask), mask)


def names(edge):
    return edge.replace("->", "<").split("<")[:2]


def mlp_names():
    return {f"m{layer}" for layer in range(12)}


def test_token_edges_are_at_the_positions_of_their_roles():
    circuit = known_circuit("ioi", GPT2)
    token = circuit.token_mask(ROLES, 15)
    np.testing.assert_array_equal(token.any(2), circuit.mask())
    at = {
        "input->a2.h2<q>": {"S1+1"},
        "input->a2.h2<k>": {"S1"},
        "a2.h2->a5.h5<v>": {"S1+1"},
        "a5.h5->a7.h3<k>": {"S2"},
        "a7.h3->a9.h9<q>": {"END"},
        "input->a9.h9<v>": {"IO"},
        # an MLP carries within a position: before S-inhibition at S2, after it at END
        "m5->a7.h3<k>": {"S2"},
        "m8->a9.h9<q>": {"END"},
        "m0->a2.h2<k>": {"S1"},
    }
    for edge, roles in at.items():
        assert set(np.flatnonzero(token[GPT2.index(edge)])) == {ROLES[role] for role in roles}, edge
    with pytest.raises(InputError, match=r"missing: IO, outside: {'END': 14}"):
        circuit.token_mask({k: v for k, v in ROLES.items() if k != "IO"}, 14)
    everywhere = known_circuit("greater-than", GPT2).token_mask({}, 3)
    np.testing.assert_array_equal(everywhere, np.repeat(known_circuit("greater-than", GPT2).mask()[..., None], 3, 2))


def test_greater_than_goes_from_early_to_middle_heads_to_late_mlps():
    edges = set(known_circuit("greater-than", GPT2, mlps="none").edges)
    middle = ("a5.h5", "a6.h1", "a6.h9", "a7.h10", "a8.h11", "a9.h1")
    late = range(8, 12)
    assert {edge for edge in edges if edge.endswith("logits")} == {
        f"{n}->logits" for n in (*middle, "m8", "m9", "m10", "m11")
    }
    assert {f"m{a}->m{b}" for a, b in itertools.combinations(late, 2)} <= edges
    # 0.3 and 0.5 reach the middle heads directly, 0.1 through the early MLPs as well
    assert {"a0.h1->m0", "a0.h1->a5.h5<v>", "a0.h3->a9.h1<k>"} <= edges
    assert not {"a0.h3->m0", "a0.h5->m1", "a0.h1->m8", "m4->m5"} & edges
    # a head of layer 9 is read by the MLP of its own layer, and by no earlier one
    assert "a9.h1->m9" in edges
    assert "a9.h1->m8" not in edges
    wider = set(known_circuit("greater-than", GPT2).edges)
    added = wider - edges
    assert {"m4->m5", "m7->a8.h11<q>"} <= added
    assert all(edge.startswith("m") and (edge.endswith("<q>") or "->m" in edge) for edge in added)
    mask = GPT2.mask(wider)
    np.testing.assert_array_equal(GPT2.prune(mask), mask)


def test_docstring_is_the_list_of_its_authors():
    circuit = known_circuit("docstring", DOCSTRING)
    assert len(circuit.edges) == 24
    heads = {name for edge in circuit.edges for name in names(edge)} - {"input", "logits"}
    assert heads == {"a0.h5", "a1.h2", "a1.h4", "a2.h0", "a3.h0", "a3.h6"}
    # head 1.2 is part of it by its attention pattern alone
    np.testing.assert_array_equal(DOCSTRING.prune(circuit.mask()), circuit.mask())


def test_induction_is_composition_of_keys():
    grouped = Graph(2, 4, 2, False)
    edges = set(induction_circuit(grouped, previous=[(0, 3), (1, 0)], induction=[(1, 2)]).edges)
    # heads 2 and 3 share key and value 1
    expected = {"input->a0.h3<q>", "input->a0.h1<k>", "input->a0.h1<v>", "input->a1.h2<q>", "input->a1.h1<v>"}
    expected |= {"a0.h3->a1.h1<k>", "a1.h2->logits"}
    assert expected <= edges
    assert edges - expected == {"input->a1.h0<q>", "input->a1.h0<k>", "input->a1.h0<v>"}
    with pytest.raises(InputError, match="no head 4 in layer 0: 2 layers, 4 heads"):
        induction_circuit(grouped, previous=[(0, 4)], induction=[(1, 2)])
    with pytest.raises(InputError, match=r"no previous-token head of \[\(1, 0\)\] is below"):
        induction_circuit(grouped, previous=[(1, 0)], induction=[(1, 2)])


def test_another_model_or_name_is_refused():
    with pytest.raises(
        InputError, match="found in GPT-2 small; in this graph n_layers is 4, not 12; n_heads is 8, not 12"
    ):
        known_circuit("ioi", DOCSTRING)
    with pytest.raises(InputError, match="in this graph n_kv_heads is 4, not 12"):
        known_circuit("ioi", dataclasses.replace(GPT2, n_kv_heads=4))
    with pytest.raises(InputError, match="no hand-found circuit 'sports'; there are ioi, greater-than, docstring"):
        known_circuit("sports", GPT2)
    with pytest.raises(InputError, match="mlps='all'; there are 'between', 'first' and 'none'"):
        known_circuit.__wrapped__("ioi", GPT2, mlps="all")
