"""The equations of every dictionary and of every loss, in numpy and float64, written from the papers.

Nothing of `mi_jax` is used: a dictionary is a mapping of names to arrays.
"""

import numpy as np


def relu(x):
    return np.maximum(x, 0.0)


def keep_largest(h, k, size=None):
    """h where it is among the k largest of its row (by `size`, if given), else 0."""
    ranked = h if size is None else size
    places = np.argsort(-ranked, axis=1, kind="stable")[:, :k]
    out = np.zeros_like(h)
    np.put_along_axis(out, places, np.take_along_axis(h, places, 1), 1)
    return out


def keep_largest_of_batch(h, count):
    flat = relu(h).reshape(-1)
    out = np.zeros_like(flat)
    places = np.argsort(-flat, kind="stable")[:count]
    out[places] = flat[places]
    return out.reshape(h.shape)


def softmax(x):
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def pursue(x, rows, k, tolerance=1e-2):
    codes, rest = np.zeros((len(x), len(rows))), x.copy()
    for token in range(len(x)):
        for _ in range(k):
            h = rows @ rest[token]
            j = h.argmax()
            if h[j] <= 0 or np.linalg.norm(rest[token]) < tolerance:
                break
            codes[token, j] += h[j]
            rest[token] -= h[j] * rows[j]
    return codes


def preactivations(p, x):
    return (x - p["centre"]) @ p["w_enc"].T + p["b_enc"]


def codes(name, p, x, *, k=None, training=False):
    """The codes of activations x by the activation called `name`."""
    h = preactivations(p, x)
    match name:
        case "relu":
            return relu(h)
        case "gated":
            return np.where(h > 0, relu((h - p["b_enc"]) * np.exp(p["r_mag"]) + p["b_mag"]), 0.0)
        case "jumprelu":
            return np.where(h > p["threshold"], h, 0.0)
        case "topk":
            return relu(keep_largest(h, k))
        case "abstopk":
            return keep_largest(h, k, np.abs(h))
        case "batchtopk":
            return keep_largest_of_batch(h, k * len(x)) if training else np.where(h > p["threshold"], relu(h), 0.0)
        case "matching_pursuit":
            return pursue(x - p["centre"], p["w_dec"], k)
        case "switch":
            route = softmax((x - p["centre"] - p["b_router"]) @ p["router"].T)
            blocks = np.arange(h.shape[1]) // (h.shape[1] // route.shape[1])
            own = np.where(blocks[None, :] == route.argmax(1)[:, None], h, -np.inf)
            return relu(keep_largest(own, k)) * route.max(1)[:, None]
    raise AssertionError(name)


def reconstruction(p, x, z):
    skip = x @ p["w_skip"] if "w_skip" in p else 0.0
    return z @ p["w_dec"] + p["b_dec"] + skip


def reconstruction_loss(kind, p, x, y, z, *, prefixes=(), k=0):
    def squared(part):
        return ((y - reconstruction(p, x, part)) ** 2).sum(1).mean()

    if kind == "matryoshka":
        return np.mean([squared(np.where(np.arange(z.shape[1]) < n, z, 0.0)) for n in prefixes])
    if kind == "hierarchical":
        return np.mean([squared(keep_largest(z, t, np.abs(z))) for t in range(1, k + 1)])
    return squared(z)


def decoder_norms(p, n_sites):
    return np.linalg.norm(p["w_dec"].reshape(len(p["w_dec"]), n_sites, -1), axis=2).sum(1)


def penalty(kind, name, p, h, z, *, exponent=1.0, c=4.0, target_l0=1.0, n_sites=1):
    weighted = (relu(h) if name == "gated" else z) * decoder_norms(p, n_sites)
    match kind:
        case "none":
            return 0.0
        case "l1":
            return weighted.sum(1).mean()
        case "lp":
            return np.where(weighted > 0, np.abs(weighted) ** exponent, 0.0).sum(1).mean()
        case "tanh":
            return np.tanh(c * weighted).sum(1).mean()
        case "l0":
            return (h > p["threshold"]).sum(1).mean()
        case "l0_target":
            return ((h > p["threshold"]).sum(1).mean() / target_l0 - 1) ** 2
    raise AssertionError(kind)


def best_scale(wanted, guess):
    """The number by which `guess` comes nearest to `wanted`, or a small one where it points away."""
    size = (guess**2).sum()
    return max((wanted * guess).sum(), 0.01 * np.sqrt((wanted**2).sum() * size)) / max(size, 1e-30)


def auxiliary(kind, p, x, y, h, z, dead, *, k_aux=1, candidates=0, normalised=False, rescaled=True, n_sites=1):
    """The auxiliary losses; `candidates` dead latents, the first, take part."""
    part = dead & (np.cumsum(dead) <= candidates)
    match kind:
        case "none":
            return 0.0
        case "gate":
            skip = x @ p["w_skip"] if "w_skip" in p else 0.0
            return ((y - relu(h) @ p["w_dec"] - p["b_dec"] - skip) ** 2).sum(1).mean()
        case "auxk":
            if not dead.any():
                return 0.0
            error = y - reconstruction(p, x, z)
            guess = relu(keep_largest(np.where(part, h, -1e9), min(k_aux, int(part.sum())))) @ p["w_dec"]
            if rescaled:
                guess = guess * best_scale(error, guess)
            squared = ((error - guess) ** 2).sum(1).mean()
            if normalised:
                squared /= ((error - error.mean(0)) ** 2).sum(1).mean()
            return min(dead.sum() / k_aux, 1.0) * squared
        case "preactivation":
            norms = decoder_norms(p, n_sites)
            short = relu(np.broadcast_to(p.get("threshold", 0.0), h.shape[1:])[None, :] - h)
            return (np.where(part, short, 0.0) * norms).sum(1).mean()
        case "load_balance":
            route = softmax((x - p["centre"] - p["b_router"]) @ p["router"].T)
            sent = np.bincount(route.argmax(1), minlength=route.shape[1]) / len(x)
            return route.shape[1] * (sent * route.mean(0)).sum()
    raise AssertionError(kind)
