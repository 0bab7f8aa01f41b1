"""Edge scores of the EAP-IG package on a random GPT-2-like model, with the weights and prompts they belong to.

    python tests/circuits/golden_edges/make.py PATH_TO_EAP_IG

PATH_TO_EAP_IG is a checkout of https://github.com/hannamw/EAP-IG. It runs on TransformerLens 2 or 3, which have
`HookedTransformer`, and on a CPU: its sources are copied with the device replaced, and its tokenizer calls with prompts
that are tokens. The input of its graph is the token embedding alone, that of ours has the positions in it, which
differs only for information-flow routes; so these are computed with a table of positions that is zero.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig

OUT = Path(__file__).parent / "eap_ig.npz"
METHODS = {
    "eap": "EAP",
    "eap-ig-inputs": "EAP-IG-inputs",
    "eap-ig-activations": "EAP-IG-activations",
    "clean-corrupted": "clean-corrupted",
    "exact": "exact",
    "ifr": "information-flow-routes",
}
STEPS = 5
LENGTHS = (6, 5, 6)
CONFIG = {
    "n_layers": 2,
    "d_model": 32,
    "n_heads": 4,
    "d_head": 8,
    "d_mlp": 48,
    "d_vocab": 29,
    "n_ctx": 8,
    "act_fn": "gelu_new",
    "normalization_type": "LN",
    "dtype": torch.float64,
    "device": "cpu",
    "seed": 0,
}


def imported(package: Path, folder: str):
    """The package's modules, on a CPU and with tokens for prompts."""
    copy = Path(folder) / "eap"
    copy.mkdir()
    for source in (package / "src" / "eap").glob("*.py"):
        (copy / source.name).write_text(source.read_text().replace("'cuda'", "'cpu'"))
    # colours of drawings, which need matplotlib
    (copy / "visualization.py").write_text("get_color = generate_random_color = None\n")
    sys.path.insert(0, folder)
    from eap import attribute, evaluate, graph

    def tokens_of(model, prompts, max_length=None):
        lengths = torch.tensor([len(p) for p in prompts])
        n = max(LENGTHS)
        tokens = torch.tensor([[*p, *[0] * (n - len(p))] for p in prompts])
        return tokens, (torch.arange(n)[None] < lengths[:, None]).long(), lengths, n

    attribute.tokenize_plus = evaluate.tokenize_plus = tokens_of
    return attribute, graph


def model_of(generator: np.random.Generator) -> HookedTransformer:
    made = HookedTransformer(HookedTransformerConfig(**CONFIG))
    with torch.no_grad():
        for name, p in made.named_parameters():
            # numbers that float32 holds, so that the file can
            noise = generator.normal(0, 0.25, tuple(p.shape)) + (name.endswith(".w") or name == "ln_final.w")
            p.copy_(torch.tensor(noise.astype(np.float32)))
    made.set_use_attn_result(True)
    made.set_use_split_qkv_input(True)
    made.set_use_hook_mlp_in(True)
    return made


def loss(logits, clean_logits, lengths, labels):
    """Minus the logit difference of every prompt; the package divides sums by the number of prompts."""
    last = logits[torch.arange(len(lengths)), lengths - 1]
    labels = torch.tensor(labels)
    return last.gather(1, labels[:, 1:])[:, 0] - last.gather(1, labels[:, :1])[:, 0]


def main(package: Path) -> None:
    generator = np.random.default_rng(0)
    model = model_of(generator)
    clean = [generator.integers(0, CONFIG["d_vocab"], n).tolist() for n in LENGTHS]
    corrupt = [[p[0], (p[1] + 3) % CONFIG["d_vocab"], *p[2:]] for p in clean]
    labels = [[3, 7], [2, 9], [11, 5]]
    batches = [(clean, corrupt, labels)]
    arrays = {"lengths": np.asarray(LENGTHS), "labels": np.asarray(labels), "steps": np.asarray(STEPS)}
    for name, prompts in (("clean", clean), ("corrupt", corrupt)):
        arrays[name] = np.asarray([[*p, *[0] * (max(LENGTHS) - len(p))] for p in prompts])
    for name, p in model.named_parameters():
        arrays[f"weights/{name}"] = p.detach().numpy().astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        attribute, graph = imported(package, folder)
        for ours, theirs in METHODS.items():
            made = graph.Graph.from_model(model)
            if ours == "ifr":
                with torch.no_grad():
                    model.W_pos.zero_()
            metric = loss if ours == "exact" else lambda *args: loss(*args).sum()
            attribute.attribute(model, made, batches, metric, theirs, ig_steps=STEPS, quiet=True)
            scores = {name: float(edge.score) for name, edge in made.edges.items()}
            arrays["edges"] = np.asarray(list(scores))
            arrays[f"scores/{ours}"] = np.asarray(list(scores.values()))
    np.savez_compressed(OUT, **arrays)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
