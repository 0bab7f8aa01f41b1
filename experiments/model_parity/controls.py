"""What the figures would be if something were wrong: a decoder with one other setting, and one with moved weights."""

import dataclasses

import jax
import jax.numpy as jnp

from mi_jax.models import Decoder, DecoderConfig


def other_setting(config: DecoderConfig) -> tuple[str, DecoderConfig]:
    """The first of the settings that set a family apart, left out or changed, and its name.

    The parameters fit both configurations, so that a loader that overlooked the setting would give just this model.
    """
    for name, left_out in (("rope_scaling", None), ("score_softcap", 0.0), ("windows", ()), ("rope_layers", ())):
        if getattr(config, name) != left_out:
            return name, dataclasses.replace(config, **{name: left_out})
    if config.n_experts:
        return "renormalize_experts", dataclasses.replace(config, renormalize_experts=not config.renormalize_experts)
    if config.rope_adjacent:
        return "rope_adjacent", dataclasses.replace(config, rope_adjacent=False)
    if config.rope_dim is not None and config.rope_dim < config.d_head:
        return "rope_dim", dataclasses.replace(config, rope_dim=None)
    if config.positions == "rotary":
        return "rope_theta", dataclasses.replace(config, rope_theta=config.rope_theta / 10)
    exact = config.activation == "gelu_exact"
    return "activation", dataclasses.replace(config, activation="gelu" if exact else "gelu_exact")


def with_other_setting(model: Decoder) -> tuple[str, Decoder]:
    """The same parameters under `other_setting`."""
    name, config = other_setting(model.config)
    return name, dataclasses.replace(model, config=config)


def with_layers_reversed(model: Decoder) -> Decoder:
    """The same layers in the opposite order: a checkpoint whose tensors are whole and in the wrong places."""
    return dataclasses.replace(model, blocks=jax.tree.map(lambda x: jnp.flip(x, 0), model.blocks))
