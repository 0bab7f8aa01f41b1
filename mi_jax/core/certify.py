"""Certified attribution: scores beside exact patching of a random sample of nodes.

A score from gradients is an estimate, and how good it is depends on the model, the site and the prompts. So some nodes
are patched exactly, in one program, and the agreement is kept with the scores: Spearman's rank correlation and the
share of equal signs, each with a bootstrap interval over the sampled nodes and with what permuted scores reach.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from mi_jax.core.edits import Patch
from mi_jax.core.effects import Agreement, Check, Effects, mean_metric
from mi_jax.core.errors import InputError
from mi_jax.core.index import Index
from mi_jax.core.transforms import SiteModel

_RESAMPLES = 1000
_NEGLIGIBLE = 1e-5


def certify(
    effects: Effects,
    model: SiteModel,
    metric: Callable,
    base: Shaped[Array, "batch *input"],
    source_acts: Mapping[str, Float[Array, "..."]],
    options: Mapping[str, Any],
    *,
    n_nodes: int,
    signed: bool,
    batch_size: int = 16,
    key: PRNGKeyArray,
) -> Effects:
    """The same effects with `check` filled in; `mi.attribute(…, check=n)` does this.

    Args:
      base: the prompts that are patched; `source_acts` are the values that are put in.
      n_nodes: how many nodes to draw, without repetition, from every site in proportion to its size.
      signed: False for scores that are magnitudes; they are compared with the absolute exact effects.
    """
    k_nodes, k_bootstrap = jax.random.split(key)
    scores, exact = [], []
    for (name, axes), count in zip(effects.axes, _shares(effects, n_nodes), strict=True):
        values = effects.values[name]
        k_nodes, k_site = jax.random.split(k_nodes)
        flat = jax.random.choice(k_site, values.size, (count,), replace=False)
        places = {a: i.astype(jnp.int32) for a, i in zip(axes, jnp.unravel_index(flat, values.shape), strict=True)}

        def patched(place, name=name):
            edit = Patch(name, Index(**place), source_acts[name])
            return mean_metric(metric(model(base, taps={name: (edit,)}, **options)))

        if axes:
            after = jax.lax.map(patched, places, batch_size=min(batch_size, count))
        else:
            after = patched({})[None]
        scores.append(values.reshape(-1)[flat])
        exact.append(after - effects.baseline)
    check = agreement(jnp.concatenate(scores), jnp.concatenate(exact), signed=signed, key=k_bootstrap)
    return dataclasses.replace(effects, check=check)


def _shares(effects: Effects, n_nodes: int) -> list[int]:
    """How many nodes of every site, at least one of each."""
    sizes = np.array([effects.values[name].size for name, _ in effects.axes])
    if n_nodes < 3:
        raise InputError(f"a rank correlation needs at least 3 nodes, got check={n_nodes}")
    shares = np.maximum(1, np.round(sizes * (min(n_nodes, sizes.sum()) / sizes.sum()))).astype(int)
    return np.minimum(shares, sizes).tolist()


def agreement(
    scores: Float[Array, " node"], exact: Float[Array, " node"], *, signed: bool = True, key: PRNGKeyArray
) -> Check:
    """Rank correlation and sign agreement of scores with exact effects.

    Exact effects below 10⁻⁵ of the largest count as none, and so do such scores in the ranks; signs are compared where
    there is an exact effect. Every figure is NaN where a score or an exact effect is not finite.
    """
    k_resample, k_permute = jax.random.split(key)
    rows = jax.random.randint(k_resample, (_RESAMPLES, scores.shape[0]), 0, scores.shape[0])
    orders = jax.vmap(lambda k: jax.random.permutation(k, scores.shape[0]))(jax.random.split(k_permute, _RESAMPLES))

    def rounded(x):
        return jnp.where(jnp.abs(x) <= _NEGLIGIBLE * jnp.abs(x).max(), 0.0, x)

    truth = rounded(exact.astype(scores.dtype))
    # sorting would give a NaN the highest rank, and a resample may miss it
    known = jnp.isfinite(scores).all() & jnp.isfinite(exact).all()

    def measured(statistic: Callable[[Array, Array], Array], found: Array, truth: Array) -> Agreement:
        resampled = jax.vmap(lambda row: statistic(found[row], truth[row]))(rows)
        permuted = jax.vmap(lambda order: statistic(found[order], truth))(orders)
        low, high = jnp.quantile(resampled, jnp.asarray([0.025, 0.975], resampled.dtype))
        figures = (statistic(found, truth), low, high, jnp.quantile(permuted, 0.975))
        return Agreement(*(jnp.where(known, x, jnp.nan) for x in figures))

    ranks = measured(spearman, rounded(scores), truth if signed else jnp.abs(truth))
    return Check(scores, exact, ranks, measured(sign_agreement, scores, truth) if signed else None)


def spearman(a: Float[Array, " node"], b: Float[Array, " node"]) -> Float[Array, ""]:
    """Rank correlation, ties by their mean rank; 0 where one side is constant."""
    x, y = (_ranks(v) - v.shape[0] / 2 for v in (a, b))
    scale = jnp.sqrt((x * x).sum() * (y * y).sum())
    return jnp.where(scale > 0, (x * y).sum() / jnp.where(scale > 0, scale, 1.0), 0.0)


def _ranks(x: Array) -> Array:
    """Ranks from 1/2 to n − 1/2, whose mean is n/2 without rounding."""
    ordered = jnp.sort(x)
    low, high = (jnp.searchsorted(ordered, x, side=side) for side in ("left", "right"))
    return (low + high).astype(x.dtype) / 2


def sign_agreement(scores: Float[Array, " node"], truth: Float[Array, " node"]) -> Float[Array, ""]:
    """Share of the nodes with a true effect whose score has its sign; 0 where no node has an effect."""
    counted = truth != 0
    same = counted & (jnp.sign(scores) == jnp.sign(truth))
    return same.sum().astype(scores.dtype) / jnp.maximum(counted.sum(), 1).astype(scores.dtype)
