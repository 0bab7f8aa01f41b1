"""GGUF files: read lazily, dequantised, and laid out as a native decoder."""

from mi_jax.models.checkpoints.errors import CheckpointError as CheckpointError
from mi_jax.models.checkpoints.gguf.architectures import ARCHITECTURES as ARCHITECTURES
from mi_jax.models.checkpoints.gguf.architectures import read_config as read_config
from mi_jax.models.checkpoints.gguf.file import GGUF as GGUF
from mi_jax.models.checkpoints.gguf.file import open_gguf as open_gguf
from mi_jax.models.checkpoints.gguf.load import load_gguf as load_gguf
