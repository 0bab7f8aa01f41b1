"""A small dictionary of which everything is known, so that these tests depend on no training."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


class Toy(eqx.Module):
    """z = ReLU(x @ w_encᵀ + b_enc), x̂ = z @ w_dec + b_dec."""

    w_enc: Array
    b_enc: Array
    w_dec: Array
    b_dec: Array
    n_sites: int = eqx.field(static=True, default=1)

    def encode(self, x):
        return jax.nn.relu(x @ self.w_enc.T + jnp.broadcast_to(self.b_enc, (*x.shape[:-1], self.b_enc.shape[0])))

    def decode(self, codes):
        return codes @ self.w_dec + jnp.broadcast_to(self.b_dec, (*codes.shape[:-1], self.b_dec.shape[0]))

    def __call__(self, x):
        return self.decode(self.encode(x))


def random_toy(seed: int, d_in: int, d_sae: int, d_out: int | None = None, **options) -> Toy:
    rng = np.random.default_rng(seed)
    arrays = [rng.normal(size=s) for s in ((d_sae, d_in), (d_sae,), (d_sae, d_out or d_in), (d_out or d_in,))]
    arrays[1] -= 1.0
    return Toy(*(jnp.asarray(a, jnp.float32) for a in arrays), **options)


def aligned_toy(directions, threshold: float = 0.0) -> Toy:
    """Encoder and decoder are the given directions: on orthogonal ones, codes are the true coefficients."""
    rows = jnp.asarray(directions, jnp.float32)
    return Toy(rows, jnp.full(rows.shape[0], -threshold), rows, jnp.zeros(rows.shape[1]))
