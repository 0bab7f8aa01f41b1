"""Dictionaries as other projects store them."""

from mi_jax.decomposition.formats.registry import FORMATS as FORMATS
from mi_jax.decomposition.formats.registry import load as load
from mi_jax.decomposition.formats.registry import recognise as recognise
from mi_jax.decomposition.formats.registry import save as save
