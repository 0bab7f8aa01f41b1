"""The layouts of Gemma Scope, Llama Scope and llamascopium, of random numbers; with what they compute."""

import numpy as np

from tests.decomposition.formats import equations, torch_files
from tests.decomposition.formats.making import D, F, K, L, Made, as64, config, equation_of, numbers, tensors, weights


def gemma_scope(folder, lower=False, factor=None, embedding=False):
    draw = numbers(14)
    w = weights(draw) | {"threshold": draw(F)}
    stored = {name.lower() if lower else name: value for name, value in w.items()}
    v = as64(w)
    if factor is not None:
        stored["scaling_factor"] = np.full(F, factor, np.float32)
        v["W_dec"] = v["W_dec"] * factor
    if embedding:
        folder = folder / "embedding" / "width_4k" / "average_l0_6"
        v |= {"W_enc": v["W_enc"] / np.sqrt(D), "W_dec": v["W_dec"] * np.sqrt(D)}
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "params.npz", **stored)
    return Made(folder, equation_of(v, equations.rectified_jump(v["threshold"]), False))


def gemma_scope_lower(folder):
    return gemma_scope(folder, lower=True)


def gemma_scope_factor(folder):
    return gemma_scope(folder, factor=1.5)


def gemma_scope_embedding(folder):
    return gemma_scope(folder, embedding=True)


def gemma_scope_2(folder):
    """With the affine connection, stored [d_in, d_out]; an equal width on both sides, so that no shape tells."""
    draw = numbers(15)
    w = weights(draw) | {"threshold": draw(F), "affine_skip_connection": draw(D, D)}
    tensors(folder, "params.safetensors", {name.lower(): value for name, value in w.items()})
    config(folder, "config.json", {"architecture": "jump_relu", "affine_connection": True, "model_name": "gemma-v3"})
    v = as64(w)
    keep = equations.rectified_jump(v["threshold"])
    return Made(folder, equation_of(v, keep, False, v["affine_skip_connection"]))


def gemma_scope_2_clt(folder):
    draw = numbers(16)
    w = weights(draw, L) | {"threshold": draw(L, F), "affine_skip_connection": draw(L, D, D)}
    w["W_dec"] = draw(L, F, L, D)
    for i in range(L):
        arrays = {name.lower(): value[i] for name, value in w.items()}
        tensors(folder, f"params_layer_{i}.safetensors", arrays)
    config(folder, "config.json", {"architecture": "jump_relu", "affine_connection": True})
    v = as64(w)
    keeps = [equations.rectified_jump(v["threshold"][i]) for i in range(L)]
    return Made(folder, lambda x: equations.cross_layer(
        x, v["W_enc"], v["b_enc"], keeps, lambda i, t: v["W_dec"][i, :, t], v["b_dec"], v["affine_skip_connection"]
    ))  # fmt: skip


def llama_scope(folder):
    """θ is in units of unscaled activations, the weights read scaled ones."""
    draw = numbers(17)
    w, theta, norm = weights(draw), 0.3, 7.0
    arrays = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"]}
    arrays |= {"decoder.weight": w["W_dec"].T, "decoder.bias": w["b_dec"]}
    tensors(folder / "checkpoints", "final.safetensors", arrays)
    described = {"d_model": D, "d_sae": F, "jump_relu_threshold": theta, "hook_point_in": "a", "hook_point_out": "a"}
    config(folder, "hyperparams.json", described | {"dataset_average_activation_norm": {"in": norm, "out": 3.0}})
    s = np.sqrt(D) / norm
    return Made(folder, lambda x: equation_of(as64(w), equations.rectified_jump(theta * s), False)(x * s) / s)


def llama_scope_r1(folder, saved_norm=True):
    draw = numbers(18)
    w, norm = weights(draw), 7.0
    theta = draw(F, low=0.05)
    arrays = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "log_jumprelu_threshold": np.log(theta)}
    arrays |= {"decoder.weight": w["W_dec"].T, "decoder.bias": w["b_dec"]}
    if saved_norm:
        arrays["dataset_average_activation_norm.blocks.3.hook_resid_post"] = np.array(norm, np.float32)
    tensors(folder, "sae_weights.safetensors", arrays)
    config(folder, "config.json", {"d_model": D, "expansion_factor": 2, "hook_point_in": "blocks.3.hook_resid_post"})
    s = np.sqrt(D) / norm
    keep = equations.rectified_jump(theta.astype(np.float64))
    return Made(
        folder, lambda x: equation_of(as64(w), keep, False)(x * s) / s, {} if saved_norm else {"scale": float(s)}
    )


def llama_scope_r1_scale_given(folder):
    return llama_scope_r1(folder, saved_norm=False)


def _llamascopium(folder, arrays, **fields):
    tensors(folder, "sae_weights.safetensors", arrays)
    described = {"sae_type": "sae", "d_model": D, "expansion_factor": 2, "use_decoder_bias": True, "act_fn": "jumprelu"}
    described |= {"norm_activation": "dataset-wise", "sparsity_include_decoder_norm": True, "use_glu_encoder": False}
    config(folder, "config.json", described | {"hook_point_in": "in", "hook_point_out": "out", "top_k": K} | fields)
    return folder


def llamascopium(folder):
    """A transcoder with scales of its own on both sides."""
    draw = numbers(19)
    w, theta = weights(draw), draw(F, low=0.05)
    arrays = {"W_E": w["W_enc"], "b_E": w["b_enc"], "W_D": w["W_dec"], "b_D": w["b_dec"]}
    arrays["activation_function.log_jumprelu_threshold"] = np.log(theta)
    norms = {"in": 7.0, "out": 3.0}
    arrays |= {f"dataset_average_activation_norm.{hook}": np.array(n, np.float32) for hook, n in norms.items()}
    v = as64(w)
    keep = equations.by_norm(equations.jump(theta.astype(np.float64)), v["W_dec"])
    s_in, s_out = (np.sqrt(D) / n for n in norms.values())
    return Made(_llamascopium(folder, arrays), lambda x: equation_of(v, keep, False)(x * s_in) / s_out)


def llamascopium_topk(folder):
    w = weights(numbers(20))
    arrays = {"W_E": w["W_enc"], "b_E": w["b_enc"], "W_D": w["W_dec"], "b_D": w["b_dec"]}
    v = as64(w)
    plain = equation_of(v, equations.by_norm(equations.top(K), v["W_dec"]), False)
    same = {"act_fn": "topk", "hook_point_out": "in", "norm_activation": "token-wise"}
    return Made(_llamascopium(folder, arrays, **same), lambda x: equations.unit_normed(plain, x))


def llamascopium_torch(folder):
    w = weights(numbers(21))
    folder.mkdir(parents=True)
    config(folder, "config.json", {"sae_type": "sae", "d_model": D, "act_fn": "relu", "norm_activation": "inference"})
    nested = {"W_E": w["W_enc"], "b_E": w["b_enc"], "W_D": w["W_dec"], "b_D": w["b_dec"]}
    torch_files.save(folder / "sae_weights.pt", {"version": "2", "sae": nested})
    return Made(folder, equation_of(as64(w), equations.relu, False))


def llamascopium_crosscoder(folder, sites=2):
    draw = numbers(22)
    w = weights(draw, sites)
    arrays = {"W_E": w["W_enc"], "b_E": w["b_enc"], "W_D": w["W_dec"], "b_D": w["b_dec"]}
    norms = np.array([7.0, 3.0])
    arrays |= {f"dataset_average_activation_norm.s{i}": np.array(norms[i], np.float32) for i in range(sites)}
    hooks = {"sae_type": "crosscoder", "act_fn": "relu", "hook_points": [f"s{i}" for i in range(sites)]}
    v, s = as64(w), (np.sqrt(D) / norms)[:, None]

    def equation(x):
        x = x.reshape(-1, sites, D) * s
        codes = equations.relu(np.einsum("bnd,ndf->bf", x, v["W_enc"]) + v["b_enc"].sum(0))
        return ((np.einsum("bf,nfd->bnd", codes, v["W_dec"]) + v["b_dec"]) / s).reshape(-1, sites * D)

    return Made(_llamascopium(folder, arrays, **hooks), equation)


def llamascopium_clt(folder):
    draw = numbers(23)
    w, theta = weights(draw, L), draw(L, F, low=0.05)
    decoders = [draw(t + 1, F, D) for t in range(L)]
    arrays = {"W_E": w["W_enc"], "b_E": w["b_enc"], "activation_function.log_jumprelu_threshold": np.log(theta)}
    for t in range(L):
        arrays |= {f"W_D.{t}": decoders[t], f"b_D.{t}": w["b_dec"][t]}
    norms = {f"{side}.{i}": 2.0 + i + (side == "out") for side in ("in", "out") for i in range(L)}
    arrays |= {f"dataset_average_activation_norm.{hook}": np.array(n, np.float32) for hook, n in norms.items()}
    hooks = {f"hook_points_{side}": [f"{side}.{i}" for i in range(L)] for side in ("in", "out")}
    v = as64(w)
    s_in, s_out = (np.array([np.sqrt(D) / norms[f"{side}.{i}"] for i in range(L)])[:, None] for side in ("in", "out"))
    keeps = []
    for i in range(L):
        size = np.sqrt(sum((decoders[t][i].astype(np.float64) ** 2).sum(1) for t in range(i, L)))
        keeps.append(lambda h, i=i, size=size: equations.jump(theta[i].astype(np.float64))(h * size) / size)
    return Made(_llamascopium(folder, arrays, sae_type="clt", **hooks), lambda x: equations.cross_layer(
        x * s_in, v["W_enc"], v["b_enc"], keeps, lambda i, t: decoders[t][i].astype(np.float64), v["b_dec"]
    ) / s_out)  # fmt: skip
