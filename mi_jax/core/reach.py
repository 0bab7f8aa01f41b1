"""Whether anything that a node does can get to another, by the order in which a model computes its sites."""

from collections.abc import Mapping, Sequence

import equinox as eqx
import jax
import jax.core
import numpy as np
from jaxtyping import Bool

from mi_jax.core.index import index_axis
from mi_jax.core.nodes import Node
from mi_jax.core.sites import LAYER, SiteError, SiteTable

# What each site of a layer is computed from, in the order of computation; "stream" is what enters the layer. A site
# that a model lacks still passes on what it reads. `_reads` has what differs between models.
_READS = {
    "resid_pre": ("stream",),
    "attn.q_in": ("resid_pre",),
    "attn.k_in": ("resid_pre",),
    "attn.v_in": ("resid_pre",),
    "attn.q": ("attn.q_in",),
    "attn.k": ("attn.k_in",),
    "attn.v": ("attn.v_in",),
    "attn.scores": ("attn.q", "attn.k"),
    "attn.pattern": ("attn.scores",),
    "attn.z": ("attn.pattern", "attn.v"),
    "attn.head_out": ("attn.z",),
    "attn_out": ("attn.head_out",),
    "resid_mid": ("resid_pre", "attn_out"),
    "resid_mid_normalized": ("resid_mid",),
    "mlp.in": ("resid_mid_normalized",),
    "mlp.router": ("mlp.in",),
    "mlp.gates": ("mlp.router",),
    "mlp.pre": ("mlp.in",),
    "mlp.post": ("mlp.pre", "mlp.in"),
    "mlp.expert_out": ("mlp.post",),
    "mlp_out": ("mlp.expert_out",),
    "resid_post": ("resid_mid_normalized", "mlp_out"),
    "resid_post_normalized": ("resid_post",),
}
_OUTSIDE = ("embed", "final_norm", "logits")


def check_path(
    table: SiteTable, sender: Node, receivers: Sequence[Node], held: Sequence[str], through: Sequence[Node]
) -> None:
    """Raises SiteError where nothing that the sender does can get to a receiver."""
    if any(place.site not in (*_READS, *_OUTSIDE) for place in (sender, *receivers)):
        return
    reads = _reads(table)
    reached, stopped = _follow(table, reads, sender, receivers, held, through)
    if reached:
        return
    ends = " or ".join(dict.fromkeys(map(_described, receivers)))
    if _follow(table, reads, sender, receivers, (), ())[0]:
        raise SiteError(
            f"every path from {_described(sender)} to {ends} passes {', '.join(stopped)}, which is held at its base "
            "value, so the effect would be 0: name the component of the sender in through=…, or send from its output"
        )
    if _parallel(table) and _follow(table, _READS, sender, receivers, (), ())[0]:
        raise SiteError(
            f"no path leads from {_described(sender)} to {ends}: the blocks of {table.model} are parallel, so the MLP "
            "of a layer reads the stream before the heads of that layer write to it, and the effect would be 0: "
            "receive at a later layer, or send from an earlier one"
        )
    raise SiteError(
        f"no path leads from {_described(sender)} to {ends}, which is computed before it or beside it, so the effect "
        "would be 0: send from an earlier place or receive at a later one"
    )


def _parallel(table: SiteTable) -> bool:
    """Whether attention and MLP read the same stream; `mlp.in` then equals `resid_pre`, and there is no `resid_mid`."""
    return {"resid_pre", "attn_out", "mlp.in"} <= set(table.names) and "resid_mid" not in table.names


def _reads(table: SiteTable) -> dict[str, tuple[str, ...]]:
    """What each site of a layer of this model is computed from."""
    reads = dict(_READS)
    if _parallel(table):
        reads |= {"mlp.in": ("resid_pre",)}
    if "mlp.gates" in table.names:
        # only of a mixture: elsewhere this would lead around the hidden layer of the MLP
        reads |= {"mlp_out": ("mlp.expert_out", "mlp.gates")}
    return reads


def _follow(
    table: SiteTable,
    reads_of: Mapping[str, tuple[str, ...]],
    sender: Node,
    receivers: Sequence[Node],
    held: Sequence[str],
    through: Sequence[Node],
) -> tuple[bool, tuple[str, ...]]:
    """Whether the sender reaches a receiver, and the held sites that stop it."""
    sizes, stopped = dict(table.sizes), {}
    n_layers = sizes.get(LAYER, 1)
    sent, free, ends = (_by_site(places, table) for places in ((sender,), through, receivers))
    reached = False

    def at(name: str, layer: int, incoming: Sequence[np.ndarray]) -> np.ndarray:
        """Which heads of a site depend on the sender; one entry where it has no heads."""
        nonlocal reached
        site = next((s for s in table.sites if s.name == name), None)
        n = 1 if site is None else sizes.get(index_axis(site, "head") or "", 1)
        value = np.any([_heads(x, n) for x in incoming], axis=0)
        nowhere = np.zeros((n_layers, n), bool)
        if name in held:
            if (value & ~free.get(name, nowhere)[layer]).any():
                stopped[name] = None
            value = value & free.get(name, nowhere)[layer]
        value = value | sent.get(name, nowhere)[layer]
        reached = reached or bool((value & ends.get(name, nowhere)[layer]).any())
        return value

    stream = at("embed", 0, [np.zeros(1, bool)])
    for layer in range(n_layers):
        found = {"stream": stream}
        for name, reads in reads_of.items():
            found[name] = at(name, layer, [found[read] for read in reads])
        stream = found["resid_post_normalized"]
    at("logits", 0, [at("final_norm", 0, [stream])])
    return reached, tuple(stopped)


def _heads(x: Bool[np.ndarray, " head"], n: int) -> Bool[np.ndarray, " n"]:
    """Dependence per head for a site with n heads: the same heads, those of a group, or all of them."""
    return np.repeat(x, n // len(x)) if n % len(x) == 0 else np.full(n, x.any())


def _by_site(places: Sequence[Node], table: SiteTable) -> dict[str, Bool[np.ndarray, "layer head"]]:
    """The layers and heads of nodes; all of them where an index is traced or `mi.each`."""
    sizes, out = dict(table.sizes), {}
    for place in places:
        site, _ = table.resolve(place.site)
        hit = np.ones((sizes.get(LAYER, 1), sizes.get(index_axis(site, "head") or "", 1)), bool)
        for axis, index in enumerate((place.index.layer, place.index.head)):
            if eqx.is_array(index) and not isinstance(index, jax.core.Tracer) and hit.shape[axis] > 1:
                chosen = np.isin(np.arange(hit.shape[axis]), np.asarray(index) % hit.shape[axis])
                hit &= np.expand_dims(chosen, 1 - axis)
        out[place.site] = out.get(place.site, np.zeros_like(hit)) | hit
    return out


def _described(place: Node) -> str:
    """A node in words, such as `attn.z (layer=2, head=1)`."""
    known = [f"{k}={_index(v)}" for k, v in place.index.items() if k in ("layer", "head")]
    return f"{place.site!r}" + (f" ({', '.join(known)})" if known else "")


def _index(value: object) -> object:
    known = eqx.is_array(value) and not isinstance(value, jax.core.Tracer)
    return np.asarray(value).tolist() if known else "…" if isinstance(value, jax.core.Tracer) else value
