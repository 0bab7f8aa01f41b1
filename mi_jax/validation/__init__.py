"""Validation: networks with known mechanisms, and how well what was found agrees with what is there."""

from mi_jax.validation.alignment import Agreement as Agreement
from mi_jax.validation.alignment import Null as Null
from mi_jax.validation.alignment import agreement as agreement
from mi_jax.validation.alignment import layer_matched_null as layer_matched_null
from mi_jax.validation.alignment import random_null as random_null
from mi_jax.validation.behaviour import Behaviour as Behaviour
from mi_jax.validation.behaviour import behaviour as behaviour
from mi_jax.validation.edge_dropout import resampled_forward as resampled_forward
from mi_jax.validation.organism import Organism as Organism
from mi_jax.validation.organism import OrganismConfig as OrganismConfig
from mi_jax.validation.organism import organism_arrays as organism_arrays
from mi_jax.validation.organism import organism_from_arrays as organism_from_arrays
from mi_jax.validation.organism import train_organism as train_organism
from mi_jax.validation.planting import DESIGN as DESIGN
from mi_jax.validation.planting import planted_decoder as planted_decoder
from mi_jax.validation.truth import Truth as Truth
from mi_jax.validation.truth import verify as verify
from mi_jax.validation.zoo import load_organism as load_organism
