# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "transformer-lens==3.9.0", "safetensors>=0.5", "numpy>=2.0"]
# ///
"""Scores of all edges with the EAP-IG package, timed.

    python edge_scores_eap_ig.py --source DIR [--method eap-ig] [--steps 5] [--arrays FILE.safetensors] [--repeats 1]

DIR is the folder `src` of a checkout of https://github.com/hannamw/EAP-IG, which is not on PyPI. What it hard-codes is
replaced in a copy: the device 'cuda' by 'cpu', the colours of drawings by nothing, prompts that are texts by tokens.
Only the table of positions has a gradient, which its backward pass needs to start from. One JSON object is printed.
"""
# pyright: reportMissingImports=false, reportPrivateImportUsage=false, reportAttributeAccessIssue=false

import sys
import tempfile
from pathlib import Path
from typing import Any

import edge_scores_peer
import torch
from edge_scores_peer import command_line, difference
from hooked_transformer_sweep import hooked_transformer
from transformer_lens_sweep import Arrays


def imported(source: str, folder: str) -> tuple[Any, Any]:
    """The package's modules `attribute` and `graph`, on a CPU and with tokens for prompts."""
    files = list((Path(source) / "eap").glob("*.py"))
    if not files:
        raise SystemExit(f"{source} has no folder 'eap' with Python files; name the folder src of a checkout of EAP-IG")
    copy = Path(folder) / "eap"
    copy.mkdir()
    for file in files:
        (copy / file.name).write_text(file.read_text().replace("'cuda'", "'cpu'"))
    (copy / "visualization.py").write_text("get_color = generate_random_color = None\n")
    sys.path.insert(0, folder)
    from eap import attribute, graph

    def tokens_of(model: Any, prompts: torch.Tensor, max_length: int | None = None) -> tuple[Any, ...]:
        return prompts, torch.ones_like(prompts), torch.full((len(prompts),), prompts.shape[1]), prompts.shape[1]

    attribute.tokenize_plus = tokens_of
    return attribute, graph


def model_and_prompts(arrays: Arrays, clean: torch.Tensor, corrupt: torch.Tensor) -> tuple[Any, ...]:
    """The model, frozen but for its positions, and all pairs as one batch."""
    model = hooked_transformer(arrays)
    model.set_use_attn_result(True)
    model.set_use_split_qkv_input(True)
    model.set_use_hook_mlp_in(True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "pos_embed.W_pos")
    return model, [(clean, corrupt, None)]


def loss(logits: torch.Tensor, clean_logits: Any, lengths: Any, labels: Any) -> torch.Tensor:
    """Minus the sum of the differences; the package divides by the number of prompts."""
    return -difference(logits).sum()


def main() -> None:
    """Times what the module's docstring names."""
    parser = command_line("Times the edge scores of the EAP-IG package.")
    parser.add_argument("--source", required=True, help="folder src of a checkout of EAP-IG")
    source = parser.parse_known_args()[0].source

    with tempfile.TemporaryDirectory() as folder:
        attribute, graph = imported(source, folder)

        def score(made: tuple[Any, ...], method: str, steps: int) -> Any:
            model, batches = made
            found = graph.Graph.from_model(model)
            theirs = {"eap": "EAP", "eap-ig": "EAP-IG-inputs"}[method]
            attribute.attribute(model, found, batches, loss, theirs, ig_steps=steps, quiet=True)
            return found

        def named(made: tuple[Any, ...], found: Any) -> dict[str, float]:
            return {name: float(edge.score) for name, edge in found.edges.items()}

        edge_scores_peer.main(model_and_prompts, score, named, packages=("transformer-lens",), parser=parser)


if __name__ == "__main__":
    main()
