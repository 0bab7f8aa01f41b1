"""What the runs of all circuits of a model on some prompts have in common, computed once (`mi_jax.circuits.kept`)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mi_jax.circuits.folded import Folded, folded
from mi_jax.circuits.graph import Graph
from mi_jax.circuits.sources import embedded
from mi_jax.models.attention import read_together
from mi_jax.models.block import Block, block
from mi_jax.models.decoder import Decoder
from mi_jax.models.layout import Prompts
from mi_jax.models.norm import Norm

READS = ("attn.q_in", "attn.k_in", "attn.v_in")


class Written(NamedTuple):
    """What the sources of a run write; of heads what goes into their output matrix, which is smaller by their number.

    Attributes:
      z: of the heads.
      mlp: of the MLPs; None where there are none.
    """

    z: Float[Array, "layer batch pos head d_head"]
    mlp: Float[Array, "layer batch pos d_model"] | None


class Shared(NamedTuple):
    """What the runs of all circuits have in common.

    Attributes:
      ablated: what ablated sources write: those of another run, or any values `[source batch pos d_model]`.
      source: how what the input writes in the clean run differs from that.
      bases: the stream of the ablated sources where attention and where the MLP of every layer read it.
      last: the same after the last layer.
      projections: of the readers.
      projected: queries, keys and values of the ablated stream, which readers without an edge have.
      first: those of the clean stream before the first layer, whose readers have nothing else to read.
    """

    ablated: Written | Float[Array, "source batch pos d_model"]
    source: Float[Array, "batch pos d_model"]
    bases: Float[Array, "layer 2 batch pos d_model"]
    last: Float[Array, "batch pos d_model"]
    projections: Folded
    projected: Float[Array, "layer reader batch pos d_head"]
    first: Float[Array, "reader batch pos d_head"]


def has_constant_rest(model: Decoder) -> bool:
    """Whether what no source writes (biases) is the same in every run: not where a norm follows a bias."""
    return model.blocks.attn.o_bias is None or _weight(model.blocks.attn_post_norm) is None


def splits_by_run(model: Decoder) -> bool:
    """Whether the run of the ablated prompts is enough to ablate with (`shared_with_run`).

    Not where a norm follows the heads, nor with experts.
    """
    return _weight(model.blocks.attn_post_norm) is None and not Graph.of(model.config).n_experts


def shared(model: Decoder, tokens: Int[Array, "batch pos"], patch: Float[Array, "source batch pos d_model"]) -> Shared:
    """Computes it for any values of ablated sources, of a model that `has_constant_rest`."""
    graph, blocks = Graph.of(model.config), model.blocks
    rest = blocks.attn.o_bias if _weight(blocks.attn_post_norm) is None else _bias(blocks.attn_post_norm)
    later = _bias(blocks.mlp_post_norm) if graph.n_experts else None
    # when each is added to the stream: at 2 · layer, the MLP at 2 · layer + 1
    moments = np.arange(graph.n_layers, dtype=np.int32)[:, None] * 2
    of_source = np.r_[-1, (moments + np.r_[[0] * graph.n_heads, [1] * graph.mlp_sources][None, :]).reshape(-1)]

    def stream(until: np.ndarray) -> Array:
        # a running sum, as a product: XLA's own is slow on a CPU
        total = jnp.einsum("is,sbpd->ibpd", jnp.asarray(of_source[None, :] < until[:, None], patch.dtype), patch)
        for bias, moment in ((rest, moments[:, 0]), (later, moments[:, 0] + 1)):
            if bias is not None:
                added = jnp.asarray(moment[None, :] < until[:, None], patch.dtype)
                total = total + (added @ bias.astype(patch.dtype))[:, None, None, :]
        return total

    moments = moments + np.array([0, 0 if graph.parallel else 1])
    *bases, last = stream(np.append(moments, 2 * graph.n_layers))
    bases = jnp.stack(bases).reshape(graph.n_layers, 2, *patch.shape[1:])
    projected = jax.lax.map(lambda row: _projected(*row), (blocks, bases[:, 0]))
    return _shared(model, patch, embedded(model, tokens), bases, last, projected)


def shared_with_run(
    model: Decoder,
    tokens: Int[Array, "batch pos"],
    ablated: Int[Array, "batch pos"],
    mask: Bool[Array, "batch pos"],
) -> tuple[Shared, Float[Array, "batch pos d_model"]]:
    """Computes it where ablated sources write what they write in other prompts, of a model that `splits_by_run`.

    Both runs are one, so that every weight is read once.

    Returns:
      what runs have in common, and the last stream of the clean run.
    """
    graph, n = Graph.of(model.config), len(tokens)
    x, masks = model.embedded(jnp.concatenate([tokens, ablated]), jnp.concatenate([mask, mask]))
    clean = x[:n]

    def body(x, row):
        number, params = row
        tap = _AblatedTap(n)
        x = block(model.layer(number, params), x, tap, model.config, Prompts(masks))
        seen = tap.seen
        base = jnp.stack([seen["resid_pre"], seen["resid_pre" if graph.parallel else "resid_mid"]])
        projected = jnp.concatenate([seen[name] for name in READS])
        return x, (base, Written(seen["attn.z"], seen["mlp_out"] if graph.has_mlp else None), projected)

    rows = jnp.arange(graph.n_layers, dtype=jnp.int32), model.blocks
    last, (bases, written, projected) = jax.lax.scan(body, x, rows)
    return _shared(model, written, clean, bases, last[n:], projected), last[:n]


class _AblatedTap:
    """A tap that remembers what the prompts from the n-th on show."""

    def __init__(self, n: int):
        self._n = n
        self.seen: dict[str, Array] = {}

    def touches(self, name: str) -> bool:
        return name in READS

    def project(self, name: str, x: Array, norm: Norm | None, w: Array) -> Array:
        """As without a tap."""
        out = read_together(x, norm, w)
        self.seen[name] = jnp.moveaxis(out[self._n :], 2, 0)
        return out

    def __call__(self, name: str, x: Array) -> Array:
        if name in ("resid_pre", "resid_mid", "attn.z", "mlp_out"):
            self.seen[name] = x[self._n :]
        return x


def _shared(
    model: Decoder, ablated: Written | Array, clean: Array, bases: Array, last: Array, projected: Array
) -> Shared:
    projections = folded(model.blocks, has_mlp=Graph.of(model.config).has_mlp)
    first = _projected(jax.tree.map(lambda a: a[0], model.blocks), clean)
    return Shared(ablated, clean - bases[0, 0], bases, last, projections, projected, first)


def _projected(params: Block, x: Float[Array, "batch pos d_model"]) -> Float[Array, "reader batch pos d_head"]:
    """Queries, keys and values of one layer, all of the same stream, without what follows on the projection."""
    out = [read_together(x, params.attn_norm, w) for w in (params.attn.q, params.attn.k, params.attn.v)]
    return jnp.moveaxis(jnp.concatenate(out, 2), 2, 0)


def _weight(norm: Norm | None) -> Array | None:
    return None if norm is None else norm.weight


def _bias(norm: Norm | None) -> Array | None:
    return None if norm is None else norm.bias
