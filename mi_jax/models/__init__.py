"""Raw models: one functional decoder, its checkpoints and its sharding."""

from mi_jax.models.checkpoints.gguf import GGUF as GGUF
from mi_jax.models.checkpoints.gguf import CheckpointError as CheckpointError
from mi_jax.models.checkpoints.gguf import load_gguf as load_gguf
from mi_jax.models.checkpoints.gguf import open_gguf as open_gguf
from mi_jax.models.checkpoints.gguf import read_config as read_config
from mi_jax.models.config import DecoderConfig as DecoderConfig
from mi_jax.models.decoder import Decoder as Decoder
from mi_jax.models.decoder import init_decoder as init_decoder
from mi_jax.models.decoder import logical_axes as logical_axes
from mi_jax.models.smollm2 import smollm2_path as smollm2_path
