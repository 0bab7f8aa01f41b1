"""The decoder's equations once more, in float64 numpy with loops over layers, heads and positions: slow and plain."""

import math

import numpy as np


def numpy_sites(model, inputs, mask=None, token_types=None) -> dict[str, np.ndarray]:
    """Every site for one prompt `[pos]` or one image, as `capture` gives it but without the batch axis."""
    config = model.config
    weights = _Float64(model)
    stream = _embedded(weights, np.asarray(inputs), token_types, config)
    mask = np.ones(len(stream), bool) if mask is None else np.asarray(mask)
    out = {"embed": stream}
    layers = []
    for layer in range(config.n_layers):
        sites, stream = _layer(weights.blocks, layer, stream, mask, config)
        layers.append(sites)
    out |= {name: np.stack([sites[name] for sites in layers]) for name in layers[0]}
    if config.norms != "post":
        out["final_norm"] = stream = _norm(weights.final_norm, (), stream, config)
    if config.head == "none":
        return out
    logits = stream @ (weights.embed if config.tied else weights.unembed).T
    if config.unembed_bias:
        logits = logits + weights.unembed_bias
    out["logits"] = _capped(logits, config.logit_softcap)
    return out


def numpy_output(sites) -> np.ndarray:
    """The output of the model among its sites."""
    if "logits" in sites:
        return sites["logits"]
    return sites["final_norm"] if "final_norm" in sites else sites["resid_post_normalized"][-1]


class _Float64:
    """Attribute access to a tree of parameters, leaves as float64 numpy."""

    def __init__(self, tree):
        self._tree = tree

    def __getattr__(self, name):
        value = getattr(self._tree, name)
        return np.asarray(value, np.float64) if hasattr(value, "dtype") else _Float64(value)


def _embedded(weights, inputs, token_types, config):
    if config.patches is None:
        stream = weights.embed[inputs] * config.embed_scale
    else:
        side, rows = config.patches.patch_size, [weights.patches.first]
        for y in range(0, inputs.shape[1], side):
            for x in range(0, inputs.shape[2], side):
                patch = inputs[:, y : y + side, x : x + side, None] * weights.patches.weight
                rows.append(patch.sum((0, 1, 2)) + weights.patches.bias)
        stream = np.stack(rows)
    if config.n_token_types:
        stream = stream + weights.type_embed[np.zeros(len(inputs), int) if token_types is None else token_types]
    if config.positions == "learned":
        stream = stream + weights.pos_embed[: len(stream)]
    return _norm(weights.embed_norm, (), stream, config) if config.embed_norm else stream


def _layer(blocks, layer, stream, mask, config):
    sites = {"resid_pre": stream}
    before = config.norms in ("pre", "sandwich")
    on_output = config.norms in ("output", "sandwich")
    read = _norm(blocks.attn_norm, (layer,), stream, config) if before else stream
    written = _attention(blocks.attn, layer, stream, read, mask, sites, config)
    sites["attn_out"] = _norm(blocks.attn_post_norm, (layer,), written, config) if on_output else written
    middle = stream + sites["attn_out"]
    if not config.parallel:
        sites["resid_mid"] = middle
        stream = middle
    if config.norms == "post":
        stream = middle = sites["resid_mid_normalized"] = _norm(blocks.attn_post_norm, (layer,), stream, config)
    if config.d_mlp:
        sites["mlp.in"] = stream
        if before:
            read = _norm(blocks.attn_norm if config.shared_norm else blocks.mlp_norm, (layer,), stream, config)
        else:
            read = stream
        written = (_mixture if config.n_experts else _mlp)(blocks.mlp, layer, read, sites, config)
        sites["mlp_out"] = _norm(blocks.mlp_post_norm, (layer,), written, config) if on_output else written
        middle = middle + sites["mlp_out"]
    sites["resid_post"] = stream = middle
    if config.norms == "post":
        stream = _norm(blocks.mlp_post_norm, (layer,), stream, config) if config.d_mlp else stream
        sites["resid_post_normalized"] = stream
    return sites, stream


def _attention(attn, layer, stream, read, mask, sites, config):
    n_pos, n_heads, d_head, n_kv = len(stream), config.n_heads, config.d_head, config.n_kv_heads
    for reader, n in (("q", n_heads), ("k", n_kv), ("v", n_kv)):
        sites[f"attn.{reader}_in"] = np.stack([stream] * n, 1)
        projected = np.zeros((n_pos, n, d_head))
        for pos in range(n_pos):
            for head in range(n):
                projected[pos, head] = read[pos] @ getattr(attn, reader)[layer, :, head]
                if config.qkv_bias:
                    projected[pos, head] += getattr(attn, f"{reader}_bias")[layer, head]
            if reader in "qk":
                projected[pos] = _normed_heads(getattr(attn, f"{reader}_norm"), layer, projected[pos], config)
                if config.positions == "rotary":
                    projected[pos] = [_rotated(row, pos, layer, config) for row in projected[pos]]
        sites[f"attn.{reader}"] = projected

    scores = np.full((n_heads, n_pos, n_pos), -np.inf)
    pattern = np.zeros((n_heads, n_pos, n_pos))
    z = np.zeros((n_pos, n_heads, d_head))
    head_out = np.zeros((n_pos, n_heads, config.d_model))
    for head in range(n_heads):
        group = head // (n_heads // n_kv)
        for query in range(n_pos):
            for key in range(n_pos):
                if not mask[key] or not _sees(query, key, layer, config):
                    continue
                product = sites["attn.q"][query, head] @ sites["attn.k"][key, group]
                scale = 1 / math.sqrt(d_head) if config.attn_scale is None else config.attn_scale
                scores[head, query, key] = _capped(product * scale, config.score_softcap)
            unnormalised = np.exp(scores[head, query] - scores[head, query].max())
            pattern[head, query] = unnormalised / unnormalised.sum()
            z[query, head] = pattern[head, query] @ sites["attn.v"][:, group]
            head_out[query, head] = z[query, head] @ attn.o[layer, head]
    sites |= {"attn.scores": scores, "attn.pattern": pattern, "attn.z": z, "attn.head_out": head_out}
    return head_out.sum(1) + (attn.o_bias[layer] if config.o_bias else 0)


def _sees(query, key, layer, config):
    if not config.causal:
        return True
    window = config.windows[layer] if config.windows else 0
    return query - key >= 0 and (window == 0 or query - key < window)


def _normed_heads(norm, layer, heads, config):
    if config.qk_norm == "none" or config.norm == "none":
        return heads
    weight = norm.weight[layer] + config.norm_offset
    over = heads if config.qk_norm == "head" else heads.reshape(1, -1)
    return (over / np.sqrt((over**2).mean(-1, keepdims=True) + config.norm_eps)).reshape(heads.shape) * weight


def _mlp(mlp, layer, read, sites, config):
    up = read @ mlp.up[layer] + (mlp.up_bias[layer] if config.mlp_bias else 0)
    sites["mlp.pre"] = up
    if config.gated:
        sites["mlp.pre"] = read @ mlp.gate[layer] + (mlp.gate_bias[layer] if config.mlp_bias else 0)
    active = _ACTIVATIONS[config.activation](sites["mlp.pre"])
    sites["mlp.post"] = active * up if config.gated else active
    return sites["mlp.post"] @ mlp.down[layer] + (mlp.down_bias[layer] if config.mlp_bias else 0)


def _mixture(mlp, layer, read, sites, config):
    n_pos, n_experts = len(read), config.n_experts
    sites["mlp.router"] = read @ mlp.router[layer]
    gates = np.zeros((n_pos, n_experts))
    pre, post = (np.zeros((n_pos, n_experts, config.d_mlp)) for _ in range(2))
    out = np.zeros((n_pos, n_experts, config.d_model))
    for pos in range(n_pos):
        weights = np.exp(sites["mlp.router"][pos])
        weights = weights / weights.sum()
        chosen = sorted(range(n_experts), key=lambda e, w=weights: -w[e])[: config.n_active_experts]
        for expert in chosen:
            gates[pos, expert] = weights[expert]
            if config.renormalize_experts:
                gates[pos, expert] /= sum(weights[e] for e in chosen)
        for expert in range(n_experts):
            pre[pos, expert] = read[pos] @ mlp.gate[layer, expert]
            active = _ACTIVATIONS[config.activation](pre[pos, expert])
            post[pos, expert] = active * (read[pos] @ mlp.up[layer, expert])
            out[pos, expert] = post[pos, expert] @ mlp.down[layer, expert]
    sites |= {"mlp.gates": gates, "mlp.pre": pre, "mlp.post": post, "mlp.expert_out": out}
    return (gates[:, :, None] * out).sum(1)


def _norm(params, where, x, config):
    if config.norm == "none":
        return x
    weight = params.weight[where] + config.norm_offset
    if config.norm == "rms":
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * weight
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt(x.var(-1, keepdims=True) + config.norm_eps) * weight + params.bias[where]


def _capped(x, cap):
    return cap * np.tanh(x / cap) if cap else x


def _rotated(row, pos, layer, config):
    if config.rope_layers and not config.rope_layers[layer]:
        return row
    local = config.rope_local_theta is not None and config.windows and config.windows[layer] > 0
    theta = config.rope_local_theta if local else config.rope_theta
    frequencies, gain = scaled_frequencies(theta, config.n_rotary, None if local else config.rope_scaling)
    half, out = config.n_rotary // 2, row.copy()
    for i in range(half):
        angle = pos * frequencies[i]
        pair = [2 * i, 2 * i + 1] if config.rope_adjacent else [i, i + half]
        turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        out[pair] = gain * turn @ row[pair]
    return out


def scaled_frequencies(theta, dim, scaling):
    """Radians per position for every pair of components, and the factor of what turns."""
    plain = [theta ** (-2 * i / dim) for i in range(dim // 2)]
    if scaling is None:
        return plain, 1.0
    if scaling.kind == "linear":
        return [f / scaling.factor for f in plain], 1.0
    out = []
    for i, frequency in enumerate(plain):
        if scaling.kind == "llama3":
            wavelength = 2 * math.pi / frequency
            low, high = (
                scaling.n_ctx_original / scaling.low_freq_factor,
                scaling.n_ctx_original / scaling.high_freq_factor,
            )
            if wavelength > low:
                kept = 0.0
            elif wavelength < high:
                kept = 1.0
            else:
                span = scaling.high_freq_factor - scaling.low_freq_factor
                kept = (scaling.n_ctx_original / wavelength - scaling.low_freq_factor) / span
        else:
            kept = 1 - _yarn_ramp(i, theta, dim, scaling)
        out.append(kept * frequency + (1 - kept) * frequency / scaling.factor)
    if scaling.kind == "llama3":
        return out, 1.0
    if scaling.attention_factor is not None:
        return out, scaling.attention_factor
    return out, 0.1 * math.log(scaling.factor) + 1 if scaling.factor > 1 else 1.0


def _yarn_ramp(i, theta, dim, scaling):
    """0 at components that turn at least beta_fast times in the original context, 1 below beta_slow times."""

    def index(turns):
        # n_ctx · theta^(−2 index / dim) / 2π == turns
        return dim / 2 * math.log(scaling.n_ctx_original / (2 * math.pi * turns), theta)

    start, end = index(scaling.beta_fast), index(scaling.beta_slow)
    if scaling.truncate:
        start, end = math.floor(start), math.ceil(end)
    start, end = max(start, 0), min(end, dim - 1)
    return min(max((i - start) / max(end - start, 0.001), 0), 1)


_ACTIVATIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu_exact": lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
    "relu": lambda x: np.maximum(x, 0),
}
