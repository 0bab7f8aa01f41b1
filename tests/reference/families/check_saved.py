# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "transformers==5.23.0", "safetensors>=0.5", "numpy>=2.0"]
# ///
"""Whether `transformers` loads a saved model and gives the outputs that it is known by.

    python check_saved.py --model DIR --golden FILE.npz
    python check_saved.py --models DIR [--goldens DIR]

The first prints one JSON object: `logits_max_abs`, the largest difference from the golden's logits (or its `output`,
for an encoder) over real tokens; `hidden_states_max_abs`, the same over all layers; and the names of the tensors that
are `missing`, `unexpected` or `mismatched` (of another shape) in the saved files. The second does so for every folder
DIR/NAME, with the NAME/golden.npz among the goldens (those beside this file, unless told otherwise), and prints
{NAME: object}; a model that cannot be loaded or run has an `error` instead.
"""
# pyright: reportMissingImports=false

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

GOLDENS = Path(__file__).parent / "golden"
CLASSES = {"bert": transformers.BertModel, "vit": transformers.ViTForImageClassification}
INPUTS = {
    "tokens": "input_ids",
    "mask": "attention_mask",
    "token_types": "token_type_ids",
    "pixels": "pixel_values",
}


def arguments_of(golden: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """The golden's inputs as a model of `transformers` takes them."""
    given = {INPUTS[name]: golden[name] for name in INPUTS if name in golden}
    return {name: torch.from_numpy(x if x.dtype == np.float32 else x.astype(np.int64)) for name, x in given.items()}


def check(folder: Path, golden: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Loads one model in float32, from safetensors only, and compares."""
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    model, info = CLASSES.get(kind, transformers.AutoModelForCausalLM).from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        use_safetensors=True,
        local_files_only=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    result = model.eval()(**arguments_of(golden), output_hidden_states=True)
    name = "logits" if "logits" in golden else "output"
    output = result.logits if name == "logits" else result.last_hidden_state
    hidden = torch.stack(result.hidden_states)
    real = golden["mask"] if "mask" in golden else np.ones(len(golden["pixels"]), bool)
    return {
        "logits_max_abs": difference(output, golden[name], (real,)),
        "hidden_states_max_abs": difference(hidden, golden["hidden_states"], (slice(None), real)),
        **{key: sorted(map(str, info.get(f"{key}_keys", ()))) for key in ("missing", "unexpected", "mismatched")},
    }


def difference(found: torch.Tensor, wanted: np.ndarray, where: tuple[Any, ...]) -> float:
    """The largest absolute difference at some positions of arrays that must have the same shape."""
    if tuple(found.shape) != wanted.shape:
        raise ValueError(f"the model gives an array of shape {tuple(found.shape)}; the golden has {wanted.shape}")
    return float(np.abs(found.numpy() - wanted)[where].max())


def check_all(models: Path, goldens: Path) -> dict[str, Any]:
    """Every folder in `models`; what keeps one from being checked is its result."""
    found = {}
    for folder in sorted(path for path in models.iterdir() if path.is_dir()):
        try:
            found[folder.name] = check(folder, read(goldens / folder.name / "golden.npz"))
        except Exception as error:  # whatever it is, the others are still to be checked, and it is reported
            found[folder.name] = {"error": f"{type(error).__name__}: {error}"}
    return found


def read(path: Path) -> dict[str, np.ndarray]:
    """A golden's arrays."""
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def main() -> None:
    """Checks one model, or all in a folder."""
    parser = argparse.ArgumentParser(description="Loads saved models with transformers and compares their outputs.")
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--model", type=Path, help="a folder with config.json and safetensors")
    chosen.add_argument("--models", type=Path, help="a folder of such folders")
    parser.add_argument("--golden", type=Path, help="the golden.npz of --model")
    parser.add_argument("--goldens", type=Path, default=GOLDENS, help="a folder of NAME/golden.npz for --models")
    arguments = parser.parse_args()
    if arguments.model is not None and arguments.golden is None:
        parser.error("--model needs --golden")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    if arguments.model is not None:
        found = check(arguments.model, read(arguments.golden))
    else:
        found = check_all(arguments.models, arguments.goldens)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
