"""Search for circuits: ACDC and learned masks."""

from mi_jax.circuits.search.acdc import ACDC as ACDC
from mi_jax.circuits.search.acdc import acdc as acdc
from mi_jax.circuits.search.learned import LearnedMask as LearnedMask
from mi_jax.circuits.search.learned import MaskTraining as MaskTraining
from mi_jax.circuits.search.learned import learn_mask as learn_mask
from mi_jax.circuits.search.objective import OBJECTIVES as OBJECTIVES
