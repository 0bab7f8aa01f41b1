"""Rules of the backward pass: how it may depart from the derivative.

`PLAIN` is the derivative. `RELP` are the rules of relevance patching (Jafari et al. 2025), after layer-wise relevance
propagation for transformers: the values of the forward pass are the model's own, and in the backward pass

- the scale of a norm is a constant (its centring is not);
- the attention pattern is a constant, so queries and keys get nothing;
- an activation function is the line through the origin and its value, `act(x) = x · constant`;
- of the product of a gate and what it gates, each factor gets half the derivative.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float

from mi_jax.models.block import Layer
from mi_jax.models.decoder import Decoder
from mi_jax.models.mlp import ACTIVATIONS, MLP
from mi_jax.models.norm import Norm, normed


@dataclasses.dataclass(frozen=True)
class Rules:
    """What the backward pass does at the sites of a layer; this one: the derivative."""

    def prepared(self, model: Decoder) -> Decoder:
        """The model that is differentiated, with the same values."""
        return model

    def of(self, layer: Layer, config: Any) -> "SiteRules":
        return SiteRules()


class SiteRules:
    """The rules within one layer: a function at every site that keeps the value."""

    def touches(self, name: str) -> bool:
        return False

    def __call__(self, name: str, x: Array) -> Array:
        return x


class FrozenNorm(Norm):
    """A norm whose scale is a constant in the backward pass."""

    def scale(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch #d_model"]:
        return stop_gradient(super().scale(x))


class _Relevance(Rules):
    def prepared(self, model: Decoder) -> Decoder:
        """With norms whose scale is a constant, those of queries and keys excepted, which get nothing anyway."""

        def frozen(norm: Norm | None) -> Norm | None:
            return None if norm is None else FrozenNorm(norm.weight, norm.bias, norm.eps, norm.offset)

        names = ("attn_norm", "mlp_norm", "attn_post_norm", "mlp_post_norm")
        blocks = dataclasses.replace(
            model.blocks,
            **{name: frozen(getattr(model.blocks, name)) for name in names},
        )
        return dataclasses.replace(model, blocks=blocks, final_norm=frozen(model.final_norm))

    def of(self, layer: Layer, config: Any) -> SiteRules:
        return _RelevanceRules(layer, config)


class _RelevanceRules(SiteRules):
    def __init__(self, layer: Layer, config: Any):
        p = layer.params
        self._mlp, self._act = p.mlp, ACTIVATIONS[config.activation]
        self._norm = p.attn_norm if config.parallel and config.shared_norm else p.mlp_norm
        self._seen: dict[str, Array] = {}

    def touches(self, name: str) -> bool:
        # otherwise a mixture computes the chosen experts only, which have no sites
        return name == "mlp.gates"

    def __call__(self, name: str, x: Array) -> Array:
        if name in ("attn.pattern", "mlp.gates"):
            return stop_gradient(x)
        if name in ("mlp.in", "mlp.pre"):
            self._seen[name] = x
        if name == "mlp.post":
            line = self._line()
            return stop_gradient(x) + line - stop_gradient(line)
        return x

    def _line(self) -> Array:
        """What has the gradient that the rules give the activations."""
        pre = self._seen["mlp.pre"]
        value = self._act(pre)
        small = jnp.abs(pre) < 1e-6
        at_zero = jax.grad(self._act)(jnp.zeros((), pre.dtype))
        slope = jnp.where(small, at_zero, value / jnp.where(small, jnp.ones_like(pre), pre))
        straight = stop_gradient(slope) * pre
        up = self._up()
        if up is None:
            return straight
        return 0.5 * (straight * stop_gradient(up) + stop_gradient(value) * up)

    def _up(self) -> Array | None:
        """What the gate multiplies; computed as the model does, so that it is computed once."""
        p = self._mlp
        h = normed(self._norm, self._seen["mlp.in"])
        if isinstance(p, MLP):
            if p.gate is None:
                return None
            up = h @ p.up
            return up if p.up_bias is None else up + p.up_bias[None, None, :]
        assert p is not None
        return jnp.einsum("bpd,edf->bpef", h, p.up)


PLAIN = Rules()
RELP = _Relevance()
