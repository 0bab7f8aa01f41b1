"""How often latents fire: dead ones, dense ones, and the distribution between them."""

import numpy as np
from jaxtyping import Float, Int

# of log10 of the fraction of tokens
DENSITY_EDGES = tuple(np.linspace(-5.0, 0.0, 21))

# Latents that fire on more than this share of tokens are seldom features (Bricken et al. 2023, "ultra-dense cluster").
DENSE_THRESHOLD = 0.1


def dead_fraction(density: Float[np.ndarray, " d_sae"]) -> float:
    """Share of latents that never fire."""
    return float((density == 0).mean())


def dense_fraction(density: Float[np.ndarray, " d_sae"], threshold: float = DENSE_THRESHOLD) -> float:
    """Share of latents that fire on more than `threshold` of the tokens."""
    return float((density > threshold).mean())


def density_histogram(density: Float[np.ndarray, " d_sae"]) -> Int[np.ndarray, " bin"]:
    """Latents per bin of log10 density, between `DENSITY_EDGES`.

    Dead latents are in none; those below the lowest edge are in the first bin.
    """
    alive = density[density > 0]
    return np.histogram(np.clip(np.log10(alive), DENSITY_EDGES[0], DENSITY_EDGES[-1]), DENSITY_EDGES)[0]
