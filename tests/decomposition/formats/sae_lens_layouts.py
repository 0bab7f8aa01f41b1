"""SAELens' layouts, of random numbers; with what they compute."""

import json

import numpy as np

from tests.decomposition.formats import equations
from tests.decomposition.formats.making import D, F, K, Made, as64, config, equation_of, numbers, tensors, weights


def sae_lens(folder, architecture, arrays, **fields):
    tensors(folder, "sae_weights.safetensors", arrays)
    described = {"architecture": architecture, "d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu"}
    described |= {"apply_b_dec_to_input": "transcoder" not in architecture, "normalize_activations": "none"}
    config(folder, "cfg.json", described | {"metadata": {"sae_lens_version": "6.54.12"}} | fields)
    return folder


def sae_lens_standard(folder):
    w = weights(numbers())
    return Made(sae_lens(folder, "standard", w), equation_of(as64(w), equations.relu, True))


def sae_lens_uncentred(folder):
    w = weights(numbers())
    return Made(
        sae_lens(folder, "standard", w, apply_b_dec_to_input=False), equation_of(as64(w), equations.relu, False)
    )


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
    return Made(sae_lens(folder, "jumprelu", w), equation_of(as64(w), keep, True))


def sae_lens_log_threshold(folder):
    draw = numbers(2)
    w = weights(draw) | {"log_threshold": draw(F)}
    keep = equations.rectified_jump(np.exp(w["log_threshold"].astype(np.float64)))
    return Made(sae_lens(folder, "jumprelu", w), equation_of(as64(w), keep, True))


def sae_lens_topk(folder):
    w = weights(numbers(3))
    return Made(sae_lens(folder, "topk", w, k=K), equation_of(as64(w), equations.top(K), True))


def sae_lens_topk_by_norm(folder):
    w = weights(numbers(3))
    v = as64(w)
    path = sae_lens(folder, "topk", w, k=K, rescale_acts_by_decoder_norm=True)
    return Made(path, equation_of(v, equations.by_norm(equations.top(K), v["W_dec"]), True))


def sae_lens_abstopk(folder):
    w = weights(numbers(4))
    return Made(sae_lens(folder, "abstopk", w, k=K), equation_of(as64(w), equations.signed_top(K), True))


def sae_lens_batchtopk(folder):
    """A checkpoint of a training, whose threshold is in units of h · ‖w_dec‖."""
    w = weights(numbers(5))
    v = as64(w)
    path = sae_lens(folder, "batchtopk", w | {"topk_threshold": np.array(0.7)}, k=2.5)
    return Made(path, equation_of(v, equations.by_norm(equations.rectified_jump(0.7), v["W_dec"]), True))


def sae_lens_matching_pursuit(folder):
    draw = numbers(6)
    w_dec = draw(F, D)
    w = {"W_dec": w_dec / np.linalg.norm(w_dec, axis=1, keepdims=True), "b_dec": draw(D)}
    path = sae_lens(folder, "matching_pursuit", w, residual_threshold=0.5, max_iterations=None)
    return Made(path, lambda x: equations.pursuit(x, *as64(w).values(), D, 0.5))


def sae_lens_layer_norm(folder):
    w = weights(numbers(7))
    plain = equation_of(as64(w), equations.relu, True)
    path = sae_lens(folder, "standard", w, normalize_activations="layer_norm")
    return Made(path, lambda x: equations.layer_normed(plain, x))


def sae_lens_unit_norm(folder):
    w = weights(numbers(8))
    plain = equation_of(as64(w), equations.relu, True)
    path = sae_lens(folder, "standard", w, normalize_activations="constant_norm_rescale")
    return Made(path, lambda x: equations.unit_normed(plain, x))


def sae_lens_average_norm(folder):
    """The scale is in the folder of a training's checkpoint."""
    draw = numbers(9)
    w = weights(draw) | {"threshold": draw(F)}
    keep = equations.rectified_jump(w["threshold"].astype(np.float64))
    path = sae_lens(folder, "jumprelu", w, normalize_activations="expected_average_only_in")
    config(folder, "activation_scaler.json", {"scaling_factor": 0.4})
    return Made(path, lambda x: equation_of(as64(w), keep, True)(x * 0.4) / 0.4)


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
    return Made(path, equation_of(as64(w), keep, False, skip))


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
    return Made(folder, equation_of(v | {"W_dec": v["W_dec"] * factor[:, None]}, equations.relu, True))


def sae_lens_5_topk(folder):
    w = weights(numbers(13))
    tensors(folder, "sae_weights.safetensors", w)
    flat = {"architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}
    config(folder, "cfg.json", flat | {"d_in": D, "d_sae": F, "normalize_activations": "none"})
    return Made(folder, equation_of(as64(w), equations.top(K), True))
