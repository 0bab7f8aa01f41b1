"""Switch: a router sends every token to one block of latents, whose TopK codes carry the router's probability.

Source: Mudide et al. 2024 (arXiv 2410.08201).
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mi_jax.decomposition.activations.base import Activation, Chosen, at_places
from mi_jax.decomposition.codes import Placed, attach, dense
from mi_jax.decomposition.selection import top_k


class Switch(Activation):
    """z = p_e · TopK(h of the latents of expert e), e = argmax p, p = softmax((x − b_router) routerᵀ).

    The experts own equal blocks of latents, in order.

    Attributes:
      router: one row per expert.
      b_router: what is taken off an activation before it is routed; `x` here is the centred activation.
      k: codes per token.
    """

    router: Float[Array, "expert d_in"]
    b_router: Float[Array, " d_in"]
    k: int = eqx.field(static=True)

    def probabilities(self, x: Float[Array, "token d_in"]) -> Float[Array, "token expert"]:
        """p of every expert."""
        return jax.nn.softmax((x - self.b_router[None, :]) @ self.router.T, axis=-1)

    def load_balance(
        self, x: Float[Array, "token d_in"], valid: Bool[Array, " token"] | None = None
    ) -> Float[Array, ""]:
        """n_experts · Σ_e (share of tokens sent to e) · (mean probability of e); 1 where both are even."""
        p = self.probabilities(x)
        sent = jax.nn.one_hot(p.argmax(1), p.shape[1], dtype=p.dtype)
        weight = jnp.ones(p.shape[0], p.dtype) if valid is None else valid.astype(p.dtype)
        weight = (weight / jnp.maximum(weight.sum(), 1.0))[None, :]
        return p.shape[1] * ((weight @ sent) * (weight @ p)).sum()

    def dense(self, h, b_enc, *, training: bool = False):
        raise NotImplementedError("a switch reads activations, not pre-activations: call `encode`")

    def value(self, h, at, b_enc):
        return jax.nn.relu(h)

    def encode(self, x, w_enc, b_enc, *, training: bool = False):
        p = self.probabilities(x)
        h, latents = self._places(x @ w_enc.T + b_enc[None, :], p.argmax(1))
        return dense(jax.nn.relu(h) * p.max(1)[:, None], Placed(latents), w_enc.shape[0])

    def choose(self, x, w_enc, b_enc, valid=None):
        h, latents = self._places(x @ w_enc.T + b_enc[None, :], self.probabilities(x).argmax(1))
        return Chosen(h, Placed(latents), jnp.array(True))

    def codes(self, chosen, x, centre, w_enc, b_enc):
        h = attach(chosen.h, chosen.where, x, centre, w_enc, b_enc)
        p = self.probabilities(x - centre[None, :])
        return self.value(h, at_places(chosen.where), b_enc) * p.max(1)[:, None], h

    def _places(self, h: Array, expert: Int[Array, " token"]) -> tuple[Array, Array]:
        n_experts, d_sae = self.router.shape[0], h.shape[1]
        blocks = h.reshape(-1, n_experts, d_sae // n_experts)
        own = jnp.take_along_axis(blocks, expert[:, None, None], 1)[:, 0]
        values, places = top_k(own, self.k)
        return values, places + (expert * (d_sae // n_experts)).astype(places.dtype)[:, None]

    def scaled(self, factor):
        # the router's logits must not change when activations are `factor` times as large
        return eqx.tree_at(lambda a: (a.router, a.b_router), self, (self.router / factor, self.b_router * factor))
