"""The computational graph: sources write to the residual stream, readers read from it, edges join them.

Sources are `input`, every head `a{l}.h{h}` and every MLP `m{l}`. Readers are `a{l}.h{h}<q>` per head, `a{l}.h{h}<k>`
and `<v>` per key/value head, `m{l}` and `logits`. There is an edge where the source is written before the reader reads;
in a parallel block, where attention and MLP read the same stream, none from a layer's heads to its MLP. In a mixture
every expert `m{l}.e{i}` is a source, of what it adds, gate included; the layer has one reader `m{l}`, of the router and
all experts. Heads and experts that go through a norm before they are added write their share of it
(`mi_jax.circuits.runs.sources`). Biases are no sources.
Names follow EAP-IG (Hanna et al. 2024); grouped key/value heads keep their own readers.
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import numpy as np

from mi_jax.circuits.graph import drawing, paths
from mi_jax.core.errors import InputError
from mi_jax.models.config import DecoderConfig


@dataclasses.dataclass(frozen=True)
class Graph:
    """The edges of a decoder of this shape; arrays over edges have shape `[source reader]`.

    Attributes:
      parallel: attention and MLP of a layer read the same stream.
      n_experts: of every layer, each a source; 0 where the MLP is one.
      coupled: what a head writes depends on what all heads of its layer read, by a norm of their sum or of all queries
        together.
      normed_bias: a norm follows a bias of the heads, so that what no source writes differs between runs.
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    has_mlp: bool
    parallel: bool = False
    n_experts: int = 0
    # not part of what a graph is, which the files of other programs say without them
    coupled: bool = dataclasses.field(default=False, compare=False)
    normed_bias: bool = dataclasses.field(default=False, compare=False)

    @classmethod
    def of(cls, config: DecoderConfig) -> "Graph":
        """The graph of a model of this shape.

        Raises:
          InputError: a model whose sources do not add up to the stream, or that has no tokens or no logits.
        """
        _check(config)
        follows = config.norms in ("output", "sandwich")
        return cls(
            config.n_layers,
            config.n_heads,
            config.n_kv_heads,
            config.d_mlp > 0,
            config.parallel,
            config.n_experts,
            coupled=follows or config.qk_norm == "whole",
            normed_bias=follows and config.o_bias,
        )

    @property
    def layer_sources(self) -> int:
        """Heads of one layer, then its MLP or its experts."""
        return self.n_heads + self.mlp_sources

    @property
    def mlp_sources(self) -> int:
        return self.n_experts or int(self.has_mlp)

    @property
    def layer_readers(self) -> int:
        """Queries, keys and values of one layer, then its MLP."""
        return self.n_heads + 2 * self.n_kv_heads + self.has_mlp

    @property
    def n_sources(self) -> int:
        return 1 + self.n_layers * self.layer_sources

    @property
    def n_readers(self) -> int:
        return self.n_layers * self.layer_readers + 1

    @functools.cached_property
    def sources(self) -> tuple[str, ...]:
        names = ["input"]
        for layer in range(self.n_layers):
            names += [f"a{layer}.h{h}" for h in range(self.n_heads)]
            names += [f"m{layer}.e{i}" for i in range(self.n_experts)] or [f"m{layer}"] * self.has_mlp
        return tuple(names)

    @functools.cached_property
    def readers(self) -> tuple[str, ...]:
        names: list[str] = []
        for layer in range(self.n_layers):
            for letter, n in (("q", self.n_heads), ("k", self.n_kv_heads), ("v", self.n_kv_heads)):
                names += [f"a{layer}.h{h}<{letter}>" for h in range(n)]
            names += [f"m{layer}"] * self.has_mlp
        return (*names, "logits")

    @functools.cached_property
    def edges(self) -> np.ndarray:
        """True where an edge exists, `[source reader]`."""
        # the moment of writing or reading: 2·layer for attention, 2·layer + 1 for an MLP that reads after it
        written, later = [-1], 0 if self.parallel else 1
        read: list[int] = []
        for layer in range(self.n_layers):
            written += [2 * layer] * self.n_heads + [2 * layer + later] * self.mlp_sources
            read += [2 * layer] * (self.n_heads + 2 * self.n_kv_heads) + [2 * layer + later] * self.has_mlp
        read.append(2 * self.n_layers)
        return np.asarray(written)[:, None] < np.asarray(read)[None, :]

    @property
    def n_edges(self) -> int:
        return int(self.edges.sum())

    def index(self, edge: str) -> tuple[int, int]:
        """Indices of `source->reader`.

        Raises:
          InputError: no such edge.
        """
        source, _, reader = edge.partition("->")
        s, r = self._places[0].get(source), self._places[1].get(reader)
        if s is not None and r is not None and self.edges[s, r]:
            return s, r
        example = f"'{self.sources[-1]}->logits'"
        raise InputError(f"no edge {edge!r}; edges look like 'input->{self.readers[0]}' or {example}")

    @functools.cached_property
    def _places(self) -> tuple[dict[str, int], dict[str, int]]:
        return {name: i for i, name in enumerate(self.sources)}, {name: i for i, name in enumerate(self.readers)}

    def mask(self, edges: Iterable[str], n_pos: int | None = None) -> np.ndarray:
        """Boolean `[source reader]` with the named edges.

        Args:
          n_pos: for circuits of token edges, `[source reader pos]`: an edge `source->reader@3` is read at position 3
            alone, one without `@` at all of them.

        Raises:
          InputError: no such edge or position.
        """
        out = np.zeros((self.n_sources, self.n_readers, *(() if n_pos is None else (n_pos,))), bool)
        for edge in edges:
            name, _, at = edge.partition("@")
            if at and (n_pos is None or not at.isdecimal() or int(at) >= n_pos):
                have = "no positions: give n_pos" if n_pos is None else f"positions 0 to {n_pos - 1}"
                raise InputError(f"edge {edge!r} names a position, and this mask has {have}")
            out[(*self.index(name), int(at))[: out.ndim] if at else self.index(name)] = True
        return out

    def names(self, mask: np.ndarray) -> list[str]:
        """The names of the edges in a mask; of token edges `source->reader@pos`."""
        found = np.argwhere(mask & self.edges_like(mask))
        return [f"{self.sources[s]}->{self.readers[r]}" + "".join(f"@{p}" for p in at) for s, r, *at in found]

    def edges_like(self, values: np.ndarray) -> np.ndarray:
        """`edges`, at every position where the values have a position axis.

        Raises:
          InputError: an array of another graph.
        """
        if values.ndim not in (2, 3) or values.shape[:2] != self.edges.shape:
            raise InputError(f"this graph has {self.edges.shape} [source reader]; the array given is {values.shape}")
        return self.edges if values.ndim == 2 else np.broadcast_to(self.edges[:, :, None], values.shape)

    def prune(self, mask: np.ndarray, *, ablation: Any = "resample") -> np.ndarray:
        """Drops the edges that change no run of the circuit (`mi_jax.circuits.graph.paths.prune`).

        Args:
          mask: `[source reader]`, or `[source reader pos]`.
          ablation: what the edges outside carry, as in `ablation_values`.
        """
        return paths.prune(self, mask, ablation=ablation)

    @functools.cached_property
    def own_readers(self) -> np.ndarray:
        """True where a reader is part of a source, `[source reader]`.

        A head has its query and the key and value of its group, an MLP or an expert its layer's `m`.
        """
        out = np.zeros((self.n_sources, self.n_readers), bool)
        for s, name in enumerate(self.sources[1:], 1):
            out[s, self.reader_rows(name)] = True
        return out

    @functools.cached_property
    def computes_from(self) -> np.ndarray:
        """True where what a source writes depends on what a reader reads, `[source reader]`.

        These are its own readers, and where heads are `coupled` those of all heads of its layer.
        """
        out = self.own_readers.copy()
        for layer in range(self.n_layers if self.coupled else 0):
            first = 1 + layer * self.layer_sources
            out[first : first + self.n_heads] |= out[first : first + self.n_heads].any(0)
        return out

    @functools.cached_property
    def reader_layers(self) -> np.ndarray:
        """The layer in which every reader reads; the number of layers for the logits. `[reader]`."""
        return np.append(np.repeat(np.arange(self.n_layers), self.layer_readers), self.n_layers)

    def to_json(self, mask: np.ndarray, scores: np.ndarray) -> dict[str, Any]:
        """Nodes and edges of a circuit, for drawing (`mi_jax.circuits.graph.drawing.circuit_json`)."""
        return drawing.circuit_json(self, mask, scores)

    def reader_rows(self, name: str) -> list[int]:
        """Readers that a source (a head, an MLP or an expert) computes from."""
        layer, _, part = name[1:].partition(".")
        base = int(layer) * self.layer_readers
        if name[0] == "m":
            return [base + self.layer_readers - 1]
        head = part.removeprefix("h")
        group = int(head) * self.n_kv_heads // self.n_heads
        k = base + self.n_heads + group
        return [base + int(head), k, k + self.n_kv_heads]


def _check(config: DecoderConfig) -> None:
    reasons = {
        "its norms stand on the stream itself (norms='post')": config.norms == "post",
        "its inputs are images, not tokens": config.patches is not None,
        "it is an encoder without a head and has no logits": config.head == "none",
    }
    for reason, applies in reasons.items():
        if applies:
            raise InputError(f"there is no graph of edges for {config.name}: {reason}")
