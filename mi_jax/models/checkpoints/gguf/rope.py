"""How a GGUF file describes rotary positions for long contexts."""

import dataclasses
import math

import numpy as np

from mi_jax.models.checkpoints.errors import CheckpointError
from mi_jax.models.checkpoints.gguf.file import GGUF
from mi_jax.models.checkpoints.gguf.metadata import Metadata
from mi_jax.models.config import DecoderConfig, RopeScaling
from mi_jax.models.rotary import rotations

FACTORS = "rope_freqs.weight"


def scaling_from_metadata(meta: Metadata, n_ctx: int) -> RopeScaling | None:
    """Linear and yarn scaling, which have metadata; a factor without a type is linear, as for llama.cpp's reader.

    Raises:
      CheckpointError: another kind of scaling, or a factor that is not positive.
    """
    # older files have the factor under another name; 0 stands for none
    factor = meta.real("rope.scaling.factor", meta.real("rope.scale_linear", 0.0))
    kind = meta.text("rope.scaling.type", "linear" if factor else "none")
    n_ctx_original = meta.whole("rope.scaling.original_context_length", n_ctx)
    gain = meta.real("rope.scaling.attn_factor", 1.0) * meta.real("rope.scaling.yarn_attn_factor", 1.0)
    fast = meta.real("rope.scaling.yarn_beta_fast", 32.0)
    slow = meta.real("rope.scaling.yarn_beta_slow", 1.0)
    mixed = meta.real("rope.scaling.yarn_ext_factor", 1.0)
    meta.value("rope.scaling.finetuned", False)
    if kind == "linear" and factor > 0 and gain == 1.0:
        return RopeScaling("linear", factor) if factor != 1.0 else None
    if kind == "yarn" and factor > 0 and mixed == 1.0:
        usual = 0.1 * math.log(factor) + 1.0 if factor > 1.0 else 1.0
        attention_factor = None if gain == 1.0 else gain * usual
        return RopeScaling(
            "yarn", factor, n_ctx_original, beta_fast=fast, beta_slow=slow, attention_factor=attention_factor
        )
    if kind != "none" or gain != 1.0:
        raise CheckpointError(
            f"{meta.file.path}: rotary scaling {kind!r} with factor {factor:g}, attention factor {gain:g} and "
            f"extrapolation {mixed:g} is not read; 'linear' and 'yarn' are, with a positive factor, 'linear' without "
            "an attention factor"
        )
    return None


def scaling_from_factors(file: GGUF, config: DecoderConfig) -> RopeScaling | None:
    """The scaling of the metadata or, where there is none, of the table of divisors that files of Llama 3 have.

    Raises:
      CheckpointError: the table is not that of any Llama 3 scaling with the low and high frequency factors 1 and 4, or
        comes on top of another scaling.
    """
    if FACTORS not in file.tensors or config.positions != "rotary":
        return config.rope_scaling
    n_pairs = config.n_rotary // 2
    if file.shape(FACTORS) != (n_pairs,):
        raise CheckpointError(f"{file.path}: tensor {FACTORS!r} has shape {file.shape(FACTORS)}, expected {(n_pairs,)}")
    factors = file.read(FACTORS)
    if (factors == 1).all():
        return config.rope_scaling
    plain = dataclasses.replace(config, n_layers=1, windows=(), rope_layers=(), rope_scaling=None)
    if config.rope_scaling is None and np.isfinite(factors).all() and factors.min() >= 1:
        expected = _frequency(plain) / factors
        # the divisor of the slowest pair, as it was before it became float32
        factor = float(str(factors.max()))
        for n_ctx_original in (8192, 4096, 2048, 16384, 32768, 65536, 131072):
            scaling = RopeScaling("llama3", factor, n_ctx_original)
            if np.allclose(_frequency(dataclasses.replace(plain, rope_scaling=scaling)), expected, rtol=1e-4, atol=0):
                return scaling
    raise CheckpointError(
        f"{file.path}: the rotary factors in {FACTORS!r} ({factors.min():g} to {factors.max():g}) are not those of a "
        "Llama 3 scaling alone, and others are not read"
    )


def _frequency(config: DecoderConfig) -> np.ndarray:
    return rotations(config)[0][0]
