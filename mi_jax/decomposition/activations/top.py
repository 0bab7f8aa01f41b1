"""Activations that keep the largest: TopK, AbsTopK and BatchTopK.

Sources: Gao et al. 2024 (TopK, arXiv 2406.04093); Bussmann et al. 2024 (BatchTopK, 2412.06410).
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from mi_jax.decomposition.activations.base import Activation, Chosen
from mi_jax.decomposition.codes import Pairs, Placed, dense
from mi_jax.decomposition.selection import kth_largest, largest_of_batch, top_k

# Pre-activations that are held at once where nothing needs the whole batch's: on a CPU, of few enough tokens to stay in
# its cache until the largest are chosen; elsewhere as many as memory has room for, since each block costs its launches.
TOKENS_AT_ONCE = 512
HELD_AT_ONCE = 2**29


class TopK(Activation):
    """z keeps the k largest h of each token, as far as they are positive.

    Attributes:
      k: places per token.
      k_now: how many of them are used, a traced number up to k (a schedule's, or one training's of several); None: all.
    """

    k: int = eqx.field(static=True)
    k_now: Int[Array, ""] | None = None

    def _largest(self, h: Array, bias: Array | None) -> tuple[Array, Array]:
        return top_k(h, self.k, bias)

    def places_of(
        self, h: Float[Array, "token d_sae"], bias: Float[Array, " d_sae"] | None = None
    ) -> tuple[Array, Array]:
        """Pre-activations h + bias and latents of the kept places, largest first; unused places hold `d_sae` and 0."""
        values, latents = self._largest(h, bias)
        if self.k_now is None:
            return values, latents
        used = jnp.arange(self.k)[None, :] < self.k_now
        return jnp.where(used, values, 0.0), jnp.where(used, latents, h.shape[1])

    def choose(self, x, w_enc, b_enc, valid=None):
        def by_blocks(size):
            def places(x, w_enc, b_enc):
                n = x.shape[0]

                def some(rows):
                    return self.places_of(rows @ w_enc.T, b_enc)

                if n <= size or n % size:
                    return some(x)
                h, latents = lax.map(some, x.reshape(-1, size, x.shape[1]))
                return h.reshape(n, -1), latents.reshape(n, -1)

            return places

        large = max(TOKENS_AT_ONCE, 1 << (HELD_AT_ONCE // w_enc.shape[0]).bit_length() - 1)
        args = (x, w_enc, b_enc)
        h, latents = lax.platform_dependent(*args, cpu=by_blocks(TOKENS_AT_ONCE), default=by_blocks(large))
        return Chosen(h, Placed(latents), jnp.array(True))

    def value(self, h, at, b_enc):
        return jax.nn.relu(h)

    def dense(self, h, b_enc, *, training: bool = False):
        values, latents = self.places_of(h)
        return dense(self.value(values, lambda p: p, b_enc), Placed(latents), h.shape[1])


class AbsTopK(TopK):
    """z keeps the k entries of each token with the largest |h|, signs included."""

    def _largest(self, h, bias):
        h = h if bias is None else h + bias[None, :]
        _, latents = top_k(jnp.abs(h), self.k)
        return jnp.take_along_axis(h, latents, axis=1), latents

    def value(self, h, at, b_enc):
        return h


class BatchTopK(Activation):
    """z keeps the k · batch largest positive h of a training batch; outside training those over a fixed threshold.

    Attributes:
      threshold: running mean of the smallest code that training kept.
      k: codes per token, on average over a batch.
      k_now: how many of them are used, a traced number up to k; None: all.
    """

    threshold: Float[Array, ""]
    k: int = eqx.field(static=True)
    k_now: Int[Array, ""] | None = None

    def choose(self, x, w_enc, b_enc, valid=None):
        n = x.shape[0]
        products, n_codes = x @ w_enc.T, None if self.k_now is None else self.k_now * n
        if valid is not None:
            products = jnp.where(valid[:, None], products, -jnp.inf)
            n_codes = (self.k if self.k_now is None else self.k_now) * valid.sum(dtype=jnp.int32)
        values, tokens, latents = largest_of_batch(products, self.k * n, b_enc)
        if n_codes is not None:
            kept = values >= kth_largest(values, n_codes)
            values, latents = jnp.where(kept, values, 0.0), jnp.where(kept, latents, w_enc.shape[0])
        # a place without a code must not move anything
        latents = jnp.where(values > 0, latents, w_enc.shape[0])
        return Chosen(values, Pairs(tokens, latents, n), jnp.array(True))

    def value(self, h, at, b_enc):
        return jax.nn.relu(h)

    def dense(self, h, b_enc, *, training: bool = False):
        if not training:
            return jnp.where(h > self.threshold, jax.nn.relu(h), 0.0)
        n, d_sae = h.shape
        values, tokens, latents = largest_of_batch(h, self.k * n)
        if self.k_now is not None:
            values = jnp.where(values >= kth_largest(values, self.k_now * n), values, 0.0)
        return dense(values, Pairs(tokens, latents, n), d_sae)

    def scaled(self, factor):
        return eqx.tree_at(lambda a: a.threshold, self, self.threshold * factor)
