"""The frozen model in NumPy: attention patterns and norm scales from a run, the rest written by hand."""

import jax
import numpy as np

import mi_jax as mi
from mi_jax.circuits.features import ReplacementModel


class FrozenRun:
    """Patterns and scales of one prompt."""

    def __init__(self, r: ReplacementModel, tokens: jax.Array):
        self.r, model = r, r.model
        sites = ("embed", "attn.pattern", "resid_pre", "mlp.in", "mlp_out", "resid_post")
        _, acts = mi.jit(mi.capture(model, *sites))(tokens[None])
        self.acts = {name: np.asarray(value, np.float64) for name, value in acts.items()}
        self.blocks = jax.tree.map(lambda a: np.asarray(a, np.float64), model.blocks)
        self.skips = None if r.skips is None else np.asarray(r.skips, np.float64)

    def norm(self, norm, layer, x, at):
        """The norm's linear part, with the scale that it has at `at`, and its bias."""
        weight = norm.weight if layer is None else norm.weight[layer]
        bias = None if norm.bias is None else norm.bias if layer is None else norm.bias[layer]
        centred = at if bias is None else at - at.mean(-1, keepdims=True)
        x = x if bias is None else x - x.mean(-1, keepdims=True)
        out = x / np.sqrt((centred**2).mean(-1, keepdims=True) + norm.eps) * weight
        return out, 0.0 if bias is None else bias

    def __call__(self, embed, written, biases=True):
        """What the dictionaries read, and the last stream, when these are the embedding and the MLP outputs.

        Args:
          embed: [pos d_model].
          written: [layer pos d_model], without the skips of the dictionaries, which are added.
          biases: whether the model's own are there.
        """
        on = 1.0 if biases else 0.0
        x, reads, group = embed, [], self.r.model.config.n_heads // self.r.model.config.n_kv_heads
        attn = self.blocks.attn
        for layer in range(self.r.n_layers):
            h, bias = self.norm(self.blocks.attn_norm, layer, x, self.acts["resid_pre"][layer, 0])
            v = np.einsum("pd,dkh->pkh", h + on * bias, attn.v[layer])
            v = np.repeat(v, group, axis=1)
            z = np.einsum("nqp,pnh->qnh", self.acts["attn.pattern"][layer, 0], v)
            x = x + np.einsum("qnh,nhd->qd", z, attn.o[layer])
            read = x
            if self.r.normalized:
                read, bias = self.norm(self.blocks.mlp_norm, layer, x, self.acts["mlp.in"][layer, 0])
                read = read + on * bias
            reads.append(read)
            x = x + written[layer] + (0.0 if self.skips is None else read @ self.skips[layer])
        final = jax.tree.map(lambda a: np.asarray(a, np.float64), self.r.model.final_norm)
        out, bias = self.norm(final, None, x, self.acts["resid_post"][-1, 0])
        return np.stack(reads), out + on * bias
