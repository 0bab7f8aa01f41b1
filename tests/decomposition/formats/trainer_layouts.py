"""The layouts of other trainers and of circuit-tracer, of random numbers; with what they compute."""

import numpy as np

from tests.decomposition.formats import equations, torch_files
from tests.decomposition.formats.making import D, F, K, L, Made, as64, config, equation_of, numbers, tensors, weights


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
    return Made(path, equation_of(as64(w), equations.relu, True))


def dictionary_learning_new(folder):
    w = weights(numbers(24))
    path = _dictionary_learning(folder, "AutoEncoderNew", _linear(w, "decoder.bias"))
    return Made(path, equation_of(as64(w), equations.relu, False))


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
    return Made(path, equation_of(as64(w), equations.rectified_jump(w["threshold"].astype(np.float64)), False))


def dictionary_learning_topk(folder):
    w = weights(numbers(27))
    state = _linear(w, "b_dec") | {"k": np.array(K, np.int32), "threshold": np.array(0.9, np.float32)}
    return Made(
        _dictionary_learning(folder, "AutoEncoderTopK", state, k=K), equation_of(as64(w), equations.top(K), True)
    )


def dictionary_learning_batchtopk(folder):
    w = weights(numbers(27))
    state = _linear(w, "b_dec") | {"k": np.array(K, np.int32), "threshold": np.array(0.9, np.float32)}
    keep = equations.rectified_jump(np.float64(np.float32(0.9)))
    return Made(_dictionary_learning(folder, "BatchTopKSAE", state, k=K), equation_of(as64(w), keep, True))


def dictionary_learning_matryoshka(folder):
    w = weights(numbers(28))
    state = w | {"k": np.array(K, np.int32), "threshold": np.array(0.9, np.float32), "group_sizes": np.array([4, 8])}
    path = _dictionary_learning(folder, "MatryoshkaBatchTopKSAE", state, k=K)
    return Made(path, equation_of(as64(w), equations.rectified_jump(np.float64(np.float32(0.9))), True))


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
    return Made(folder, equation_of(as64(w), keep, not fields.get("transcode"), skip))


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
        return Made(folder / "6.pt", equation_of(as64(w), equations.relu, True))
    plain = equation_of(as64(w), equations.top(K), True)
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
    return Made(folder, equation_of(v, keep, False, v["W_skip"].T), {"layer": 3})


def circuit_tracer_early(folder):
    """ReLU, and the decoder the other way round."""
    w = weights(numbers(33))
    tensors(folder, "layer_0.safetensors", w | {"W_enc": w["W_enc"].T, "W_dec": w["W_dec"].T})
    return Made(folder / "layer_0.safetensors", equation_of(as64(w), equations.relu, False))


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
