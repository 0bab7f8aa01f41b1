# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "transformers==5.23.0", "safetensors>=0.5", "numpy>=2.0"]
# ///
"""Tiny random checkpoints of every model family as `transformers` writes them, with the outputs to compare with.

    python make_golden.py --out DIR [--families gpt2,llama] [--seed 0]

For every family, DIR/NAME/ gets `config.json`, `model.safetensors` and `golden.npz`; `config_legacy.json` says the
same in the words that `transformers` used before version 5, as most published checkpoints do.
`llama_sharded` is `llama` in several files with an index. One JSON object is printed: per family, the bytes, and how
much the reference differs from itself (see `differences`). Every weight is drawn anew, norms and biases too.

golden.npz, for language models (`mask` is true at real tokens; the prompts are padded on the right):

    tokens [batch pos] int32, mask [batch pos] bool
    logits [batch pos d_vocab], logits_bfloat16: the same model in bfloat16, its logits as float32
    hidden_states [layer+1 batch pos d_model]: what enters each block; the last is what leaves the final norm, and in
        `bert` and `vit` what leaves the last block
    final_stream [batch pos d_model]: what enters the final norm
    router [layer batch pos expert]: a mixture's router, before the softmax
    greedy [batch new] int32: the continuation of each prompt alone, as chosen by the largest logit
    greedy_margin: the smallest distance between the largest and the second largest logit on the way
    versions: of torch and transformers

`bert` has `token_types`, and `output` (the last hidden state, there is no final norm) for logits; `vit` has `pixels`
[batch channel height width] for tokens and mask, and logits [batch label]. Values at padding are not to be compared.

Names of the tensors, with N for the layer and E for the expert; matrices are [out in] unless it says otherwise:

    gpt2       transformer.{wte,wpe,ln_f}, transformer.h.N.{ln_1,ln_2,attn.c_attn,attn.c_proj,mlp.c_fc,mlp.c_proj};
               matrices are [in out]; c_attn is q, k, v side by side; tied, so there is no lm_head
    gpt_neox   gpt_neox.{embed_in,final_layer_norm}, embed_out, gpt_neox.layers.N.{input_layernorm,
               post_attention_layernorm,attention.query_key_value,attention.dense,mlp.dense_h_to_4h,mlp.dense_4h_to_h};
               query_key_value is [head, 3, d_head] in its first axis
    gptj       transformer.{wte,ln_f}, lm_head (with a bias), transformer.h.N.{ln_1,attn.{q,k,v,out}_proj,
               mlp.fc_in,mlp.fc_out}
    llama      model.{embed_tokens,norm}, lm_head, model.layers.N.{input_layernorm,post_attention_layernorm,
               self_attn.{q,k,v,o}_proj,mlp.{gate,up,down}_proj}; so are mistral, smollm2, smollm3, gemma and
               qwen2 (which has biases in q, k and v); no lm_head where embeddings are tied
    qwen3      adds self_attn.{q,k}_norm [d_head]
    gemma2     adds pre_feedforward_layernorm and post_feedforward_layernorm; gemma3 has q_norm and k_norm as well
    olmo2      post_attention_layernorm, post_feedforward_layernorm, no input_layernorm; self_attn.{q,k}_norm over all
               heads together
    phi3       self_attn.qkv_proj (q, k, v one after another) and mlp.gate_up_proj (gate, then up)
    qwen3_moe  as qwen3, with mlp.gate (the router) and mlp.experts.E.{gate,up,down}_proj
    olmoe      as qwen3_moe, with self_attn.{q,k}_norm over all heads together
    bert       embeddings.{word,position,token_type}_embeddings, embeddings.LayerNorm, encoder.layer.N.{
               attention.self.{query,key,value},attention.output.{dense,LayerNorm},intermediate.dense,
               output.{dense,LayerNorm}}, pooler.dense
    vit        vit.embeddings.{cls_token,position_embeddings,patch_embeddings.projection}, vit.layernorm, classifier,
               vit.encoder.layer.N.{attention.attention.{query,key,value},attention.output.dense,layernorm_before,
               layernorm_after,intermediate.dense,output.dense}
"""
# pyright: reportMissingImports=false

import argparse
import json
import math
import shutil
import sys
import tempfile
import zlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from legacy import legacy_config
from settings import CHOSEN, FAMILIES

LENGTHS, NEW_TOKENS, IMAGES = (12, 7, 4), 8, 3
# The float32 logits of two tokens differ by 1e-5 between implementations, those of two experts in bfloat16 by 0.02.
DRAWS, GREEDY_MARGIN, ROUTER_MARGIN = 2000, 0.01, 0.04
FIRST_TOKEN = 3  # below it: padding, beginning, end
CLASSES = {"bert": transformers.BertModel, "vit": transformers.ViTForImageClassification}
FINAL_NORMS = ("transformer.ln_f", "gpt_neox.final_layer_norm", "model.norm", "vit.layernorm")
Arrays = dict[str, np.ndarray]


def _spread(module: torch.nn.Module, name: str, shape: torch.Size) -> float:
    """One over the square root of a matrix' inputs, so that activations neither die out nor grow.

    Embeddings get less, so that a tied output does not merely repeat its input.
    """
    if isinstance(module, torch.nn.Embedding) or name in ("cls_token", "position_embeddings"):
        return 0.1
    if isinstance(module, transformers.pytorch_utils.Conv1D):
        return shape[0] ** -0.5
    # a matrix per expert has its inputs last; a convolution has them in all axes but the first
    return shape[-1] ** -0.5 if len(shape) == 3 else math.prod(shape[1:]) ** -0.5


def build(family: str, seed: int) -> Any:
    """A random model of a family: norms near one, the final one near three, biases near zero."""
    kind, settings = FAMILIES[family]
    if family != "vit":
        settings = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **settings}
    config = transformers.AutoConfig.for_model(kind, **settings)
    model = CLASSES[family](config) if family in CLASSES else transformers.AutoModelForCausalLM.from_config(config)
    rng = np.random.default_rng([seed, zlib.crc32(family.encode())])
    drawn = set()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix=path, recurse=False):
            if parameter in drawn:
                continue
            drawn.add(parameter)
            array = rng.standard_normal(parameter.shape)
            if parameter.ndim == 1:
                centre = 0.0 if name.endswith("bias") else 3.0 if path in FINAL_NORMS else 1.0
                # Gemma's norms multiply by one plus the weight.
                array = 0.3 * array + centre - float(name.endswith("weight") and kind.startswith("gemma"))
            else:
                array *= _spread(module, name.rsplit(".", 1)[-1], parameter.shape)
            parameter.data.copy_(torch.from_numpy(array))
    return model


def save(model: Any, folder: Path, **options: Any) -> None:
    """Writes config.json and the weights into an empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder, **options)
    (folder / "generation_config.json").unlink(missing_ok=True)


def load(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The saved model in another precision; its rotary frequencies stay in float32."""
    make = CLASSES.get(family, transformers.AutoModelForCausalLM)
    options = {"attn_implementation": "eager", "experts_implementation": "eager", "use_safetensors": True}
    return make.from_pretrained(folder, dtype=dtype, **options).eval()


def inputs(family: str, model: Any, seed: int) -> Arrays:
    """Random images, or ragged prompts padded on the right."""
    rng = np.random.default_rng([seed, 1, zlib.crc32(family.encode())])
    config = model.config
    if family == "vit":
        size = (IMAGES, config.num_channels, config.image_size, config.image_size)
        return {"pixels": rng.standard_normal(size).astype(np.float32)}
    mask = np.arange(max(LENGTHS))[None, :] < np.array(LENGTHS)[:, None]
    tokens = np.where(mask, rng.integers(FIRST_TOKEN, config.vocab_size, mask.shape), config.pad_token_id)
    arrays = {"tokens": tokens.astype(np.int32), "mask": mask}
    return arrays | ({"token_types": np.zeros_like(arrays["tokens"])} if family == "bert" else {})


def forward(model: Any, given: Arrays) -> Arrays:
    """The model's output, its hidden states and what enters its final norm."""
    if "pixels" in given:
        arguments = {"pixel_values": torch.from_numpy(given["pixels"]).to(model.dtype)}
    else:
        names = {"tokens": "input_ids", "mask": "attention_mask", "token_types": "token_type_ids"}
        arguments = {names[name]: torch.from_numpy(given[name].astype(np.int64)) for name in given}
    entered = []
    modules = dict(model.named_modules())
    hooks = [
        modules[name].register_forward_pre_hook(lambda _, positional: entered.append(positional[0]))
        for name in FINAL_NORMS
        if name in modules
    ]
    options = {"output_router_logits": True} if hasattr(model.config, "num_experts") else {}
    result = model(**arguments, output_hidden_states=True, **options)
    for hook in hooks:
        hook.remove()
    found = {"hidden_states": torch.stack(result.hidden_states)}
    if entered:
        (found["final_stream"],) = entered
    if options:
        found["router"] = torch.stack(result.router_logits).reshape(
            -1, *given["tokens"].shape, model.config.num_experts
        )
    found |= {"logits": result.logits} if "logits" in result else {"output": result.last_hidden_state}
    return {name: value.to(torch.float32).numpy() for name, value in found.items()}


def greedy(model: Any, given: Arrays) -> Arrays:
    """The tokens that follow each prompt alone, by the model's own `generate`."""
    model.generation_config.eos_token_id = None
    tokens, margins = [], []
    for row, length in zip(given["tokens"], given["mask"].sum(1), strict=True):
        prompt = torch.from_numpy(row[None, :length].astype(np.int64))
        result = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens.append(result.sequences[0, length:].numpy().astype(np.int32))
        best = torch.stack(result.logits)[:, 0].topk(2).values
        margins.append((best[:, 0] - best[:, 1]).min().item())
    return {"greedy": np.stack(tokens), "greedy_margin": np.asarray(min(margins), np.float32)}


def differences(family: str, folder: Path, golden: Arrays, given: Arrays) -> dict[str, float]:
    """Largest differences at real tokens, and what to judge them by.

    `padding`: prompts alone against the padded batch. `float64`: against prompts alone in double precision.
    `bfloat16`: against the batch in that precision. `scale`: the root mean square of the output.
    """
    name = "output" if family == "bert" else "logits"
    real = given.get("mask", np.ones(IMAGES, bool))
    found = {"scale": float(np.sqrt(np.mean(golden[name][real] ** 2)))}
    found["bfloat16"] = float(np.abs(golden[f"{name}_bfloat16"] - golden[name])[real].max())
    lengths = LENGTHS if "mask" in given else (None,) * IMAGES
    for kind, dtype in (("padding", torch.float32), ("float64", torch.float64)):
        model, largest = load(family, folder, dtype), []
        for i, length in enumerate(lengths):
            alone = forward(model, {key: value[i : i + 1, :length] for key, value in given.items()})[name][0]
            largest.append(np.abs(alone - golden[name][i, :length]).max())
        found[kind] = float(max(largest))
    if "greedy_margin" in golden:
        found["greedy_margin"] = float(golden["greedy_margin"])
    return found


def decisive(golden: Arrays) -> bool:
    """Whether rounding cannot change what is chosen, the next token or an expert, and the chosen tokens vary."""
    if "router" in golden:
        best = -np.sort(-golden["router"][:, golden["mask"]])
        if (best[..., CHOSEN - 1] - best[..., CHOSEN]).min() < ROUTER_MARGIN:
            return False
    if "greedy" not in golden:
        return True
    return float(golden["greedy_margin"]) > GREEDY_MARGIN and len(np.unique(golden["greedy"])) >= NEW_TOKENS


def outputs(family: str, folder: Path, given: Arrays) -> Arrays:
    """What golden.npz holds, for the checkpoint in a folder."""
    model = load(family, folder)
    golden = given | forward(model, given)
    low = forward(load(family, folder, torch.bfloat16), given)
    golden |= {f"{name}_bfloat16": low[name] for name in ("logits", "output") if name in low}
    if family not in CLASSES:
        golden |= greedy(model, given)
    return golden | {"versions": np.array([f"{name} {version(name)}" for name in ("torch", "transformers")])}


def write_legacy(family: str, folder: Path, given: Arrays, golden: Arrays) -> None:
    """Writes config_legacy.json, with which the weights must give the same outputs."""
    legacy = legacy_config(json.loads((folder / "config.json").read_text()))
    text = json.dumps(legacy, indent=2, sort_keys=True) + "\n"
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "config.json").write_text(text)
        shutil.copy(folder / "model.safetensors", name)
        found = forward(load(family, Path(name)), given)
    if any(not np.array_equal(value, golden[key]) for key, value in found.items()):
        raise SystemExit(f"{family}: config_legacy.json describes another model than config.json")
    (folder / "config_legacy.json").write_text(text)


def write(family: str, folder: Path, seed: int) -> dict[str, float]:
    """Writes one family's checkpoint and golden, the first decisive draw; returns its bytes and its differences."""
    for draw in range(DRAWS):
        model = build(family, seed + draw)
        save(model, folder)
        given = inputs(family, model, seed + draw)
        golden = outputs(family, folder, given)
        if decisive(golden):
            break
    else:
        raise SystemExit(f"none of {DRAWS} draws of {family} is decisive; name another --seed")
    saved: dict[str, Any] = dict(golden)
    np.savez_compressed(folder / "golden.npz", **saved)
    write_legacy(family, folder, given, golden)
    if family == "llama":
        sharded = folder.with_name("llama_sharded")
        save(model, sharded, max_shard_size="48KB")
        shutil.copyfile(folder / "golden.npz", sharded / "golden.npz")
    size = sum(file.stat().st_size for file in folder.iterdir())
    return {"bytes": size, "draw": draw, **differences(family, folder, golden, given)}


def main() -> None:
    """Writes the families named on the command line."""
    parser = argparse.ArgumentParser(description="Writes tiny random checkpoints and their outputs.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--families", default=",".join(FAMILIES), help="comma-separated names")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    names = arguments.families.split(",")
    if unknown := set(names) - set(FAMILIES):
        raise SystemExit(f"no family is called {', '.join(sorted(unknown))}; there are {', '.join(FAMILIES)}")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    report = {}
    for name in names:
        report[name] = write(name, arguments.out / name, arguments.seed)
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
