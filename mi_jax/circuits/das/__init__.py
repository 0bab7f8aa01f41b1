"""Distributed alignment search: which subspace of which activation carries a variable of a causal model."""

from mi_jax.circuits.das.fit import CONTROLS as CONTROLS
from mi_jax.circuits.das.fit import fit_das as fit_das
from mi_jax.circuits.das.result import IIA as IIA
from mi_jax.circuits.das.result import DASResult as DASResult
from mi_jax.circuits.das.subspace import Boundary as Boundary
from mi_jax.circuits.das.subspace import orthonormal as orthonormal
from mi_jax.circuits.das.subspace import principal_angles as principal_angles
from mi_jax.circuits.das.triples import Triples as Triples
