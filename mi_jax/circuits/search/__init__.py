"""Search for circuits: ACDC, learned masks, and the choice of edges by score."""

from mi_jax.circuits.search.acdc import ACDC as ACDC
from mi_jax.circuits.search.acdc import acdc as acdc
from mi_jax.circuits.search.learned import LearnedMask as LearnedMask
from mi_jax.circuits.search.learned import MaskTraining as MaskTraining
from mi_jax.circuits.search.learned import learn_mask as learn_mask
from mi_jax.circuits.search.objective import OBJECTIVES as OBJECTIVES
from mi_jax.circuits.search.select import circuit_of_size as circuit_of_size
from mi_jax.circuits.search.select import select_edges as select_edges
