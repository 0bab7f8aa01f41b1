"""Circuits that people found by hand, as data, and the masks of their edges.

| name | model | source |
|---|---|---|
| `ioi` | GPT-2 small | Wang et al. 2022, "Interpretability in the Wild", figure 2 |
| `greater-than` | GPT-2 small | Hanna et al. 2023, "How does GPT-2 compute greater-than?" |
| `docstring` | attn-only-4l | Heimersheim & Janiak 2023, "A circuit for Python docstrings in a 4-layer transformer" |
| induction | any | Elhage et al. 2021; Olsson et al. 2022: `induction_circuit` with heads of your model |

The papers name heads and what they compose with. Which edges that means is a reading, and so are the positions, where
the paper has none: compare with these masks as with any annotation. In the docstring circuit head 1.2 has queries and
keys but no value, since what it writes depends on where it attends alone.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np

from mi_jax.circuits.graph import Graph
from mi_jax.core.errors import InputError

Head = tuple[int, int]
MLPs = Literal["between", "first", "none"]

# layer, head
IOI_HEADS: dict[str, tuple[Head, ...]] = {
    "name mover": ((9, 9), (10, 0), (9, 6)),
    "backup name mover": ((10, 10), (10, 6), (10, 2), (10, 1), (11, 2), (9, 7), (9, 0), (11, 9)),
    "negative name mover": ((10, 7), (11, 10)),
    "S-inhibition": ((7, 3), (7, 9), (8, 6), (8, 10)),
    "induction": ((5, 5), (5, 8), (5, 9), (6, 9)),
    "duplicate token": ((0, 1), (0, 10), (3, 0)),
    "previous token": ((2, 2), (4, 11)),
}
GREATER_THAN_HEADS: dict[str, tuple[Head, ...]] = {
    "early": ((0, 1), (0, 3), (0, 5)),
    "middle": ((5, 5), (6, 1), (6, 9), (7, 10), (8, 11), (9, 1)),
}
GREATER_THAN_MLPS = {"early": (0, 1, 2, 3), "late": (8, 9, 10, 11)}
# the heads of the circuit, those with a role in its edges first
DOCSTRING_HEADS: tuple[Head, ...] = (
    *((0, 5), (1, 2), (1, 4), (2, 0), (3, 0), (3, 6)),
    *((0, 2), (0, 4), (1, 0), (0, 1), (2, 3)),
)

_MOVERS = ("name mover", "backup name mover", "negative name mover")
# who writes, who reads, and which of its inputs at which position
_IOI: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("input", "previous token", {"q": "S1+1", "k": "S1", "v": "S1"}),
    ("input", "duplicate token", {"q": "S2", "k": "S1", "v": "S1"}),
    ("input", "S-inhibition", {"q": "END"}),
    *(("input", mover, {"k": "IO", "v": "IO"}) for mover in _MOVERS),
    ("previous token", "induction", {"k": "S1+1", "v": "S1+1"}),
    ("induction", "S-inhibition", {"k": "S2", "v": "S2"}),
    ("duplicate token", "S-inhibition", {"k": "S2", "v": "S2"}),
    *(("S-inhibition", mover, {"q": "END"}) for mover in _MOVERS),
    *((mover, "logits", {"": "END"}) for mover in _MOVERS),
)
_DEFINED, _DOCUMENTED = ("A_def", "B_def"), ("A_doc", "B_doc")
_DOCSTRING: dict[str, tuple[str, ...]] = {
    "input->a0.h5<v>": ("B_def", "C_def", "B_doc"),
    "input->a1.h4<v>": ("B_def", "B_doc"),
    "a0.h5->a1.h4<v>": ("B_def", "B_doc"),
    "input->a1.h2<q>": _DOCUMENTED,
    "input->a1.h2<k>": (*_DEFINED, *_DOCUMENTED),
    "a0.h5->a1.h2<q>": ("B_doc",),
    "a0.h5->a1.h2<k>": ("B_def", "B_doc"),
    "input->a2.h0<q>": ("C_def",),
    "a0.h5->a2.h0<q>": ("C_def",),
    "input->a2.h0<k>": (",_B",),
    "a0.h5->a2.h0<k>": ("B_def",),
    "a1.h4->a2.h0<v>": (",_B",),
}
for _head in ("a3.h0", "a3.h6"):
    _DOCSTRING |= {
        f"a1.h4->{_head}<q>": ("END",),
        f"input->{_head}<v>": ("C_def",),
        f"a0.h5->{_head}<v>": ("C_def",),
        f"a2.h0->{_head}<k>": ("C_def",),
        f"a1.h2->{_head}<k>": _DOCUMENTED,
        f"{_head}->logits": ("END",),
    }


@dataclasses.dataclass(frozen=True)
class KnownCircuit:
    """Edges by name, each with the roles of the positions where it matters; no roles where the source names none."""

    name: str
    graph: Graph
    edges: Mapping[str, frozenset[str]]

    def mask(self) -> np.ndarray:
        """Boolean `[source reader]`, positions dropped."""
        return self.graph.mask(self.edges)

    def token_mask(self, roles: Mapping[str, int], n_pos: int) -> np.ndarray:
        """Boolean `[source reader pos]`: an edge at the positions of its roles, or at all if it has none.

        Args:
          roles: the position of every role, as one prompt of the task has them (`Task.roles`).

        Raises:
          InputError: a role is missing, or lies outside the prompt.
        """
        needed = set().union(*self.edges.values())
        missing = sorted(needed - set(roles))
        outside = {role: p for role, p in roles.items() if role in needed and not 0 <= p < n_pos}
        if missing or outside:
            raise InputError(
                f"circuit {self.name!r} needs positions of {', '.join(sorted(needed))} in a prompt of {n_pos} tokens; "
                f"missing: {', '.join(missing) or 'none'}, outside: {outside or 'none'}"
            )
        out = np.zeros((*self.graph.edges.shape, n_pos), bool)
        for edge, at in self.edges.items():
            out[self.graph.index(edge)][[roles[role] for role in at] if at else slice(None)] = True
        return out


def known_circuit(name: str, graph: Graph, *, mlps: MLPs = "between") -> KnownCircuit:
    """The circuit of a paper on the graph of the model that it was found in.

    Args:
      name: "ioi", "greater-than" or "docstring".
      mlps: MLPs on the way from one group of heads to the next, which the papers leave open. "between": all of them;
        "first": MLP 0 alone; "none". They are added to the MLPs that a paper names.

    Raises:
      InputError: no such circuit, or a graph of another shape than the model's.
    """
    if name not in _CIRCUITS:
        raise InputError(f"no hand-found circuit {name!r}; there are {', '.join(_CIRCUITS)}, and induction_circuit")
    if mlps not in ("between", "first", "none"):
        raise InputError(f"mlps={mlps!r}; there are 'between', 'first' and 'none'")
    model, shape, build = _CIRCUITS[name]
    found = (graph.n_layers, graph.n_heads, graph.n_kv_heads, graph.has_mlp, graph.parallel, graph.n_experts)
    if found != shape:
        fields = ("n_layers", "n_heads", "n_kv_heads", "has_mlp", "parallel", "n_experts")
        differs = [f"{f} is {b}, not {a}" for f, a, b in zip(fields, shape, found, strict=True) if a != b]
        raise InputError(f"circuit {name!r} was found in {model}; in this graph {'; '.join(differs)}")
    return KnownCircuit(name, graph, build(graph, mlps))


def induction_circuit(graph: Graph, *, previous: Sequence[Head], induction: Sequence[Head]) -> KnownCircuit:
    """Induction by K-composition: previous-token heads write what the keys of induction heads read.

    Args:
      previous, induction: layers and heads of your model, each previous-token head below an induction head.

    Raises:
      InputError: a head that the model lacks, or no previous-token head below an induction head.
    """
    for layer, head in (*previous, *induction):
        if not (0 <= layer < graph.n_layers and 0 <= head < graph.n_heads):
            raise InputError(f"no head {head} in layer {layer}: {graph.n_layers} layers, {graph.n_heads} heads")
    pairs = [(a, b) for a, b in itertools.product(previous, induction) if a[0] < b[0]]
    if not pairs:
        raise InputError(f"no previous-token head of {list(previous)} is below an induction head of {list(induction)}")
    edges = [f"input->{_reader(graph, head, letter)}" for head in previous for letter in "qkv"]
    edges += [f"input->{_reader(graph, head, letter)}" for head in induction for letter in "qv"]
    edges += [f"{_name(a)}->{_reader(graph, b, 'k')}" for a, b in pairs]
    edges += [f"{_name(head)}->logits" for head in induction]
    return KnownCircuit("induction", graph, dict.fromkeys(edges, frozenset()))


def _name(head: Head) -> str:
    return f"a{head[0]}.h{head[1]}"


def _reader(graph: Graph, head: Head, letter: str) -> str:
    """The reader of a head's query, or of the key or value that it shares with its group."""
    layer, number = head
    return f"a{layer}.h{number if letter == 'q' else number * graph.n_kv_heads // graph.n_heads}<{letter}>"


def _existing(graph: Graph, found: Iterable[tuple[str, str, str]]) -> dict[str, frozenset[str]]:
    """Edges with their roles from sources, readers and a role each, without those that run backwards."""
    sources = {name: i for i, name in enumerate(graph.sources)}
    readers = {name: i for i, name in enumerate(graph.readers)}
    edges: dict[str, frozenset[str]] = {}
    for source, reader, role in found:
        if graph.edges[sources[source], readers[reader]]:
            edge = f"{source}->{reader}"
            edges[edge] = edges.get(edge, frozenset()) | ({role} if role else frozenset())
    return edges


def _ioi(graph: Graph, mlps: MLPs) -> dict[str, frozenset[str]]:
    found = []
    for writer, reader, inputs in _IOI:
        sources = ["input"] if writer == "input" else [_name(head) for head in IOI_HEADS[writer]]
        if reader == "logits":
            readers = [("logits", role) for role in inputs.values()]
        else:
            readers = [(f"{_name(h)}<{letter}>", role) for h in IOI_HEADS[reader] for letter, role in inputs.items()]
        first = 0 if writer == "input" else min(layer for layer, _ in IOI_HEADS[writer])
        last = graph.n_layers if reader == "logits" else max(layer for layer, _ in IOI_HEADS[reader])
        between = {"between": range(first, last), "first": range(first, min(1, last)), "none": range(0)}[mlps]
        # an MLP works at one position, so it carries to a reader what is at that reader's position
        steps = [(f"m{layer}", role) for layer in between for role in dict.fromkeys(inputs.values())]
        for source in sources:
            found += [(source, target, role) for target, role in (*readers, *steps)]
        for (step, at), (target, role) in itertools.product(steps, (*readers, *steps)):
            if at == role:
                found.append((step, target, role))
    return _existing(graph, found)


def _greater_than(graph: Graph, mlps: MLPs) -> dict[str, frozenset[str]]:
    early, middle = ([_name(head) for head in GREATER_THAN_HEADS[group]] for group in ("early", "middle"))
    first, late = ([f"m{layer}" for layer in GREATER_THAN_MLPS[group]] for group in ("early", "late"))

    def inputs(names: Iterable[str]) -> list[str]:
        return [reader for name in names for reader in ([name] if name[0] == "m" else [f"{name}<{x}>" for x in "qkv"])]

    joined = [
        (["input"], inputs([*early, *first])),
        # of the early heads only 0.1 goes through the MLPs
        (early[:1], first),
        (early, inputs(middle)),
        (first, inputs(middle)),
        (first, first),
        (middle, late),
        (late, late),
        ([*middle, *late], ["logits"]),
    ]
    # the queries of the middle heads are left whole in the paper
    carried = {"between": range(9), "first": range(1), "none": range(0)}[mlps]
    steps = [f"m{layer}" for layer in carried]
    joined += [(steps, steps), (steps, [f"{head}<q>" for head in middle])]
    return _existing(graph, ((s, r, "") for sources, readers in joined for s, r in itertools.product(sources, readers)))


def _docstring(graph: Graph, mlps: MLPs) -> dict[str, frozenset[str]]:
    return {edge: frozenset(roles) for edge, roles in _DOCSTRING.items()}


_GPT2_SMALL = ("GPT-2 small", (12, 12, 12, True, False, 0))
_CIRCUITS = {
    "ioi": (*_GPT2_SMALL, _ioi),
    "greater-than": (*_GPT2_SMALL, _greater_than),
    "docstring": ("attn-only-4l", (4, 8, 8, False, False, 0), _docstring),
}
