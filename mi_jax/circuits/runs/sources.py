"""What the sources write to the residual stream, in a plain run or in any other.

A head or an expert that goes through a norm before it is added (Gemma 2, OLMo 2) writes its share of what the norm
gives: `scale · (w + offset) · z_s`, with the scale that the norm has in that very run. So the shares add up to what is
written, save what belongs to no source: the biases of the attention's output and of the norm.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mi_jax.circuits.graph import Graph
from mi_jax.models.block import Block, block
from mi_jax.models.decoder import Decoder
from mi_jax.models.layout import Prompts
from mi_jax.models.norm import Norm, widened


class SourceTap:
    """A tap that hands what each source of a layer writes, `[source batch pos d_model]`, to `write`, in their order."""

    def __init__(self, graph: Graph, params: Block):
        self._graph, self._params = graph, params
        self._gates: Array | None = None
        self.written: list[Array] = []

    def touches(self, name: str) -> bool:
        return bool(self._graph.n_experts) and name in ("mlp.gates", "mlp.expert_out")

    def __call__(self, name: str, x: Array) -> Array:
        if name == "attn.z":
            # the block adds the heads up in one product, so they are not summed here where no norm follows
            heads = jnp.einsum("bpnh,nhd->nbpd", x, self._params.attn.o)
            self.write(shares(self._params.attn_post_norm, heads, self._params.attn.o_bias))
        elif name == "mlp.gates":
            self._gates = x
        elif name == "mlp.expert_out":
            assert self._gates is not None
            self.write(shares(self._params.mlp_post_norm, jnp.moveaxis(x * self._gates[..., None], 2, 0)))
        elif name == "mlp_out" and not self._graph.n_experts:
            self.write(x[None])
        return x

    def write(self, z: Float[Array, "source batch pos d_model"]) -> None:
        self.written.append(z)


def shares(
    norm: Norm | None, parts: Float[Array, "part batch pos d_model"], bias: Float[Array, " d_model"] | None = None
) -> Float[Array, "part batch pos d_model"]:
    """What each part gives to `norm(Σ parts + bias)`, with the scale of the whole; the parts where there is no norm.

    The shares of all parts and that of the bias add up to what the norm gives, its own bias left out.
    """
    if norm is None or norm.weight is None:
        return parts
    exact = widened(parts)
    total = exact.sum(0) if bias is None else exact.sum(0) + bias.astype(exact.dtype)[None, None, :]
    if norm.bias is not None:
        exact, total = (v - v.mean(-1, keepdims=True) for v in (exact, total))
    scale = norm.scale(total)
    weight = norm.weight.astype(exact.dtype) + norm.offset
    return (exact * (scale * weight[None, None, :])[None]).astype(parts.dtype)


def unsourced(graph: Graph, params: Block) -> tuple[Float[Array, "1 1 d_model"], Float[Array, "1 1 d_model"]]:
    """What the attention and the MLP of a layer add to the stream that is no source's: biases.

    Not where a norm follows a bias of the heads (`Graph.normed_bias`): what it leaves of the bias depends on the run.
    """
    attn, norm = params.attn.o_bias, params.attn_post_norm
    if norm is not None and norm.weight is not None:
        attn = norm.bias
    norm = params.mlp_post_norm
    mlp = norm.bias if norm is not None and graph.n_experts else None
    none = jnp.zeros(params.attn.o.shape[-1], params.attn.o.dtype)
    first, second = (widened(none if bias is None else bias)[None, None] for bias in (attn, mlp))
    return first, second


class PlainRun(eqx.Module):
    """A run without edits.

    Attributes:
      streams: before every layer, and after the last.
      sources: what every source wrote.
    """

    streams: Float[Array, "stream batch pos d_model"]
    sources: Float[Array, "source batch pos d_model"]


def plain_run(
    model: Decoder, tokens: Int[Array, "batch pos"], mask: Bool[Array, "batch pos"] | None = None
) -> PlainRun:
    """The stream before every layer, and what every source writes, in a run without edits."""
    graph = Graph.of(model.config)
    x, mask = model.embedded(tokens, mask)
    n = graph.layer_sources

    def body(carry, row):
        x, sources = carry
        number, params = row
        tap = SourceTap(graph, params)
        after = block(model.layer(number, params), x, tap, model.config, Prompts(mask))
        sources = jax.lax.dynamic_update_slice_in_dim(sources, jnp.concatenate(tap.written), 1 + number * n, 0)
        return (after, sources), x

    numbers = jnp.arange(graph.n_layers, dtype=jnp.int32)
    sources = jnp.zeros((graph.n_sources, *x.shape), x.dtype).at[0].set(x)
    (last, sources), streams = jax.lax.scan(body, (x, sources), (numbers, model.blocks))
    return PlainRun(jnp.concatenate([streams, last[None]]), sources)


def source_outputs(
    model: Decoder, tokens: Int[Array, "batch pos"], mask: Bool[Array, "batch pos"] | None = None
) -> Float[Array, "source batch pos d_model"]:
    """What every source writes to the stream in a run without edits."""
    return plain_run(model, tokens, mask).sources


def embedded(model: Decoder, tokens: Int[Array, "batch pos"]) -> Float[Array, "batch pos d_model"]:
    """The stream before the first layer."""
    return model.embedded(tokens)[0]
