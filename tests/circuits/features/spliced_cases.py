"""A two-layer decoder with dictionaries at four places, and its runs with a place's activations replaced."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import mi_jax as mi
from mi_jax.circuits.features import splice_dictionaries
from mi_jax.decomposition import DictionaryConfig, init
from tests.circuits.features.dictionaries import noisy
from tests.circuits.tiny_task import model, task

TOLERANCE = 2e-5
D_SAE = 12
PLACES = (("resid_post", 0), ("attn_out", 1), ("mlp_out", 1), ("resid_post", 1))


@functools.cache
def spliced(places=PLACES):
    keys = jax.random.split(jax.random.key(8), len(PLACES))
    kinds = ("relu", "topk", "relu", "jumprelu")
    made = {
        place: noisy(init(DictionaryConfig(8, D_SAE, kind, k=4), key=k), k)
        for place, kind, k in zip(PLACES, kinds, keys, strict=True)
    }
    return splice_dictionaries(model(), {place: made[place] for place in places})


@functools.cache
def acts():
    sites = {"resid_post", "attn_out", "mlp_out"}
    run = mi.jit(mi.capture(model(), *sorted(sites)))
    t = task()
    return tuple(
        {place: found[place[0]][place[1]] for place in PLACES}
        for found in (run(tokens, t.mask)[1] for tokens in (t.clean, t.corrupt))
    )


@functools.cache
def nodes_of(place):
    """Clean and corrupt codes and errors, worked out from the dictionary's own equations; alike at padding."""
    one = spliced().dictionaries[place]
    out = []
    for x in (found[place] for found in acts()):
        z = one.encode(x)
        out.append((z, x - one.decode(z)))
    (z, e), (z_other, e_other) = out
    real = task().mask[:, :, None]
    z_other, e_other = (jnp.where(jnp.broadcast_to(real, a.shape), b, a) for a, b in ((z, z_other), (e, e_other)))
    return z, e, z_other, e_other


@eqx.filter_jit
def metric(place_site, layer, value):
    """The mean metric with a place's activations replaced."""
    t = task()
    run = mi.intervene(model(), mi.patch(place_site, value, layer=layer))
    return t.metric(run(t.clean, t.mask, output_pos=t.position)).mean()


def close(a, b):
    assert np.abs(np.asarray(a) - np.asarray(b)).max() < TOLERANCE * max(1.0, np.abs(np.asarray(b)).max())
