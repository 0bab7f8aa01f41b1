"""What each project's dictionaries compute, in numpy and float64, in the projects' own terms. Nothing of `mi_jax`.

Weights are W_enc [d_in, d_sae] and W_dec [d_sae, d_out] throughout.
"""

import numpy as np


def relu(h):
    return np.maximum(h, 0.0)


def jump(theta):
    return lambda h: np.where(h > theta, h, 0.0)


def rectified_jump(theta):
    return lambda h: relu(h) * (h > theta)


def top(k):
    def keep(h):
        out = np.zeros_like(h)
        for row, kept in zip(h, out, strict=True):
            places = np.argsort(row)[::-1][:k]
            kept[places] = relu(row[places])
        return out

    return keep


def signed_top(k):
    def keep(h):
        out = np.zeros_like(h)
        for row, kept in zip(h, out, strict=True):
            places = np.argsort(np.abs(row))[::-1][:k]
            kept[places] = row[places]
        return out

    return keep


def by_norm(keep, w_dec):
    """An activation that is given h · ‖w_dec‖, its codes divided by ‖w_dec‖."""
    norms = np.linalg.norm(w_dec, axis=1)
    return lambda h: keep(h * norms) / norms


def reconstruct(x, w_enc, b_enc, w_dec, b_dec, keep, *, centred, skip=0.0):
    """`skip` multiplies x from the right."""
    h = (x - b_dec if centred else x) @ w_enc + b_enc
    return keep(h) @ w_dec + b_dec + (x @ skip if np.ndim(skip) else 0.0)


def gated(x, w_enc, b_gate, b_mag, r_mag, w_dec, b_dec):
    gate = (x - b_dec) @ w_enc + b_gate > 0
    magnitude = relu((x - b_dec) @ (w_enc * np.exp(r_mag)) + b_mag)
    return (gate * magnitude) @ w_dec + b_dec


def pursuit(x, w_dec, b_dec, n_steps, tolerance):
    """One latent at a time; a token stops once the set of its latents stays the same, or little is left."""
    codes = np.zeros((len(x), len(w_dec)))
    for token, code in enumerate(codes):
        rest, before = x[token] - b_dec, code != 0
        for _ in range(n_steps):
            h = relu(w_dec @ rest)
            best = h.argmax()
            code[best] += h[best]
            rest = rest - h[best] * w_dec[best]
            after = code != 0
            if (after == before).all() or np.linalg.norm(rest) < tolerance:
                break
            before = after
    return codes @ w_dec + b_dec


def layer_normed(f, x, eps=1e-5):
    """torch's `std`, which divides by n − 1; eps is on the way in only."""
    mean, std = x.mean(1, keepdims=True), x.std(1, ddof=1, keepdims=True)
    return f((x - mean) / (std + eps)) * std + mean


def unit_normed(f, x):
    factor = np.sqrt(x.shape[1]) / np.linalg.norm(x, axis=1, keepdims=True)
    return f(x * factor) / factor


def cross_layer(x, w_enc, b_enc, keeps, w_dec, b_dec, skip=None):
    """x [token layer d]; w_dec(i, t) gives the decoder from layer i to t; `skip` [layer d_in d_out]."""
    n = x.shape[1]
    codes = [keeps[i](x[:, i] @ w_enc[i] + b_enc[i]) for i in range(n)]
    out = [sum(codes[i] @ w_dec(i, t) for i in range(t + 1)) + b_dec[t] for t in range(n)]
    if skip is not None:
        out = [y + x[:, t] @ skip[t] for t, y in enumerate(out)]
    return np.stack(out, 1)
