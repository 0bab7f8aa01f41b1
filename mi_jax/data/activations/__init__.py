"""Activations as training data: straight from a model, or from disk, in shuffled batches that can be found again."""

from mi_jax.data.activations.permutation import permute as permute
from mi_jax.data.activations.permutation import permute_host as permute_host
from mi_jax.data.activations.shuffled import Shuffled as Shuffled
from mi_jax.data.activations.store import ActivationStore as ActivationStore
from mi_jax.data.activations.store import StoredActivations as StoredActivations
from mi_jax.data.activations.store import StoreError as StoreError
from mi_jax.data.activations.store import StoreWarning as StoreWarning
from mi_jax.data.activations.store import read_bandwidth as read_bandwidth
from mi_jax.data.activations.store import write_activations as write_activations
from mi_jax.data.activations.stream import ActivationStream as ActivationStream
from mi_jax.data.activations.usable import usable_tokens as usable_tokens
from mi_jax.data.activations.window import Activations as Activations
from mi_jax.data.activations.window import Window as Window
