"""Dictionaries of the MLPs of tiny decoders: random ones, and ones trained on their activations."""

import functools

import jax
import jax.numpy as jnp

import mi_jax as mi
from mi_jax.circuits.features import ReplacementModel, replacement_model
from mi_jax.decomposition import CrossLayerConfig, DictionaryConfig, Objective, TrainConfig, fit_cross_layer, init
from mi_jax.decomposition.cross_layer_config import init_cross_layer
from tests.models.tiny import prompts, tiny

D, D_SAE, LAYERS, K = 8, 16, 3, 3


def noisy(tree, key):
    """With every number moved, so that no bias is zero."""
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(
        treedef, [a + 0.2 * jax.random.normal(k, a.shape, a.dtype) for a, k in zip(leaves, keys, strict=True)]
    )


@functools.cache
def skips() -> ReplacementModel:
    """A transcoder with a skip for each layer, on the stream itself."""
    config = DictionaryConfig(D, D_SAE, k=K, transcoder=True, skip=True)
    keys = jax.random.split(jax.random.key(4), LAYERS)
    return replacement_model(tiny("llama"), [noisy(init(config, key=k), k) for k in keys])


@functools.cache
def cross_layer() -> ReplacementModel:
    """A cross-layer transcoder that reads through the norm of the MLP, in a model with biases everywhere."""
    key = jax.random.key(5)
    transcoder = noisy(init_cross_layer(CrossLayerConfig(D, D_SAE, LAYERS, "relu"), key=key), key)
    return replacement_model(tiny("gpt2"), transcoder, reads="resid_mid", normalized=True)


@functools.cache
def trained(steps: int = 150) -> ReplacementModel:
    """A cross-layer transcoder trained on what the MLPs of a tiny decoder read and write."""
    model = tiny("llama")
    tokens = prompts(11, batch=192, n_pos=6)
    _, acts = mi.jit(mi.capture(model, "mlp.in", "mlp_out"))(tokens, output=False)
    x, y = (jnp.moveaxis(acts[site], 0, 2).reshape(-1, LAYERS, D) for site in ("mlp.in", "mlp_out"))
    schedule = TrainConfig(
        steps=steps, batch_size=128, learning_rate=1e-2, warmup_steps=10, decoder="free", steps_per_call=50
    )
    config = CrossLayerConfig(D, 4 * D_SAE, LAYERS, k=2 * K)
    objective = Objective(auxiliary="auxk", k_aux=8)
    found, _ = fit_cross_layer(x, y, config, objective, schedule, key=jax.random.key(6))
    return replacement_model(model, found)
