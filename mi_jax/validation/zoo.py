"""Organisms that come with the project, so that nothing has to be trained to try something."""

from pathlib import Path

import safetensors.numpy

from mi_jax.validation.organism import Organism, organism_from_arrays

_FILE = Path(__file__).with_name("organism.safetensors")


def load_organism() -> Organism:
    """The organism of `experiments.pipeline` with seed 0: the checkpoint `validation` of such a run."""
    return organism_from_arrays(safetensors.numpy.load(_FILE.read_bytes()))
