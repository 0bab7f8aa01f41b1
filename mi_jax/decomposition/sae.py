"""TopK sparse autoencoder: x ≈ b_dec + Σ_j z_j w_dec[j] with at most k of the d_sae codes z_j positive.

Source: Gao et al. 2024, "Scaling and evaluating sparse autoencoders", §2.3 (TopK) and appendix A.2 (AuxK).
"""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mi_jax.decomposition.sparse import sparse_decode, topk_encode


@dataclasses.dataclass(frozen=True)
class SAEConfig:
    """Shape of a dictionary and of its auxiliary loss.

    Attributes:
      d_model: width of the activations.
      d_sae: number of latents.
      k: codes kept per token.
      k_aux: dead latents that model what is left over of a token.
      aux_coefficient: weight of that auxiliary loss.
      aux_candidates: when more latents than this are dead, only this many take part in a step.
    """

    d_model: int
    d_sae: int
    k: int
    k_aux: int = 64
    aux_coefficient: float = 0.2
    aux_candidates: int = 256

    def __post_init__(self):
        for name in ("d_model", "d_sae", "k", "k_aux", "aux_candidates"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if max(self.k, self.k_aux) > self.d_sae:
            raise ValueError(f"k={self.k} and k_aux={self.k_aux} must be at most d_sae={self.d_sae}")
        if self.k_aux > self.aux_candidates:
            raise ValueError(f"k_aux={self.k_aux} must be at most aux_candidates={self.aux_candidates}")


class SAE(eqx.Module):
    """Calling it gives the reconstruction, so it is a value for `mi.transform`. Units are those of the activations."""

    w_enc: Float[Array, "d_sae d_model"]
    b_enc: Float[Array, " d_sae"]
    w_dec: Float[Array, "d_sae d_model"]
    b_dec: Float[Array, " d_model"]
    k: int = eqx.field(static=True)

    def encode_sparse(
        self, x: Float[Array, "*batch d_model"]
    ) -> tuple[Float[Array, "*batch k"], Int[Array, "*batch k"]]:
        """Values (not negative, largest first) and latent indices of the k codes of every token."""
        values, indices = topk_encode(self._centre(x), self.w_enc, self.b_enc, self.k)
        shape = (*x.shape[:-1], self.k)
        return jax.nn.relu(values).reshape(shape), indices.reshape(shape)

    def encode(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch d_sae"]:
        """Dense codes, zero outside the k places."""
        values, indices = self.encode_sparse(x)
        zeros = jnp.zeros((*x.shape[:-1], self.w_enc.shape[0]), values.dtype)
        return jnp.put_along_axis(zeros, indices, values, axis=-1, inplace=False)

    def decode(self, codes: Float[Array, "*batch d_sae"]) -> Float[Array, "*batch d_model"]:
        """Reconstruction from dense codes, whatever their sparsity."""
        return codes @ self.w_dec + jnp.broadcast_to(self.b_dec, (*codes.shape[:-1], self.b_dec.shape[0]))

    def __call__(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch d_model"]:
        values, indices = topk_encode(self._centre(x), self.w_enc, self.b_enc, self.k)
        return (sparse_decode(jax.nn.relu(values), indices, self.w_dec) + self.b_dec[None, :]).reshape(x.shape)

    def _centre(self, x: Array) -> Array:
        d_model = self.b_dec.shape[0]
        if x.shape[-1] != d_model:
            raise ValueError(f"the dictionary reads activations of width {d_model}, got shape {x.shape}")
        return x.reshape(-1, d_model) - self.b_dec[None, :]


def init(config: SAEConfig, *, key: Array, mean: Float[Array, " d_model"] | None = None) -> SAE:
    """Random decoder rows of unit norm, encoder equal to the decoder, no encoder bias.

    Args:
      config: the dictionary's shape.
      key: draws the directions.
      mean: start of b_dec; zero if not given.
    """
    w_dec = unit_rows(jax.random.normal(key, (config.d_sae, config.d_model)))
    b_dec = jnp.zeros(config.d_model) if mean is None else mean
    return SAE(w_enc=w_dec, b_enc=jnp.zeros(config.d_sae), w_dec=w_dec, b_dec=b_dec, k=config.k)


def unit_rows(w: Float[Array, "d_sae d_model"]) -> Float[Array, "d_sae d_model"]:
    """Every row divided by its norm."""
    return w / jnp.maximum(jnp.linalg.norm(w, axis=-1, keepdims=True), 1e-8)


class Losses(eqx.Module):
    """What one batch cost: squared errors per dimension, and how often each latent fired."""

    reconstruction: Float[Array, ""]
    auxiliary: Float[Array, ""]
    fired: Float[Array, " d_sae"]


def loss(
    sae: SAE, x: Float[Array, "batch d_model"], dead: Bool[Array, " d_sae"], config: SAEConfig
) -> tuple[Float[Array, ""], Losses]:
    """mean (x − x̂)² + α · min(n_dead / k_aux, 1) · mean (e − ê)².

    e = x − x̂ carries no gradient, and ê = z_aux w_dec is its reconstruction (without b_dec) from the k_aux dead latents
    of largest pre-activation.
    """
    centred = x - sae.b_dec[None, :]
    values, indices = topk_encode(centred, sae.w_enc, sae.b_enc, sae.k)
    values = jax.nn.relu(values)
    error = centred - sparse_decode(values, indices, sae.w_dec)
    fired = jnp.zeros(sae.w_enc.shape[0], x.dtype).at[indices].add((values > 0).astype(x.dtype))

    target, source = jax.lax.stop_gradient((error, centred))
    # dead latents come first; there are few, so that dense products with their rows are cheap
    _, rows = jax.lax.top_k(dead.astype(jnp.int32), min(config.aux_candidates, dead.shape[0]))
    h = jnp.where(dead[rows][None, :], source @ sae.w_enc[rows].T + sae.b_enc[rows][None, :], -jnp.inf)
    kept = h >= jax.lax.top_k(h, config.k_aux)[0][:, -1:]
    guess = jnp.where(kept, jax.nn.relu(h), 0.0) @ sae.w_dec[rows]
    auxiliary = jnp.minimum(dead.sum() / config.k_aux, 1.0) * jnp.mean((target - guess) ** 2)

    reconstruction = jnp.mean(error**2)
    return reconstruction + config.aux_coefficient * auxiliary, Losses(reconstruction, auxiliary, fired)


def logical_axes(sae: SAE) -> SAE:
    """The same tree with the names of each array's axes, for `mi_jax.core.sharding.shard`."""
    rows = ("d_sae", "d_model")
    return eqx.tree_at(lambda s: (s.w_enc, s.b_enc, s.w_dec, s.b_dec), sae, (rows, ("d_sae",), rows, ("d_model",)))
