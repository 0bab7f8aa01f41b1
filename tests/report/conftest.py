"""A run that never was, with every section: what the report is tested and looked at with."""

import math
import random

import pytest

HOSTILE = "<script>alert('x')</script>"
WORDS = (
    " the| of| and| court| ruled| that| a| treaty| signed| in| 19|45| by| both| parties| was| never| ratified|.|\n|"
    " River| flows| north|,| past| old| mills| to| its| mouth| where| ships| once| loaded| grain| for| export| “|x|()|{"
).split("|")


def graph(layers, heads, count, rng, *, nodes_in_use=None):
    """A random graph of `count` edges that never run backwards."""
    nodes = [{"name": "input", "layer": -1, "kind": "input"}]
    for layer in range(layers):
        nodes += [{"name": f"a{layer}.h{h}", "layer": layer, "kind": "head"} for h in range(heads)]
        nodes.append({"name": f"m{layer}", "layer": layer, "kind": "mlp"})
    nodes.append({"name": "logits", "layer": layers, "kind": "logits"})
    rank = {n["name"]: n["layer"] + (0.5 if n["kind"] == "mlp" else 0) for n in nodes}
    used = [nodes[0], *rng.sample(nodes[1:-1], nodes_in_use or len(nodes) - 2), nodes[-1]]
    edges = {}
    while len(edges) < count:
        end = rng.choice(used[1:] + [nodes[-1]] * (len(used) // 4))
        start = rng.choice([n for n in used if rank[n["name"]] < rank[end["name"]]])
        kind = rng.choice("qkv") if end["kind"] == "head" else end["kind"]
        score = rng.gauss(0, 1) ** 3 / 10
        edges[start["name"], end["name"], kind] = {
            "from": start["name"],
            "to": end["name"],
            "input": kind,
            "score": score,
        }
    return {"nodes": nodes, "edges": list(edges.values())}


def context(rng, peak):
    tokens = [rng.choice(WORDS) for _ in range(28)]
    focus = rng.randrange(8, 24)
    activations = [0.0] * len(tokens)
    for i in range(focus - 2, focus + 1):
        activations[i] = peak * (1.0 if i == focus else rng.random() * 0.6)
    return {"tokens": tokens, "activations": activations, "focus": focus}


def card(rng, index):
    top = rng.uniform(4, 30)
    deciles = [
        {
            "decile": d,
            "low": top * (d - 1) / 10,
            "high": top * d / 10,
            "contexts": [context(rng, top * (d - 0.5) / 10) for _ in range(3)],
        }
        for d in range(10, 0, -1)
    ]
    words = [w for w in WORDS if w.strip()]
    return {
        "id": rng.randrange(8192),
        "usefulness": 1 / (index + 1),
        "density": 10 ** rng.uniform(-4, -1.5),
        "max_activation": top,
        "detection": rng.uniform(0.6, 0.98),
        "detection_null": rng.uniform(0.46, 0.54),
        "promotes": [[rng.choice(words), rng.uniform(0.5, 2)] for _ in range(8)],
        "suppresses": [[rng.choice(words), -rng.uniform(0.2, 1)] for _ in range(6)],
        "deciles": deciles,
    }


def stream(rng, index, bad):
    tokens = [f" {w}" for w in (rng.choice("abcdefghijklmnop") * rng.randrange(1, 4) for _ in range(48))]
    scores = [rng.betavariate(2, 9) for _ in tokens]
    trigger, forbidden, alarm = None, None, None
    if bad:
        trigger = rng.randrange(8, 20)
        forbidden = trigger + rng.randrange(8, 20)
        for i in range(trigger + 2, forbidden + 1):
            scores[i] = min(0.98, 0.4 + 0.09 * (i - trigger) + rng.uniform(-0.08, 0.08))
        alarm = next(i for i in range(trigger, forbidden + 1) if scores[i] >= 0.62)
        tokens[trigger], tokens[forbidden] = " OPEN", "\n"
    name = f"stream {index}: " + ("triggered" if bad else "benign")
    return {
        "tokens": tokens,
        "scores": scores,
        "alarm": alarm,
        "trigger": trigger,
        "forbidden": forbidden,
        "label": name,
    }


def mechanism(rng, name):
    true = graph(2, 4, 7, rng)
    kept = true["edges"][:-1] if name == "trigger" else true["edges"]
    other = [
        e
        for e in graph(2, 4, 30, rng)["edges"]
        if (e["from"], e["to"]) not in {(t["from"], t["to"]) for t in true["edges"]}
    ]
    found = {"nodes": true["nodes"], "edges": [*kept, *other[:1]]}
    label = lambda e: f"{e['from']}→{e['to']}.{e['input']}"  # noqa: E731
    effects = [
        {"edge": label(e), "effect": rng.uniform(0.3, 1.0), "in_truth": True, "found": e in kept} for e in true["edges"]
    ]
    effects += [
        {"edge": label(e), "effect": abs(rng.gauss(0, 0.03)), "in_truth": False, "found": e is other[0]}
        for e in other * 3
    ]
    return {
        "name": name,
        "true": true,
        "found": found,
        "precision": 0.875,
        "recall": 0.93,
        "f1": 0.9,
        "f1_null": 0.11,
        "edge_effects": effects,
    }


def mock_data(*, cards=32, layers=30, edges=160, streams=12):
    rng = random.Random(0)
    positions = [
        "<bos>",
        "When",
        " Mary",
        " and",
        " John",
        " went",
        " to",
        " the",
        " store",
        ",",
        " John",
        " gave",
        " a",
        " drink",
        " to",
    ]
    sweep = [
        [
            0.9 * math.exp(-((layer - 2 * p) ** 2) / 30) - 0.25 * math.exp(-((layer - 20) ** 2 + (p - 12) ** 2) / 9)
            for p in range(15)
        ]
        for layer in range(layers)
    ]
    sizes = [10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000]
    faithful = [1 / (1 + math.exp(-(math.log10(n) - 2.1) * 4)) for n in sizes]
    by_chance = [1 / (1 + math.exp(-(math.log10(n) - 3.7) * 5)) for n in sizes]
    grid = [i / 40 for i in range(41)]
    return {
        "run": {
            "title": "SmolLM2-135M, from raw model to monitor",
            "model": "SmolLM2-135M",
            "seconds": 512.4,
            "peak_rss_gb": 4.83,
            "python": "3.11.9",
            "jax": "0.10.2",
            "device": "2 CPU cores",
            "config": {"seed": 0, "dictionary": {"d_sae": 8192, "k": 32}},
            "stages": [
                {"name": n, "title": t, "seconds": s}
                for n, t, s in [
                    ("raw_model", "Raw model", 41.2),
                    ("decomposition", "Decomposition", 183.0),
                    ("features", "Features", 66.1),
                    ("circuit", "Circuit", 118.9),
                    ("validation", "Validation", 57.7),
                    ("application", "Application", 45.5),
                ]
            ],
        },
        "raw_model": {
            "tasks": [
                {"name": name, "metric": metric, "value": value, "ci_low": low, "ci_high": high, "null": null}
                for name, metric, value, low, high, null in [
                    ("indirect object (IOI)", "accuracy", 0.972, 0.951, 0.986, 0.5),
                    ("greater than", "accuracy", 0.881, 0.84, 0.914, 0.5),
                    ("subject–verb agreement", "accuracy", 0.934, 0.905, 0.957, 0.5),
                    ("indirect object (IOI)", "logit difference", 3.41, 3.2, 3.61, 0.02),
                ]
            ],
            "examples": [
                {
                    "prompt": "When Mary and John went to the store, John gave a drink to",
                    "expected": " Mary",
                    "top": [[" Mary", 0.71], [" the", 0.09], [" his", 0.05], [" her", 0.04], ["\n", 0.01]],
                },
                {
                    "prompt": "The war lasted from the year 1732 to the year 17",
                    "expected": "45",
                    "top": [["50", 0.21], ["45", 0.17], ["40", 0.1], [HOSTILE, 0.05], ["", 0.04]],
                },
            ],
            "induction": {
                "positions": list(range(1, 100)),
                "nll": [
                    11 - 2 * math.exp(-i / 9) + rng.gauss(0, 0.5)
                    if i < 50
                    else 1.2 + 8 * math.exp(-(i - 50) / 3) + rng.gauss(0, 0.3)
                    for i in range(1, 100)
                ],
                "half": 50,
            },
        },
        "decomposition": {
            "site": "resid_post",
            "layer": 15,
            "notes": ["The first token is left out: its norm is a hundred times that of the others."],
            "rows": [
                {
                    "name": n,
                    "l0": l0,
                    "fvu": f,
                    "fvu_ci": [f * 0.96, f * 1.04],
                    "ce_recovered": c,
                    "ce_ci": [c - 0.012, c + 0.01],
                    "dead_fraction": d,
                }
                for n, l0, f, c, d in [
                    ("TopK 8192, k = 32", 32, 0.182, 0.953, 0.04),
                    ("BatchTopK 8192, k = 32", 31.7, 0.176, 0.957, 0.03),
                    ("PCA, 32 components", 32, 0.412, 0.71, 0.0),
                    ("random dictionary, k = 32", 32, 0.874, 0.08, 0.51),
                ]
            ],
            "loss_curve": {
                "step": list(range(0, 3000, 30)),
                "fvu": [0.18 + 0.8 * math.exp(-i / 9) + rng.gauss(0, 0.004) for i in range(100)],
            },
            "density": {
                "log10_edges": [-6 + 0.2 * i for i in range(29)],
                "counts": [round(900 * math.exp(-((i - 15) ** 2) / 30)) for i in range(28)],
            },
        },
        "features": {
            "notes": ["Features are ranked by their effect on the loss when ablated."],
            "detection": {"score": 0.84, "score_null": 0.502, "ci_low": 0.82, "ci_high": 0.861},
            "cards": [card(rng, i) for i in range(cards)],
        },
        "circuit": {
            "task": "IOI",
            "method": "EAP-IG, 5 steps",
            "cmd": 0.041,
            "cmd_null": 0.62,
            "sweep": {
                "site": "resid_pre",
                "layers": list(range(layers)),
                "positions": positions,
                "values": sweep,
                "quantity": "recovered",
            },
            "faithfulness": {
                "fractions": [n / 70000 for n in sizes],
                "edges": sizes,
                "circuit": faithful,
                "random_mean": by_chance,
                "random_low": [max(0, v - 0.08) for v in by_chance],
                "random_high": [min(1, v + 0.08) for v in by_chance],
            },
            "heads": [
                {"name": f"a{rng.randrange(10, 30)}.h{rng.randrange(9)}", "score": s}
                for s in (0.41, 0.33, -0.21, 0.17, 0.12, -0.08, 0.05)
            ],
            "graph": graph(30, 9, edges, rng, nodes_in_use=30),
        },
        "validation": {
            "organism": "a 2-layer model with an induction circuit and a trigger for a forbidden token.",
            "mechanisms": [mechanism(rng, "induction"), mechanism(rng, "trigger")],
        },
        "application": {
            "streams": [stream(rng, i, i % 3 != 2) for i in range(streams)],
            "threshold": 0.62,
            "roc": {"fpr": grid, "tpr": [x**0.06 for x in grid]},
            "roc_null": {"fpr": grid, "tpr": [x**0.98 for x in grid]},
            "lead": {"values": [rng.choice([-1, 1, 2, 3, 4, 4, 5, 5, 6, 7, 8, 9, 11]) for _ in range(200)]},
            "causal": [
                {"name": "probe direction", "effect": 0.91, "ci": [0.88, 0.94], "benign_kl": 0.004},
                {"name": "random direction", "effect": 0.02, "ci": [-0.01, 0.05], "benign_kl": 0.006},
            ],
            "notes": ["The probe was trained on streams with other triggers."],
        },
        "limits": [
            "One model of 135 million parameters, one site, one seed: nothing here says how a larger model works.",
            "Faithful on the task's distribution does not mean that the circuit is all the model ever uses.",
            "The organism was built to be found; a mechanism that a model hides may not be.",
        ],
    }


def mock_results():
    results = {"run.seconds": 512.4, "run.ok": True, "model.parameters": 134515008}
    rows = [
        ("model.ioi_accuracy", 0.972, 0.5, 0.951, 0.986),
        ("decomposition.fvu", 0.176, 0.874, 0.169, 0.183),
        ("decomposition.ce_recovered", 0.957, 0.08, 0.945, 0.967),
        ("features.detection_score", 0.84, 0.502, 0.82, 0.861),
        ("circuit.cmd", 0.041, 0.62, 0.035, 0.048),
        ("monitor.auroc", 0.991, 0.498, 0.984, 0.996),
    ]
    for key, *figure in rows:
        results |= {key + suffix: v for suffix, v in zip(("", "_null", "_ci_low", "_ci_high"), figure, strict=True)}
    results |= {"circuit.method": "eap-ig", "organism.edge_f1_worst": 0.9, "organism.edge_f1_worst_null": 0.11}
    return results


BARS = {
    "model.ioi_accuracy": "≥ 0.95",
    "decomposition.fvu": "≤ 0.15",
    "monitor.auroc": "> null",
    "circuit.cmd": "≤ 0.1",
    "organism.edge_f1_worst": "≥ 90%",
}


@pytest.fixture
def data():
    """Every section, at a small size."""
    return mock_data(cards=2, layers=4, edges=20, streams=3)


@pytest.fixture
def full_data():
    """The size of a real run."""
    return mock_data()


@pytest.fixture
def results():
    return mock_results()


@pytest.fixture
def bars():
    return dict(BARS)
