"""What is said about circuits: rankings, completeness, minimality, stability, controls and tests of hypotheses."""

from mi_jax.circuits.metrics.completeness import Completeness as Completeness
from mi_jax.circuits.metrics.completeness import Minimality as Minimality
from mi_jax.circuits.metrics.completeness import completeness as completeness
from mi_jax.circuits.metrics.completeness import minimality as minimality
from mi_jax.circuits.metrics.controls import matched_edges as matched_edges
from mi_jax.circuits.metrics.controls import random_circuits as random_circuits
from mi_jax.circuits.metrics.hypotheses import HypothesisTest as HypothesisTest
from mi_jax.circuits.metrics.hypothesis_runs import HypothesisTests as HypothesisTests
from mi_jax.circuits.metrics.hypothesis_runs import hypothesis_tests as hypothesis_tests
from mi_jax.circuits.metrics.ranking import EdgeRanking as EdgeRanking
from mi_jax.circuits.metrics.ranking import edge_ranking as edge_ranking
from mi_jax.circuits.metrics.ranking import mib_auroc as mib_auroc
from mi_jax.circuits.metrics.report import CircuitReport as CircuitReport
from mi_jax.circuits.metrics.report import Curves as Curves
from mi_jax.circuits.metrics.report import evaluate_circuit as evaluate_circuit
from mi_jax.circuits.metrics.report import evaluate_curves as evaluate_curves
from mi_jax.circuits.metrics.single import CircuitMetrics as CircuitMetrics
from mi_jax.circuits.metrics.single import Compared as Compared
from mi_jax.circuits.metrics.single import circuit_metrics as circuit_metrics
from mi_jax.circuits.metrics.stability import Stability as Stability
from mi_jax.circuits.metrics.stability import bootstrap_stability as bootstrap_stability
from mi_jax.circuits.metrics.stability import group_stability as group_stability
from mi_jax.circuits.metrics.stability import per_prompt_scores as per_prompt_scores
from mi_jax.circuits.metrics.stability import split_stability as split_stability
from mi_jax.circuits.metrics.stability import stability_of as stability_of
from mi_jax.circuits.metrics.stability import task_stability as task_stability
