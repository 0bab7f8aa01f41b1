"""Rotary positions: how fast each component of a head turns, and the turning.

Sources: Su et al. 2021 (RoPE); Chen et al. 2023 (linear scaling); Peng et al. 2023 (YaRN); the Llama 3 scaling is
defined by its reference code only: wavelengths above n_ctx / low_freq_factor are stretched by `factor`, those below
n_ctx / high_freq_factor are kept, and the frequencies in between are mixed.
"""

import math

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mi_jax.models.config import DecoderConfig, RopeScaling


class Rotation(eqx.Module):
    """How the queries and keys of a layer turn.

    Attributes:
      frequency: in radians per position, of every pair of components.
      gain: multiplies the turned components; None is 1.
    """

    frequency: Float[Array, " pair"]
    gain: Float[Array, ""] | None


def rotation(config: DecoderConfig, layer: Int[Array, ""] | int) -> Rotation | None:
    """The rotation of a layer, a constant where it is that of all; None where positions are not rotary."""
    if config.positions != "rotary":
        return None
    frequencies, gains = rotations(config)
    # a constant of the program: sines and cosines are then computed once, not in every layer
    row = 0 if (frequencies == frequencies[0]).all() and (gains == gains[0]).all() else layer
    gain = None if (gains == 1.0).all() else jnp.asarray(gains)[row]
    return Rotation(jnp.asarray(frequencies)[row], gain)


def rotations(config: DecoderConfig) -> tuple[Float[np.ndarray, "layer pair"], Float[np.ndarray, " layer"]]:
    """Frequencies and gains of all layers, in float32."""
    scaling = config.rope_scaling
    scaled = _scaled(config.rope_theta, config.n_rotary, scaling)
    local = scaled if config.rope_local_theta is None else _scaled(config.rope_local_theta, config.n_rotary, None)
    windows = config.windows or (0,) * config.n_layers
    turns = config.rope_layers or (True,) * config.n_layers
    rows = [(local if window else scaled) * turn for window, turn in zip(windows, turns, strict=True)]
    factor = 1.0 if scaling is None else _gain(scaling)
    is_local = [window > 0 and config.rope_local_theta is not None for window in windows]
    gains = [1.0 if one or not turn else factor for one, turn in zip(is_local, turns, strict=True)]
    return np.stack(rows).astype(np.float32), np.array(gains, np.float32)


def rotate(
    x: Float[Array, "batch pos n d_head"],
    turn: Rotation,
    positions: Int[Array, "#batch #pos"],
    *,
    adjacent: bool = False,
) -> Float[Array, "batch pos n d_head"]:
    """Turns the leading components of every head by `position · frequency`.

    Args:
      adjacent: component 2i turns with 2i+1; otherwise i with i + half.
    """
    half = turn.frequency.shape[-1]
    angle = positions.astype(jnp.float32)[:, :, None] * turn.frequency[None, None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    if turn.gain is not None:
        cos, sin = cos * turn.gain, sin * turn.gain
    cos, sin = (f.astype(x.dtype)[:, :, None, :] for f in (cos, sin))
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    if adjacent:
        pairs = turned.reshape(*x.shape[:3], half, 2)
        a, b = pairs[..., 0], pairs[..., 1]
        turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(*x.shape[:3], 2 * half)
    else:
        a, b = turned[..., :half], turned[..., half:]
        turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
    return turned if rest.shape[-1] == 0 else jnp.concatenate([turned, rest], -1)


def _gain(scaling: RopeScaling) -> float:
    if scaling.kind != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0


def _scaled(theta: float, dim: int, scaling: RopeScaling | None) -> np.ndarray:
    # in float32, as the models were trained: at long contexts the rounding of a frequency is visible
    exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    frequency = np.float32(1) / np.power(np.float32(theta), exponent)
    if scaling is None:
        return frequency
    if scaling.kind == "linear":
        return frequency / np.float32(scaling.factor)
    kept = _kept_llama3(frequency, scaling) if scaling.kind == "llama3" else _kept_yarn(theta, dim, scaling)
    kept = kept.astype(np.float32)
    return frequency / np.float32(scaling.factor) * (1 - kept) + frequency * kept


def _kept_llama3(frequency: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """The share of each frequency that is not stretched."""
    turns = scaling.n_ctx_original * frequency / (2 * np.pi)
    ramp = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return np.clip(ramp, 0, 1)


def _kept_yarn(theta: float, dim: int, scaling: RopeScaling) -> np.ndarray:
    def component(turns: float) -> float:
        """The component that makes so many turns in the original context."""
        return dim * math.log(scaling.n_ctx_original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = component(scaling.beta_fast), component(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (np.arange(dim // 2, dtype=np.float32) - low) / max(high - low, 0.001)
    return 1 - np.clip(ramp, 0, 1)
