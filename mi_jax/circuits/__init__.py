"""Circuits: the computational graph, edge scores, search, faithfulness, and alignment with causal variables.

`discover` finds a circuit, `edge_scores` ranks all edges, `evaluate_circuit` says how good a circuit is. By package:
`scores` and `search` (methods), `metrics` (figures and tests), `scrubbing` (causal scrubbing), `features` (circuits of
dictionaries' features), `formats` (files), `das` (alignment with causal variables).
"""

from mi_jax.circuits import features as features
from mi_jax.circuits import formats as formats
from mi_jax.circuits import metrics as metrics
from mi_jax.circuits import scrubbing as scrubbing
from mi_jax.circuits.ablation.values import ablation_values as ablation_values
from mi_jax.circuits.ablation.values import optimal_ablation as optimal_ablation
from mi_jax.circuits.das import IIA as IIA
from mi_jax.circuits.das import Boundary as Boundary
from mi_jax.circuits.das import DASResult as DASResult
from mi_jax.circuits.das import Triples as Triples
from mi_jax.circuits.das import fit_das as fit_das
from mi_jax.circuits.das import principal_angles as principal_angles
from mi_jax.circuits.discover import SEARCHES as SEARCHES
from mi_jax.circuits.discover import Circuit as Circuit
from mi_jax.circuits.discover import discover as discover
from mi_jax.circuits.graph import Graph as Graph
from mi_jax.circuits.graph.known import KnownCircuit as KnownCircuit
from mi_jax.circuits.graph.known import induction_circuit as induction_circuit
from mi_jax.circuits.graph.known import known_circuit as known_circuit
from mi_jax.circuits.graph.selection import select_edges as select_edges
from mi_jax.circuits.metrics import CircuitReport as CircuitReport
from mi_jax.circuits.metrics import evaluate_circuit as evaluate_circuit
from mi_jax.circuits.metrics.faithfulness import FRACTIONS as FRACTIONS
from mi_jax.circuits.metrics.faithfulness import Curve as Curve
from mi_jax.circuits.metrics.faithfulness import curve as curve
from mi_jax.circuits.metrics.faithfulness import faithfulness as faithfulness
from mi_jax.circuits.metrics.faithfulness import random_curves as random_curves
from mi_jax.circuits.metrics.faithfulness import random_edges as random_edges
from mi_jax.circuits.metrics.faithfulness import top_edges as top_edges
from mi_jax.circuits.runs.divergence import kl_divergence as kl_divergence
from mi_jax.circuits.runs.exact import exact_edges as exact_edges
from mi_jax.circuits.runs.masked import masked_forward as masked_forward
from mi_jax.circuits.runs.neurons import neuron_curve as neuron_curve
from mi_jax.circuits.runs.neurons import neuron_faithfulness as neuron_faithfulness
from mi_jax.circuits.runs.sources import source_outputs as source_outputs
from mi_jax.circuits.scores import METHODS as METHODS
from mi_jax.circuits.scores import edge_scores as edge_scores
from mi_jax.circuits.scores.neurons import neuron_scores as neuron_scores
from mi_jax.circuits.scores.neurons import top_neurons as top_neurons
from mi_jax.circuits.scores.nodes import node_scores as node_scores
from mi_jax.circuits.search import acdc as acdc
from mi_jax.circuits.search import learn_mask as learn_mask
from mi_jax.circuits.search.plateau import Plateau as Plateau
from mi_jax.circuits.search.plateau import plateau as plateau
from mi_jax.circuits.search.plateau import plateau_circuit as plateau_circuit
