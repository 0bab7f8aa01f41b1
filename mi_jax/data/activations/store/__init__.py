"""Activations on disk: sharded, checksummed, read by row, by shuffled piece or in shuffled batches."""

from mi_jax.data.activations.store.bandwidth import ReadBandwidth as ReadBandwidth
from mi_jax.data.activations.store.bandwidth import read_bandwidth as read_bandwidth
from mi_jax.data.activations.store.batches import StoredActivations as StoredActivations
from mi_jax.data.activations.store.layout import StoreError as StoreError
from mi_jax.data.activations.store.reader import ActivationStore as ActivationStore
from mi_jax.data.activations.store.reader import Lost as Lost
from mi_jax.data.activations.store.reader import StoreWarning as StoreWarning
from mi_jax.data.activations.store.writer import write_activations as write_activations
