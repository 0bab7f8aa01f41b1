"""Raw models: one functional decoder, its checkpoints, generation and sharding."""

from mi_jax.models.checkpoints.errors import CheckpointError as CheckpointError
from mi_jax.models.checkpoints.gguf import GGUF as GGUF
from mi_jax.models.checkpoints.gguf import load_gguf as load_gguf
from mi_jax.models.checkpoints.gguf import open_gguf as open_gguf
from mi_jax.models.checkpoints.gguf import read_config as read_config
from mi_jax.models.checkpoints.huggingface import load as load
from mi_jax.models.checkpoints.saving import save as save
from mi_jax.models.config import DecoderConfig as DecoderConfig
from mi_jax.models.config import PatchConfig as PatchConfig
from mi_jax.models.config import RopeScaling as RopeScaling
from mi_jax.models.decoder import Decoder as Decoder
from mi_jax.models.generate import Generated as Generated
from mi_jax.models.generate import generate as generate
from mi_jax.models.parameters import abstract_decoder as abstract_decoder
from mi_jax.models.parameters import init_decoder as init_decoder
from mi_jax.models.parameters import logical_axes as logical_axes
from mi_jax.models.smollm2 import smollm2_path as smollm2_path
