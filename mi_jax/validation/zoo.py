"""Organisms that come with the project, so that nothing has to be trained to try something."""

from pathlib import Path

import safetensors.numpy

from mi_jax.core.errors import InputError
from mi_jax.validation.organism import Organism, organism_from_arrays

_FILES = ("organism.safetensors", "organism_1.safetensors")
ORGANISMS = len(_FILES)


def load_organism(number: int = 0) -> Organism:
    """An organism that passes `quality`; the checkpoint `validation` of a run of `experiments.pipeline`.

    Raises:
      InputError: no organism of that number.
    """
    if not 0 <= number < ORGANISMS:
        raise InputError(f"there are organisms 0 to {ORGANISMS - 1}; got {number}")
    return organism_from_arrays(safetensors.numpy.load(Path(__file__).with_name(_FILES[number]).read_bytes()))
