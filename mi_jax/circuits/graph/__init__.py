"""The computational graph of a decoder, paths through it, and the choice of edges."""

from mi_jax.circuits.graph.graph import Graph as Graph
