"""Folders and files of every format, of random numbers, as the projects lay them out; with what they compute."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.decomposition.formats import equations, torch_files
from tests.decomposition.formats.equations import reconstruct

D, F, L, K = 6, 12, 3, 3
# added to every layout's own
SEED = 0


@dataclasses.dataclass(frozen=True)
class Made:
    """A written dictionary: where it is, its equation, and what `load` is to be told beside the path."""

    path: Path
    equation: Callable[[np.ndarray], np.ndarray]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


def numbers(seed=0):
    rng = np.random.default_rng(SEED + seed)

    def draw(*shape, low=-1.0):
        return rng.uniform(low, 1.0, shape).astype(np.float32)

    return draw


def weights(draw, n_layers=None):
    lead = () if n_layers is None else (n_layers,)
    return {
        "W_enc": draw(*lead, D, F),
        "b_enc": draw(*lead, F) * 0.3,
        "W_dec": draw(*lead, F, D),
        "b_dec": draw(*lead, D),
    }


def as64(arrays):
    return {name: value.astype(np.float64) for name, value in arrays.items()}


def _plain(w, keep, centred, skip=0.0):
    return lambda x: reconstruct(x, w["W_enc"], w["b_enc"], w["W_dec"], w["b_dec"], keep, centred=centred, skip=skip)


def tensors(folder, name, arrays):
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {key: np.ascontiguousarray(value, np.asarray(value).dtype) for key, value in arrays.items()}
    save_file(contiguous, folder / name)


def config(folder, name, value):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(value))


def sae_lens(folder, architecture, arrays, **fields):
    tensors(folder, "sae_weights.safetensors", arrays)
    described = {"architecture": architecture, "d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu"}
    described |= {"apply_b_dec_to_input": "transcoder" not in architecture, "normalize_activations": "none"}
    config(folder, "cfg.json", described | {"metadata": {"sae_lens_version": "6.54.12"}} | fields)
    return folder


def sae_lens_standard(folder):
    w = weights(numbers())
    return Made(sae_lens(folder, "standard", w), _plain(as64(w), equations.relu, True))


def sae_lens_uncentred(folder):
    w = weights(numbers())
    return Made(sae_lens(folder, "standard", w, apply_b_dec_to_input=False), _plain(as64(w), equations.relu, False))


def sae_lens_gated(folder):
    draw = numbers(1)
    w = weights(draw)
    w |= {"b_gate": w.pop("b_enc"), "b_mag": draw(F), "r_mag": draw(F)}
    v = as64(w)
    order = ("W_enc", "b_gate", "b_mag", "r_mag", "W_dec", "b_dec")
    return Made(sae_lens(folder, "gated", w), lambda x: equations.gated(x, *(v[name] for name in order)))


def sae_lens_jumprelu(folder):
    draw = numbers(2)
    w = weights(draw) | {"threshold": draw(F)}
    keep = equations.rectified_jump(w["threshold"].astype(np.float64))
    return Made(sae_lens(folder, "jumprelu", w), _plain(as64(w), keep, True))


def sae_lens_log_threshold(folder):
    draw = numbers(2)
    w = weights(draw) | {"log_threshold": draw(F)}
    keep = equations.rectified_jump(np.exp(w["log_threshold"].astype(np.float64)))
    return Made(sae_lens(folder, "jumprelu", w), _plain(as64(w), keep, True))


def sae_lens_topk(folder):
    w = weights(numbers(3))
    return Made(sae_lens(folder, "topk", w, k=K), _plain(as64(w), equations.top(K), True))


def sae_lens_topk_by_norm(folder):
    w = weights(numbers(3))
    v = as64(w)
    path = sae_lens(folder, "topk", w, k=K, rescale_acts_by_decoder_norm=True)
    return Made(path, _plain(v, equations.by_norm(equations.top(K), v["W_dec"]), True))


def sae_lens_abstopk(folder):
    w = weights(numbers(4))
    return Made(sae_lens(folder, "abstopk", w, k=K), _plain(as64(w), equations.signed_top(K), True))


def sae_lens_batchtopk(folder):
    """A checkpoint of a training, whose threshold is in units of h · ‖w_dec‖."""
    w = weights(numbers(5))
    v = as64(w)
    path = sae_lens(folder, "batchtopk", w | {"topk_threshold": np.array(0.7)}, k=2.5)
    return Made(path, _plain(v, equations.by_norm(equations.rectified_jump(0.7), v["W_dec"]), True))


def sae_lens_matching_pursuit(folder):
    draw = numbers(6)
    w_dec = draw(F, D)
    w = {"W_dec": w_dec / np.linalg.norm(w_dec, axis=1, keepdims=True), "b_dec": draw(D)}
    path = sae_lens(folder, "matching_pursuit", w, residual_threshold=0.5, max_iterations=None)
    return Made(path, lambda x: equations.pursuit(x, *as64(w).values(), D, 0.5))


def sae_lens_layer_norm(folder):
    w = weights(numbers(7))
    plain = _plain(as64(w), equations.relu, True)
    path = sae_lens(folder, "standard", w, normalize_activations="layer_norm")
    return Made(path, lambda x: equations.layer_normed(plain, x))


def sae_lens_unit_norm(folder):
    w = weights(numbers(8))
    plain = _plain(as64(w), equations.relu, True)
    path = sae_lens(folder, "standard", w, normalize_activations="constant_norm_rescale")
    return Made(path, lambda x: equations.unit_normed(plain, x))


def sae_lens_average_norm(folder):
    """The scale is in the folder of a training's checkpoint."""
    draw = numbers(9)
    w = weights(draw) | {"threshold": draw(F)}
    keep = equations.rectified_jump(w["threshold"].astype(np.float64))
    path = sae_lens(folder, "jumprelu", w, normalize_activations="expected_average_only_in")
    config(folder, "activation_scaler.json", {"scaling_factor": 0.4})
    return Made(path, lambda x: _plain(as64(w), keep, True)(x * 0.4) / 0.4)


def sae_lens_pursuit_average_norm(folder):
    made = sae_lens_matching_pursuit(folder)
    settings = json.loads((folder / "cfg.json").read_text())
    config(folder, "cfg.json", settings | {"normalize_activations": "expected_average_only_in"})
    return Made(folder, lambda x: made.equation(x * 0.4) / 0.4, {"scale": 0.4})


def sae_lens_whitened(folder):
    draw = numbers(10)
    w = weights(draw)
    w |= {"b_gate": w.pop("b_enc"), "b_mag": draw(F), "r_mag": draw(F)}
    matrix = draw(D, D) + 2 * np.eye(D, dtype=np.float32)
    white = {"mean": draw(D), "matrix": matrix, "inverse_matrix": np.linalg.inv(matrix)}
    path = sae_lens(folder, "gated", w, normalize_activations="covariance_whitening")
    tensors(folder, "activation_whitening.safetensors", white)
    v, m = as64(w), as64(white)
    order = ("W_enc", "b_gate", "b_mag", "r_mag", "W_dec", "b_dec")

    def equation(x):
        inner = equations.gated((x - m["mean"]) @ m["matrix"], *(v[name] for name in order))
        return inner @ m["inverse_matrix"] + m["mean"]

    return Made(path, equation)


def sae_lens_transcoder(folder, architecture="transcoder", d_out=5):
    draw = numbers(11)
    w = weights(draw) | {"W_dec": draw(F, d_out), "b_dec": draw(d_out)}
    keep, skip = equations.relu, 0.0
    if "jumprelu" in architecture:
        w["threshold"] = draw(F, low=0.1)
        keep = equations.rectified_jump(w["threshold"].astype(np.float64))
    if "skip" in architecture:
        w["W_skip"] = draw(d_out, D)
        skip = w["W_skip"].astype(np.float64).T
    path = sae_lens(folder, architecture, w, d_out=d_out)
    return Made(path, _plain(as64(w), keep, False, skip))


def sae_lens_skip_transcoder(folder):
    return sae_lens_transcoder(folder, "skip_transcoder")


def sae_lens_jumprelu_transcoder(folder):
    return sae_lens_transcoder(folder, "jumprelu_transcoder")


def sae_lens_jumprelu_skip_transcoder(folder):
    return sae_lens_transcoder(folder, "jumprelu_skip_transcoder")


def sae_lens_5(folder):
    """A flat configuration without a version; codes multiplied after training."""
    draw = numbers(12)
    w = weights(draw)
    factor = draw(F, low=0.5)
    tensors(folder, "sae_weights.safetensors", w | {"scaling_factor": factor})
    flat = {"hook_point": "blocks.0.hook_resid_pre", "d_in": D, "d_sae": F, "dtype": "torch.float32"}
    config(folder, "cfg.json", flat | {"normalize_activations": False, "finetuning_scaling_factor": True})
    v = as64(w)
    return Made(folder, _plain(v | {"W_dec": v["W_dec"] * factor[:, None]}, equations.relu, True))


def sae_lens_5_topk(folder):
    w = weights(numbers(13))
    tensors(folder, "sae_weights.safetensors", w)
    flat = {"architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}
    config(folder, "cfg.json", flat | {"d_in": D, "d_sae": F, "normalize_activations": "none"})
    return Made(folder, _plain(as64(w), equations.top(K), True))


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
    return Made(folder, _plain(v, equations.rectified_jump(v["threshold"]), False))


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
    return Made(folder, _plain(v, keep, False, v["affine_skip_connection"]))


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
    return Made(folder, lambda x: _plain(as64(w), equations.rectified_jump(theta * s), False)(x * s) / s)


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
    return Made(folder, lambda x: _plain(as64(w), keep, False)(x * s) / s, {} if saved_norm else {"scale": float(s)})


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
    return Made(_llamascopium(folder, arrays), lambda x: _plain(v, keep, False)(x * s_in) / s_out)


def llamascopium_topk(folder):
    w = weights(numbers(20))
    arrays = {"W_E": w["W_enc"], "b_E": w["b_enc"], "W_D": w["W_dec"], "b_D": w["b_dec"]}
    v = as64(w)
    plain = _plain(v, equations.by_norm(equations.top(K), v["W_dec"]), False)
    same = {"act_fn": "topk", "hook_point_out": "in", "norm_activation": "token-wise"}
    return Made(_llamascopium(folder, arrays, **same), lambda x: equations.unit_normed(plain, x))


def llamascopium_torch(folder):
    w = weights(numbers(21))
    folder.mkdir(parents=True)
    config(folder, "config.json", {"sae_type": "sae", "d_model": D, "act_fn": "relu", "norm_activation": "inference"})
    nested = {"W_E": w["W_enc"], "b_E": w["b_enc"], "W_D": w["W_dec"], "b_D": w["b_dec"]}
    torch_files.save(folder / "sae_weights.pt", {"version": "2", "sae": nested})
    return Made(folder, _plain(as64(w), equations.relu, False))


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


def _dictionary_learning(folder, kind, state, transposed=(), **trainer):
    folder.mkdir(parents=True, exist_ok=True)
    torch_files.save(folder / "ae.pt", state, transposed=transposed)
    described = {"dict_class": kind, "activation_dim": D, "dict_size": F, "layer": 3, "lm_name": "m"} | trainer
    config(folder, "config.json", {"trainer": described, "buffer": {"ctx_len": 128}})
    return folder


def _linear(w, bias):
    state = {"encoder.weight": w["W_enc"].T, "decoder.weight": w["W_dec"].T, bias: w["b_dec"]}
    return state | {"encoder.bias": w["b_enc"]}


def dictionary_learning_relu(folder):
    w = weights(numbers(24))
    # the decoder is a transposed view, as after training
    path = _dictionary_learning(folder, "AutoEncoder", _linear(w, "bias"), transposed=("decoder.weight",))
    return Made(path, _plain(as64(w), equations.relu, True))


def dictionary_learning_new(folder):
    w = weights(numbers(24))
    path = _dictionary_learning(folder, "AutoEncoderNew", _linear(w, "decoder.bias"))
    return Made(path, _plain(as64(w), equations.relu, False))


def dictionary_learning_gated(folder):
    draw = numbers(25)
    w = weights(draw)
    state = {"decoder_bias": w["b_dec"], "r_mag": draw(F), "gate_bias": w["b_enc"], "mag_bias": draw(F)}
    state |= {"encoder.weight": w["W_enc"].T, "decoder.weight": w["W_dec"].T}
    v = as64(state)
    order = (v["gate_bias"], v["mag_bias"], v["r_mag"], as64(w)["W_dec"], v["decoder_bias"])
    path = _dictionary_learning(folder, "GatedAutoEncoder", state)
    return Made(path, lambda x: equations.gated(x, as64(w)["W_enc"], *order))


def dictionary_learning_jumprelu(folder):
    draw = numbers(26)
    w = weights(draw) | {"threshold": draw(F)}
    path = _dictionary_learning(folder, "JumpReluAutoEncoder", w)
    return Made(path, _plain(as64(w), equations.rectified_jump(w["threshold"].astype(np.float64)), False))


def dictionary_learning_topk(folder):
    w = weights(numbers(27))
    state = _linear(w, "b_dec") | {"k": np.array(K, np.int32), "threshold": np.array(0.9, np.float32)}
    return Made(_dictionary_learning(folder, "AutoEncoderTopK", state, k=K), _plain(as64(w), equations.top(K), True))


def dictionary_learning_batchtopk(folder):
    w = weights(numbers(27))
    state = _linear(w, "b_dec") | {"k": np.array(K, np.int32), "threshold": np.array(0.9, np.float32)}
    keep = equations.rectified_jump(np.float64(np.float32(0.9)))
    return Made(_dictionary_learning(folder, "BatchTopKSAE", state, k=K), _plain(as64(w), keep, True))


def dictionary_learning_matryoshka(folder):
    w = weights(numbers(28))
    state = w | {"k": np.array(K, np.int32), "threshold": np.array(0.9, np.float32), "group_sizes": np.array([4, 8])}
    path = _dictionary_learning(folder, "MatryoshkaBatchTopKSAE", state, k=K)
    return Made(path, _plain(as64(w), equations.rectified_jump(np.float64(np.float32(0.9))), True))


def sparsify(folder, **fields):
    """As many latents as dimensions, so that no shape tells which way the decoder lies."""
    draw = numbers(29)
    w = weights(draw) | {"W_enc": draw(D, D), "b_enc": draw(D), "W_dec": draw(D, D)}
    arrays = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "W_dec": w["W_dec"], "b_dec": w["b_dec"]}
    skip = 0.0
    if fields.get("skip_connection"):
        arrays["W_skip"] = draw(D, D)
        skip = arrays["W_skip"].astype(np.float64).T
    tensors(folder, "sae.safetensors", arrays)
    described = {"activation": "topk", "k": K, "num_latents": D, "normalize_decoder": True, "d_in": D}
    config(folder, "cfg.json", described | fields)
    keep = equations.signed_top(K) if fields.get("signed") else equations.top(K)
    return Made(folder, _plain(as64(w), keep, not fields.get("transcode"), skip))


def sparsify_transcoder(folder):
    return sparsify(folder, transcode=True, skip_connection=True)


def sparsify_signed(folder):
    return sparsify(folder, signed=True)


def clt_training(folder, tied=False):
    draw = numbers(30)
    w = weights(draw, L)
    decoders = [[draw(F, D) for _ in range(L - i)] for i in range(L)]
    biases = [[draw(D) for _ in range(L - i)] for i in range(L)]
    factors = [[draw(F) for _ in range(L - i)] for i in range(L)]
    skips = [draw(D, D) for _ in range(L)]
    for i in range(L):
        arrays = {"encoder.weight": w["W_enc"][i].T, "encoder.bias": w["b_enc"][i]}
        arrays |= {f"b_decs.{j}": b for j, b in enumerate(biases[i])}
        arrays |= {f"post_encs.{j}": np.zeros(F, np.float32) for j in range(L - i)}
        arrays |= {f"W_skips.{j}": skips[i] if j == 0 else np.zeros((D, D), np.float32) for j in range(L - i)}
        if tied:
            arrays |= {"W_dec": decoders[i][0]} | {f"post_enc_scales.{j}": f for j, f in enumerate(factors[i])}
        else:
            arrays |= {f"W_decs.{j}": decoder for j, decoder in enumerate(decoders[i])}
        layer = folder / f"h.{i + 8}.mlp"
        tensors(layer, "sae.safetensors", arrays)
        described = {"activation": "topk", "k": K, "d_in": D, "transcode": True, "n_targets": L - i, "n_sources": 1}
        described |= {"skip_connection": True, "per_source_tied": tied, "post_encoder_scale": tied}
        config(layer, "cfg.json", described | {"coalesce_topk": "none"})

    def decoder(i, t):
        if tied:
            return decoders[i][0].astype(np.float64) * factors[i][t - i].astype(np.float64)[:, None]
        return decoders[i][t - i].astype(np.float64)

    b_dec = [sum(biases[i][t - i].astype(np.float64) for i in range(t + 1)) for t in range(L)]
    v, skip = as64(w), [s.astype(np.float64).T for s in skips]
    return Made(folder, lambda x: equations.cross_layer(
        x, v["W_enc"], v["b_enc"], [equations.top(K)] * L, decoder, b_dec, skip
    ))  # fmt: skip


def clt_training_tied(folder):
    return clt_training(folder, tied=True)


def openai(folder, kind="TopK"):
    folder.mkdir(parents=True, exist_ok=True)
    w = weights(numbers(31))
    state = {"pre_bias": w["b_dec"], "latent_bias": w["b_enc"], "stats_last_nonzero": np.zeros(F, np.int64)}
    state |= {"encoder.weight": w["W_enc"].T, "decoder.weight": w["W_dec"].T, "activation": kind}
    state["activation_state_dict"] = {"k": K, "postact_fn": "ReLU"} if kind == "TopK" else {}
    torch_files.save(folder / "6.pt", state)
    if kind == "ReLU":
        return Made(folder / "6.pt", _plain(as64(w), equations.relu, True))
    plain = _plain(as64(w), equations.top(K), True)
    return Made(folder / "6.pt", lambda x: equations.layer_normed(plain, x))


def openai_relu(folder):
    return openai(folder, "ReLU")


def circuit_tracer(folder):
    draw = numbers(32)
    w = weights(draw) | {"W_skip": draw(D, D), "activation_function.threshold": draw(F)}
    tensors(folder, "layer_3.safetensors", w | {"W_enc": w["W_enc"].T})
    tensors(folder, "layer_4.safetensors", weights(draw) | {"W_enc": w["W_enc"].T})
    v = as64(w)
    keep = equations.jump(v["activation_function.threshold"])
    return Made(folder, _plain(v, keep, False, v["W_skip"].T), {"layer": 3})


def circuit_tracer_early(folder):
    """ReLU, and the decoder the other way round."""
    w = weights(numbers(33))
    tensors(folder, "layer_0.safetensors", w | {"W_enc": w["W_enc"].T, "W_dec": w["W_dec"].T})
    return Made(folder / "layer_0.safetensors", _plain(as64(w), equations.relu, False))


def circuit_tracer_clt(folder):
    draw = numbers(34)
    w = weights(draw, L) | {"threshold": draw(L, F), "W_skip": draw(L, D, D)}
    decoders = [draw(F, L - i, D) for i in range(L)]
    for i in range(L):
        names = ("b_enc", "b_dec", "threshold", "W_skip")
        arrays = {f"W_enc_{i}": w["W_enc"][i].T} | {f"{name}_{i}": w[name][i] for name in names}
        tensors(folder, f"W_enc_{i}.safetensors", arrays)
        tensors(folder, f"W_dec_{i}.safetensors", {f"W_dec_{i}": decoders[i]})
    (folder / "config.yaml").write_text("model_kind: cross_layer_transcoder\n")
    v = as64(w)
    keeps = [equations.jump(v["threshold"][i]) for i in range(L)]
    return Made(folder, lambda x: equations.cross_layer(
        x, v["W_enc"], v["b_enc"], keeps, lambda i, t: decoders[i][:, t - i].astype(np.float64), v["b_dec"], v["W_skip"]
    ))  # fmt: skip


# by format: what each case is called, and what makes it
LAYOUTS: dict[str, dict[str, Callable[[Path], Made]]] = {
    "sae_lens": {
        "standard": sae_lens_standard,
        "standard, b_dec not subtracted": sae_lens_uncentred,
        "gated": sae_lens_gated,
        "jumprelu": sae_lens_jumprelu,
        "jumprelu, log_threshold": sae_lens_log_threshold,
        "topk": sae_lens_topk,
        "topk, ranked by decoder norm": sae_lens_topk_by_norm,
        "abstopk": sae_lens_abstopk,
        "batchtopk": sae_lens_batchtopk,
        "matching_pursuit": sae_lens_matching_pursuit,
        "transcoder": sae_lens_transcoder,
        "skip_transcoder": sae_lens_skip_transcoder,
        "jumprelu_transcoder": sae_lens_jumprelu_transcoder,
        "jumprelu_skip_transcoder": sae_lens_jumprelu_skip_transcoder,
        "layer_norm": sae_lens_layer_norm,
        "constant_norm_rescale": sae_lens_unit_norm,
        "expected_average_only_in": sae_lens_average_norm,
        "expected_average_only_in, matching_pursuit": sae_lens_pursuit_average_norm,
        "covariance_whitening, gated": sae_lens_whitened,
    },
    "sae_lens_5": {"standard, finetuned": sae_lens_5, "topk": sae_lens_5_topk},
    "gemma_scope": {
        "upper-case names": gemma_scope,
        "lower-case names": gemma_scope_lower,
        "scaling_factor": gemma_scope_factor,
        "embedding": gemma_scope_embedding,
    },
    "gemma_scope_2": {"affine transcoder": gemma_scope_2, "cross-layer, affine": gemma_scope_2_clt},
    "llama_scope": {"jumprelu": llama_scope},
    "llama_scope_r1": {"jumprelu": llama_scope_r1, "jumprelu, scale given": llama_scope_r1_scale_given},
    "llamascopium": {
        "jumprelu transcoder": llamascopium,
        "topk, token-wise norm": llamascopium_topk,
        "relu, torch file": llamascopium_torch,
        "crosscoder": llamascopium_crosscoder,
        "cross-layer, jumprelu": llamascopium_clt,
    },
    "dictionary_learning": {
        "AutoEncoder": dictionary_learning_relu,
        "AutoEncoderNew": dictionary_learning_new,
        "GatedAutoEncoder": dictionary_learning_gated,
        "JumpReluAutoEncoder": dictionary_learning_jumprelu,
        "AutoEncoderTopK": dictionary_learning_topk,
        "BatchTopKSAE": dictionary_learning_batchtopk,
        "MatryoshkaBatchTopKSAE": dictionary_learning_matryoshka,
    },
    "sparsify": {"topk": sparsify, "topk skip transcoder": sparsify_transcoder, "signed topk": sparsify_signed},
    "clt_training": {"cross-layer": clt_training, "cross-layer, tied per source": clt_training_tied},
    "openai": {"TopK": openai, "ReLU": openai_relu},
    "circuit_tracer": {"jumprelu, skip": circuit_tracer, "relu, early layout": circuit_tracer_early},
    "circuit_tracer_clt": {"cross-layer, jumprelu, skip": circuit_tracer_clt},
}
