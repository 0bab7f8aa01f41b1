"""Scores of all edges: gradients, integrals, corrections of both, and what they approximate."""

from mi_jax.circuits.scores.methods import METHODS as METHODS
from mi_jax.circuits.scores.methods import Method as Method
from mi_jax.circuits.scores.methods import edge_scores as edge_scores
