"""The decoder's equations once more, in float64 numpy with loops over layers, heads and positions: slow and plain."""

import math

import numpy as np


def numpy_sites(model, tokens) -> dict[str, np.ndarray]:
    """Every site for one prompt `[pos]`, as `capture` gives it but without the batch axis."""
    config = model.config
    weights = _Float64(model)
    stream = weights.embed[np.asarray(tokens)]
    if config.positions == "learned":
        stream = stream + weights.pos_embed[: len(tokens)]
    out = {"embed": stream}
    layers = []
    for layer in range(config.n_layers):
        sites, stream = _layer(weights.blocks, layer, stream, config)
        layers.append(sites)
    out |= {name: np.stack([sites[name] for sites in layers]) for name in layers[0]}
    out["final_norm"] = _norm(weights.final_norm, (), stream, config)
    unembed = weights.embed if config.tied else weights.unembed
    out["logits"] = out["final_norm"] @ unembed.T
    return out


class _Float64:
    """Attribute access to a tree of parameters, leaves as float64 numpy."""

    def __init__(self, tree):
        self._tree = tree

    def __getattr__(self, name):
        value = getattr(self._tree, name)
        return np.asarray(value, np.float64) if hasattr(value, "dtype") else _Float64(value)


def _layer(blocks, layer, stream, config):
    n_pos, n_heads, d_head = len(stream), config.n_heads, config.d_head
    n_kv = config.n_kv_heads
    sites = {"resid_pre": stream}
    for reader, n in (("q", n_heads), ("k", n_kv), ("v", n_kv)):
        sites[f"attn.{reader}_in"] = np.stack([stream] * n, 1)
        projected = np.zeros((n_pos, n, d_head))
        for pos in range(n_pos):
            for head in range(n):
                read = _norm(blocks.attn_norm, (layer,), stream[pos], config)
                row = read @ getattr(blocks.attn, reader)[layer, :, head]
                turns = reader in "qk" and config.positions == "rotary"
                projected[pos, head] = _rotated(row, pos, config.rope_theta) if turns else row
        sites[f"attn.{reader}"] = projected

    scores = np.full((n_heads, n_pos, n_pos), -np.inf)
    pattern = np.zeros((n_heads, n_pos, n_pos))
    z = np.zeros((n_pos, n_heads, d_head))
    head_out = np.zeros((n_pos, n_heads, config.d_model))
    for head in range(n_heads):
        group = head // (n_heads // n_kv)
        for query in range(n_pos):
            for key in range(query + 1):
                scores[head, query, key] = (
                    sites["attn.q"][query, head] @ sites["attn.k"][key, group] / math.sqrt(d_head)
                )
            unnormalised = np.exp(scores[head, query] - scores[head, query].max())
            pattern[head, query] = unnormalised / unnormalised.sum()
            z[query, head] = pattern[head, query] @ sites["attn.v"][:, group]
            head_out[query, head] = z[query, head] @ blocks.attn.o[layer, head]
    sites |= {"attn.scores": scores, "attn.pattern": pattern, "attn.z": z, "attn.head_out": head_out}
    sites["attn_out"] = head_out.sum(1)
    sites["resid_mid"] = stream = stream + sites["attn_out"]
    if config.d_mlp:
        sites["mlp.in"] = stream
        read = _norm(blocks.mlp_norm, (layer,), stream, config)
        up = read @ blocks.mlp.up[layer]
        sites["mlp.pre"] = read @ blocks.mlp.gate[layer] if config.gated else up
        active = _ACTIVATIONS[config.activation](sites["mlp.pre"])
        sites["mlp.post"] = active * up if config.gated else active
        sites["mlp_out"] = sites["mlp.post"] @ blocks.mlp.down[layer]
        stream = stream + sites["mlp_out"]
    sites["resid_post"] = stream
    return sites, stream


def _norm(params, where, x, config):
    if config.norm == "none":
        return x
    if config.norm == "rms":
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * params.weight[where]
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt(x.var(-1, keepdims=True) + config.norm_eps) * params.weight[where] + params.bias[where]


def _rotated(row, pos, theta):
    half = len(row) // 2
    out = np.zeros_like(row)
    for i in range(half):
        angle = pos * theta ** (-2 * i / len(row))
        turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        out[[i, i + half]] = turn @ row[[i, i + half]]
    return out


_ACTIVATIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
}
