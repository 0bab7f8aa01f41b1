"""The same small causal network, written in seven ways that a user of Flax or Equinox would write it, and in numpy."""

import functools
from typing import Any, NamedTuple, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from mi_jax.models.adapters.equinox import adapt_equinox
from mi_jax.models.adapters.linen import adapt_linen
from mi_jax.models.adapters.nnx import adapt_nnx

LAYERS, D, HIDDEN = 3, 4, 6
X = jax.random.normal(jax.random.key(0), (2, 5, D))


def _before(x):
    """What a position reads: the sum of the positions up to it."""
    return jnp.cumsum(x, -2)


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + nn.Dense(D, name="down")(jnp.tanh(nn.Dense(HIDDEN, name="up")(_before(x))))


class LinenPlain(nn.Module):
    block: type[nn.Module] = LinenBlock

    @nn.compact
    def __call__(self, x):
        for i in range(LAYERS):
            x = self.block(name=f"block_{i}")(x)
        return x


class _Body(nn.Module):
    block: type[nn.Module]

    @nn.compact
    def __call__(self, x, _):
        return self.block(name="block")(x), None


class LinenScanned(nn.Module):
    block: type[nn.Module] = LinenBlock
    axis: int = 0

    @nn.compact
    def __call__(self, x):
        body = nn.scan(_Body, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=LAYERS)
        return body(self.block, name="blocks")(x, None)[0]


class NNXBlock(nnx.Module):
    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(D, HIDDEN, rngs=rngs), nnx.Linear(HIDDEN, D, rngs=rngs)

    def __call__(self, x):
        return x + self.down(jnp.tanh(self.up(_before(x))))


class NNXPlain(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([NNXBlock(rngs) for _ in range(LAYERS)])

    def __call__(self, x):
        for block in self.blocks:
            x = nnx.remat(lambda block, x: block(x))(block, x)
        return x


class NNXScanned(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.vmap(NNXBlock, in_axes=0, out_axes=0)(rngs.split(LAYERS))

    def __call__(self, x):
        return nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.blocks)


class EquinoxBlock(eqx.Module):
    """Works on one example, as Equinox models do; the linear maps on one position."""

    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, key):
        up, down = jax.random.split(key)
        self.up, self.down = eqx.nn.Linear(D, HIDDEN, key=up), eqx.nn.Linear(HIDDEN, D, key=down)

    def __call__(self, x):
        return x + jax.vmap(self.down)(jnp.tanh(jax.vmap(self.up)(_before(x))))


class EquinoxPlain(eqx.Module):
    blocks: list[EquinoxBlock]

    def __init__(self, key):
        self.blocks = [EquinoxBlock(k) for k in jax.random.split(key, LAYERS)]

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class EquinoxScanned(eqx.Module):
    blocks: EquinoxBlock

    def __init__(self, key):
        self.blocks = eqx.filter_vmap(EquinoxBlock)(jax.random.split(key, LAYERS))

    def __call__(self, x):
        arrays, static = eqx.partition(self.blocks, eqx.is_array)

        def body(x, one):
            return eqx.combine(one, static)(x), None

        return jax.lax.scan(jax.checkpoint(body), x, arrays)[0]


class Form(NamedTuple):
    """One way of writing the network: adapted, called by itself, and its weights `[layer …]` for numpy."""

    adapted: Any
    plain: Any
    variables: Any
    weights: dict[str, np.ndarray]


FORMS = ["linen", "linen-remat", "linen-scan", "nnx", "nnx-scan", "equinox", "equinox-scan"]


def over_batch(variables, x):
    return jax.vmap(variables)(x)


def _stacked(layers) -> dict[str, np.ndarray]:
    """Weights by name, `up` and `down` as `[layer in out]`, from one tree per layer or from stacked ones."""
    return {name: np.stack([np.asarray(layer[name], np.float64) for layer in layers]) for name in layers[0]}


@functools.cache
def form(name: str) -> Form:
    """The network in one of its forms, with sites `up` and `down` and the canonical names of the stream."""
    framework, _, kind = name.partition("-")
    key = jax.random.key(1)
    if framework == "linen":
        block = nn.remat(LinenBlock) if kind else LinenBlock
        # parameters of scanned layers need not be stacked in front
        net = LinenScanned(block, axis=1) if kind == "scan" else LinenPlain(block)
        variables = net.init(key, X)
        at = "blocks/block" if kind == "scan" else "block_{layer}"
        adapted, plain = adapt_linen(net, variables, X, names=_names(at)), net.apply
        params = variables["params"]
        if kind == "scan":
            per_layer = [jax.tree.map(lambda a, i=i: jnp.take(a, i, 1), params["blocks"]["block"]) for i in range(3)]
        else:
            per_layer = [params[f"block_{i}"] for i in range(3)]
        layers = [
            {f"{part}.{x}": p[part][y] for part in ("up", "down") for x, y in (("w", "kernel"), ("b", "bias"))}
            for p in per_layer
        ]
    elif framework == "nnx":
        net = (NNXScanned if kind else NNXPlain)(nnx.Rngs(1))
        graph, variables = nnx.split(net)
        at = "blocks" if kind else "blocks/{layer}"
        adapted = adapt_nnx(net, X, names=_names(at))

        def plain(variables, x):
            return nnx.merge(graph, variables, copy=True)(x)

        blocks = [jax.tree.map(lambda a, i=i: a[i], nnx.state(net.blocks)) for i in range(3)] if kind else None
        per_layer = blocks or [nnx.state(block) for block in cast(Any, net.blocks)]
        layers = [
            {f"{part}.{x}": p[part][y][...] for part in ("up", "down") for x, y in (("w", "kernel"), ("b", "bias"))}
            for p in per_layer
        ]
    else:
        net = variables = (EquinoxScanned if kind else EquinoxPlain)(key)
        at = "blocks" if kind else "blocks/{layer}"
        adapted, plain = adapt_equinox(net, X, call=over_batch, names=_names(at)), over_batch
        blocks = [jax.tree.map(lambda a, i=i: a[i], net.blocks) for i in range(3)] if kind else cast(Any, net.blocks)
        layers = [
            {f"{part}.w": getattr(b, part).weight.T for part in ("up", "down")}
            | {f"{part}.b": getattr(b, part).bias for part in ("up", "down")}
            for b in blocks
        ]
    return Form(adapted, plain, variables, _stacked(layers))


def _names(block: str) -> dict[str, Any]:
    return {
        "resid_pre": f"{block}:in",
        "mlp.pre": f"{block}/up",
        "mlp_out": f"{block}/down",
        "resid_post": block,
    }


def numpy_run(weights, x, edit=lambda site, layer, value: value):
    """The network in numpy: its output and its sites, `edit(site, layer, value)` applied where the model has them."""
    x, acts = np.asarray(x, np.float64), {}

    def tap(site, layer, value):
        value = edit(site, layer, value)
        acts.setdefault(site, []).append(value)
        return value

    for layer in range(LAYERS):
        w = {name: a[layer] for name, a in weights.items()}
        x = tap("resid_pre", layer, x)
        pre = tap("mlp.pre", layer, np.cumsum(x, 1) @ w["up.w"] + w["up.b"])
        x = tap("resid_post", layer, x + tap("mlp_out", layer, np.tanh(pre) @ w["down.w"] + w["down.b"]))
    return x, {site: np.stack(values) for site, values in acts.items()}
