"""Massive activations, which dictionaries neither train on nor are scored on; see `data.activations.massive`."""

from mi_jax.data.activations.massive import massive as massive
from mi_jax.data.activations.massive import massive_limit as massive_limit
from mi_jax.data.activations.massive import norms as norms
