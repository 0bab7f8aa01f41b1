"""A linear model with the sites of a transformer, that resumes nothing and has no heads: every effect is a product.

`x += mix · x · W_l` (attention with a constant causal pattern), then `x += x · V_l` (a linear MLP); the output is
x · U.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mi_jax.core.sites import Site, SiteTable
from mi_jax.core.taps import Tap, stacked_rows

N_LAYERS, N_POS, D, D_OUT = 3, 4, 5, 2
_STREAM = ("layer", "batch", "pos", "d_model")
_LAYERED = ("resid_pre", "attn.in", "attn_out", "resid_mid", "mlp.in", "mlp_out", "resid_post")
_TABLE = SiteTable(
    "linear",
    (Site("embed", _STREAM[1:]), *(Site(name, _STREAM) for name in _LAYERED)),
    (("layer", N_LAYERS), ("d_model", D)),
)


class LinearModel(eqx.Module):
    mix: Float[Array, "layer query key"]
    w: Float[Array, "layer d_model d_model"]
    v: Float[Array, "layer d_model d_model"]
    u: Float[Array, "d_model d_out"]

    @property
    def site_table(self):
        return _TABLE

    def __call__(self, x, *, taps=None, capture=None):
        taps = taps or {}
        wanted = [w.site for w in _TABLE.normalise(capture or ())]
        outer = Tap(_TABLE, taps, wanted, {}, None)
        x, rows, seen = outer("embed", x), stacked_rows(taps, _TABLE), []
        for layer in range(N_LAYERS):
            row = jax.tree.map(lambda leaf, layer=layer: leaf[layer], rows)
            tap = Tap(_TABLE, taps, wanted, row, jnp.asarray(layer, jnp.int32))
            x = tap("resid_pre", x)
            x = x + tap("attn_out", jnp.einsum("qk,bkd,de->bqe", self.mix[layer], tap("attn.in", x), self.w[layer]))
            x = tap("resid_mid", x)
            x = x + tap("mlp_out", tap("mlp.in", x) @ self.v[layer])
            x = tap("resid_post", x)
            seen.append(tap.seen)
        output = x @ self.u
        if capture is None:
            return output
        return output, outer.seen | {name: jnp.stack([s[name] for s in seen]) for name in wanted if name in _LAYERED}


def linear_model(seed: int = 0) -> LinearModel:
    keys = jax.random.split(jax.random.key(seed), 4)
    mix = jnp.tril(jax.random.uniform(keys[0], (N_LAYERS, N_POS, N_POS)))
    w, v = (0.5 * jax.random.normal(k, (N_LAYERS, D, D)) for k in keys[1:3])
    return LinearModel(mix, w, v, jax.random.normal(keys[3], (D, D_OUT)))


def inputs(seed: int, batch: int = 2) -> Array:
    return jax.random.normal(jax.random.key(seed), (batch, N_POS, D))


def mean_metric(output) -> Array:
    return (output[:, -1, 0] - output[:, -1, 1]).mean()


def jacobian(model: LinearModel, site: str, layer: int, dropped: int | None = None) -> np.ndarray:
    """The metric's derivative at `attn_out` or `mlp_out` of a layer, `[pos d]` of one of two examples, by products.

    With `dropped`, that layer's contributions pass no gradient.
    """
    mix, w, v = (np.asarray(a, np.float64) for a in (model.mix, model.w, model.v))
    u = np.asarray(model.u, np.float64)
    g = np.zeros((N_POS, D))
    g[-1] = (u[:, 0] - u[:, 1]) / 2
    for i in reversed(range(layer, N_LAYERS)):
        if i == layer and site == "mlp_out":
            return g * (i != dropped)
        g = g + (i != dropped) * g @ v[i].T
        if i == layer:
            return g * (i != dropped)
        g = g + (i != dropped) * mix[i].T @ g @ w[i].T
    raise AssertionError("unreachable")
