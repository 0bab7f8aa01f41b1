"""Runs of circuits: the masked forward, resumed where it can be, and what many circuits do on the prompts of a task."""

from mi_jax.circuits.runs.circuits import CircuitRuns as CircuitRuns
from mi_jax.circuits.runs.circuits import circuit_runs as circuit_runs
from mi_jax.circuits.runs.exact import exact_edges as exact_edges
from mi_jax.circuits.runs.masked import masked_forward as masked_forward
from mi_jax.circuits.runs.sources import source_outputs as source_outputs
