"""Dictionaries with random parameters, and the same parameters as the oracle reads them."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from mi_jax.decomposition import Dictionary, DictionaryConfig, init

D_IN, D_SAE, K, TOKENS, EXPERTS = 6, 32, 3, 10, 4

TOPOLOGIES = {
    "sae": {},
    "transcoder": {"transcoder": True, "d_out": 4},
    "skip_transcoder": {"transcoder": True, "d_out": 4, "skip": True},
    "crosscoder": {"n_sites": 2},
}


def config_of(activation: str, topology: str = "sae", **fields) -> DictionaryConfig:
    return DictionaryConfig(D_IN, D_SAE, activation, k=K, n_experts=EXPERTS, **(TOPOLOGIES[topology] | fields))


def random_dictionary(config: DictionaryConfig, seed: int = 0, dtype=jnp.float32) -> Dictionary:
    """Every number drawn; thresholds near the pre-activations' spread, pursuit's rows of unit norm."""
    drawn = init(config, key=jax.random.key(seed))
    leaves, tree = jax.tree.flatten(drawn)
    rng = np.random.default_rng(seed)
    leaves = [leaf + jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype) for leaf in leaves]
    dictionary = jax.tree.unflatten(tree, leaves)
    threshold = getattr(dictionary.activation, "threshold", None)
    if threshold is not None:
        new = jnp.asarray(0.4 + 0.3 * rng.uniform(size=threshold.shape), threshold.dtype)
        dictionary = eqx.tree_at(lambda d: d.activation.threshold, dictionary, new)
    if dictionary.w_enc is None:
        rows = dictionary.w_dec / jnp.linalg.norm(dictionary.w_dec, axis=1, keepdims=True)
        dictionary = eqx.tree_at(lambda d: d.w_dec, dictionary, rows)
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if eqx.is_inexact_array(leaf) else leaf, dictionary)


def activations(seed: int = 1, tokens: int = TOKENS, width: int = D_IN, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(tokens, width)), dtype)


def parameters(dictionary: Dictionary) -> dict[str, np.ndarray]:
    """What the oracle reads."""
    found = {"w_enc": dictionary.encoder, "b_enc": dictionary.b_enc, "w_dec": dictionary.w_dec}
    found |= {"b_dec": dictionary.b_dec, "centre": dictionary.centre}
    if dictionary.w_skip is not None:
        found["w_skip"] = dictionary.w_skip
    for name in ("r_mag", "b_mag", "threshold", "router", "b_router"):
        if hasattr(dictionary.activation, name):
            found[name] = getattr(dictionary.activation, name)
    return {name: np.asarray(value, np.float64) for name, value in found.items()}
