# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "transformer-lens==3.9.0", "safetensors>=0.5", "numpy>=2.0"]
# ///
"""Exact patching of single edges with TransformerLens, timed: one forward with one hook for every edge.

    python exact_edges_loop.py --edges NAMES.json [--arrays FILE.safetensors] [--repeats 1] [--threads 2]

NAMES.json is a list of edges such as `a0.h1->a2.h3<q>`. A hook adds to what the reader reads the difference of what the
source wrote in the corrupt run and in the clean one. One JSON object is printed: the seconds of these edges together,
those of the cached runs before them, and by how much each edge lowers the mean metric.
"""
# pyright: reportMissingImports=false, reportPrivateImportUsage=false

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from edge_scores_peer import command_line, difference, given, report
from hooked_transformer_sweep import hooked_transformer


def source_differences(model: Any, clean: torch.Tensor, corrupt: torch.Tensor) -> dict[str, torch.Tensor]:
    """Corrupt minus clean, of what every source writes."""
    model.set_use_attn_result(True)
    written = ("hook_embed", "attn.hook_result", "hook_mlp_out")
    caches = [model.run_with_cache(x, names_filter=lambda name: name.endswith(written))[1] for x in (clean, corrupt)]
    model.set_use_attn_result(False)
    out = {}
    for name in caches[0]:
        changed = caches[1][name] - caches[0][name]
        if name == "hook_embed":
            out["input"] = changed
        elif name.endswith("hook_mlp_out"):
            out[f"m{name.split('.')[1]}"] = changed
        else:
            out |= {f"a{name.split('.')[1]}.h{h}": changed[:, :, h] for h in range(changed.shape[2])}
    return out


def hook_of(reader: str, changed: torch.Tensor, layers: int) -> tuple[str, Callable[..., torch.Tensor]]:
    """A hook that adds something to what a reader reads."""
    layer, _, part = reader[1:].partition(".h")
    if not part:
        name = f"blocks.{layers - 1}.hook_resid_post" if reader == "logits" else f"blocks.{layer}.hook_mlp_in"
        return name, lambda x, hook: x + changed
    head, letter = part.rstrip(">").split("<")

    def into_head(x: torch.Tensor, hook: Any) -> torch.Tensor:
        x = x.clone()
        x[:, :, int(head)] += changed
        return x

    return f"blocks.{layer}.hook_{letter}_input", into_head


def main() -> None:
    """Times what the module's docstring names."""
    parser = command_line("Times exact patching of edges, one forward each.")
    parser.add_argument("--edges", required=True, help="JSON file with names of edges")
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    arrays, clean, corrupt = given(arguments)
    names = json.loads(Path(arguments.edges).read_text())
    model = hooked_transformer(arrays)
    model.set_use_split_qkv_input(True)
    model.set_use_hook_mlp_in(True)
    for _ in range(3):
        model(clean)
    taken, before, scores = [], [], {}
    for _ in range(arguments.repeats):
        start = time.perf_counter()
        changed = source_differences(model, clean, corrupt)
        whole = difference(model(clean)).mean()
        before.append(time.perf_counter() - start)
        start = time.perf_counter()
        for name in names:
            source, reader = name.split("->")
            hook = hook_of(reader, changed[source], model.cfg.n_layers)
            scores[name] = (whole - difference(model.run_with_hooks(clean, fwd_hooks=[hook])).mean()).item()
        taken.append(time.perf_counter() - start)
    report(("transformer-lens",), seconds=taken, cached_seconds=before, scores=scores)


if __name__ == "__main__":
    main()
