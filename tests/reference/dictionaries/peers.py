# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "sae-lens==6.54.12", "eai-sparsify==1.3.3", "safetensors>=0.5", "numpy>=2.0"]
# ///
"""Dictionaries as SAELens and sparsify write them, and what they make of dictionaries that others wrote.

    python peers.py make --out DIR
    python peers.py check --dictionaries DIR

`make` writes DIR/FORMAT/NAME, a dictionary of random weights as its project saves it, with DIR/FORMAT/NAME.npz beside
it: activations `x` and their reconstructions `y`. `check` reads every DIR/FORMAT/NAME with its project's loader and
compares its reconstructions of `x` with `y`. The formats are `sae_lens` and `sparsify`, through their packages, and
`dictionary_learning` and `openai`, which torch alone reads (with weights_only=True) and writes. One JSON object is
printed: {FORMAT/NAME: largest difference relative to the largest entry}.
"""
# pyright: reportMissingImports=false

import argparse
import contextlib
import json
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# compilation takes longer than everything else here
os.environ["TORCHDYNAMO_DISABLE"] = "1"

import numpy as np
import sae_lens
import torch
from sae_lens.saes.sae import SAE

# it prints a line when it is imported
with contextlib.redirect_stdout(sys.stderr):
    from sparsify import SparseCoder, SparseCoderConfig

D, F, K = 8, 24, 4
SHAPE = {"d_in": D, "d_sae": F}
TRANSCODER = SHAPE | {"d_out": 6, "apply_b_dec_to_input": False}


def sae_lens_models() -> Iterator[tuple[str, Any]]:
    """One of every architecture, and of every normalisation of tokens."""
    s = sae_lens.saes
    yield "standard", s.StandardSAE(s.StandardSAEConfig(**SHAPE))
    yield "uncentred", s.StandardSAE(s.StandardSAEConfig(**SHAPE, apply_b_dec_to_input=False))
    yield "layer_norm", s.StandardSAE(s.StandardSAEConfig(**SHAPE, normalize_activations="layer_norm"))
    norm: Any = "constant_norm_rescale"
    yield "constant_norm_rescale", s.StandardSAE(s.StandardSAEConfig(**SHAPE, normalize_activations=norm))
    yield "gated", s.GatedSAE(s.GatedSAEConfig(**SHAPE))
    yield "jumprelu", s.JumpReLUSAE(s.JumpReLUSAEConfig(**SHAPE))
    yield "topk", s.TopKSAE(s.TopKSAEConfig(**SHAPE, k=K))
    yield "topk_by_norm", s.TopKSAE(s.TopKSAEConfig(**SHAPE, k=K, rescale_acts_by_decoder_norm=True))
    abstopk = s.abstopk_sae
    yield "abstopk", abstopk.AbsTopKSAE(abstopk.AbsTopKSAEConfig(**SHAPE, k=K))
    pursuit = s.matching_pursuit_sae
    yield (
        "matching_pursuit",
        pursuit.MatchingPursuitSAE(pursuit.MatchingPursuitSAEConfig(**SHAPE, residual_threshold=0.5)),
    )
    transcoder = s.transcoder
    yield "transcoder", transcoder.Transcoder(transcoder.TranscoderConfig(**TRANSCODER))
    yield "skip_transcoder", transcoder.SkipTranscoder(transcoder.SkipTranscoderConfig(**TRANSCODER))
    yield "jumprelu_transcoder", transcoder.JumpReLUTranscoder(transcoder.JumpReLUTranscoderConfig(**TRANSCODER))
    skipping = transcoder.JumpReLUSkipTranscoderConfig(**TRANSCODER)
    yield "jumprelu_skip_transcoder", transcoder.JumpReLUSkipTranscoder(skipping)


def sparsify_models() -> Iterator[tuple[str, Any]]:
    yield "topk", SparseCoder(D, SparseCoderConfig(num_latents=D, k=K))
    yield "transcoder", SparseCoder(D, SparseCoderConfig(num_latents=F, k=K, transcode=True))
    config = SparseCoderConfig(num_latents=F, k=K, transcode=True, skip_connection=True)
    yield "skip_transcoder", SparseCoder(D, config)


def shuffle(model: Any) -> None:
    """Draws all parameters anew: fresh ones are zeros, or tied."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.rand_like(parameter) if "threshold" in name else torch.randn_like(parameter))
        if type(model).__name__ == "MatchingPursuitSAE":
            model.W_dec /= model.W_dec.norm(dim=1, keepdim=True)


def reconstruct(model: Any, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        out = model(torch.as_tensor(x))
    return (out.sae_out if isinstance(model, SparseCoder) else out).numpy()


def make(out: Path) -> dict[str, float]:
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    made = {}
    for format, models in (("sae_lens", sae_lens_models()), ("sparsify", sparsify_models())):
        for name, model in models:
            shuffle(model)
            path = out / format / name
            path.mkdir(parents=True)
            model.save_model(path) if format == "sae_lens" else model.save_to_disk(path)
            x = rng.normal(1.0, 3.0, (16, D)).astype(np.float32)
            np.savez(out / format / f"{name}.npz", x=x, y=reconstruct(model, x))
            made[f"{format}/{name}"] = 0.0
    for name, state in torch_states():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.startswith("dictionary_learning"):
            path.mkdir()
            trainer = {"dict_class": "AutoEncoderTopK" if "k" in state else "AutoEncoder"}
            (path / "config.json").write_text(json.dumps({"trainer": trainer}))
        x = rng.normal(1.0, 3.0, (16, D)).astype(np.float32)
        file = path / "ae.pt" if path.is_dir() else path.with_suffix(".pt")
        torch.save(state, file)
        np.savez(path.with_suffix(".npz"), x=x, y=of_torch(file)(torch.as_tensor(x)).numpy())
        made[name] = 0.0
    return made


def torch_states() -> Iterator[tuple[str, dict[str, Any]]]:
    """Tensors as they come from training: the decoder is a transposed view, the parameters are parameters."""
    parameter = torch.nn.Parameter
    linear = {"encoder.weight": parameter(torch.randn(F, D)), "decoder.weight": torch.randn(F, D).T}
    biases = {"encoder.bias": torch.randn(F)}
    yield "dictionary_learning/relu", linear | biases | {"bias": torch.randn(D)}
    counted = {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(-1.0)}
    yield "dictionary_learning/topk", linear | biases | {"b_dec": torch.randn(D)} | counted
    state = linear | {"pre_bias": torch.randn(D), "latent_bias": torch.randn(F)}
    yield "openai/relu", state | {"activation": "ReLU", "activation_state_dict": {}}
    yield "openai/topk", state | {"activation": "TopK", "activation_state_dict": {"k": K, "postact_fn": "ReLU"}}


def of_torch(path: Path) -> Any:
    """ReLU and TopK of dictionary_learning and OpenAI, by their equations."""
    state = torch.load(path, weights_only=True)
    w_enc, w_dec = state["encoder.weight"], state["decoder.weight"]
    bias = state[next(name for name in ("pre_bias", "bias", "b_dec") if name in state)]
    b_enc = state["latent_bias" if "latent_bias" in state else "encoder.bias"]
    k = state["activation_state_dict"].get("k") if "activation" in state else state.get("k")

    @torch.no_grad()
    def forward(x):
        mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        normed = (x - mean) / (std + 1e-5) if state.get("activation") == "TopK" else x
        h = torch.relu((normed - bias) @ w_enc.T + b_enc)
        if k is not None:
            values, places = torch.topk(h, int(k), dim=-1)
            h = torch.zeros_like(h).scatter(-1, places, values)
        out = h @ w_dec.T + bias
        return out * std + mean if state.get("activation") == "TopK" else out

    return forward


def check(folder: Path) -> dict[str, float]:
    found = {}
    for arrays in sorted(folder.glob("*/*.npz")):
        format, path = arrays.parent.name, arrays.with_suffix("")
        with np.load(arrays) as archive:
            x, y = archive["x"], archive["y"]
        if format == "sae_lens":
            kind = sae_lens.saes.transcoder.Transcoder if "d_out" in (path / "cfg.json").read_text() else SAE
            out = reconstruct(kind.load_from_disk(path), x)
        elif format == "sparsify":
            out = reconstruct(SparseCoder.load_from_disk(path), x)
        else:
            out = reconstruct(of_torch(path / "ae.pt" if path.is_dir() else path.with_suffix(".pt")), x)
        found[f"{format}/{path.name}"] = float(np.abs(out - y).max() / np.abs(y).max())
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("make").add_argument("--out", type=Path, required=True)
    commands.add_parser("check").add_argument("--dictionaries", type=Path, required=True)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    print(json.dumps(make(arguments.out) if arguments.command == "make" else check(arguments.dictionaries)))


if __name__ == "__main__":
    main()
