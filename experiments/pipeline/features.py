"""Stage 3: what the most useful latents respond to and what they do, with explanations scored on unseen text."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from experiments.estimates import with_interval
from experiments.pipeline.config import PipelineConfig
from experiments.pipeline.decomposition import sae_from_arrays
from experiments.pipeline.subject import Outcome, Subject
from mi_jax.features import Codes, deciles, detection, fit_rule, removal_effects, token_effects
from mi_jax.run import Progress

SAMPLE = 4
WINDOW = 12


def features(subject: Subject, arrays: Mapping[str, np.ndarray], config: PipelineConfig, progress: Progress) -> Outcome:
    """Cards for the latents whose removal would cost the model most, by the arrays of the decomposition stage."""
    sae = sae_from_arrays(arrays)
    columns = ("tokens", "values", "indices")
    train, held_out = (Codes(*(arrays[f"{side}.{name}"] for name in columns)) for side in ("train", "held_out"))
    usefulness = _usefulness(subject, sae, arrays, config, progress)
    density = train.density(config.d_sae)
    latents = np.argsort(-usefulness)[: config.features]

    progress(0.6, "explaining and detecting")
    activations, unseen = train.activations(latents), held_out.activations(latents)
    d_vocab = subject.model.config.d_vocab
    rules = [fit_rule(train.tokens, a > 0, d_vocab=d_vocab) for a in activations]
    scores = detection(rules, held_out.tokens, unseen > 0)
    score, low, high, null = scores.summary(seed=config.seed)
    precision, *precision_ci, precision_null = scores.summary(seed=config.seed, metric="average_precision")

    cards = []
    for i, latent in enumerate(latents.tolist()):
        progress(0.7 + 0.3 * i / len(latents), f"latent {latent}")
        promotes, suppresses = token_effects(subject.model, sae, latent, n=8)
        cards.append(
            {
                "id": latent,
                "usefulness": float(usefulness[latent]),
                "density": float(density[latent]),
                "max_activation": float(activations[i].max()),
                "detection": _number(scores.own[i]),
                "detection_null": _number(scores.other[i]),
                "precision": _number(scores.own_precision[i]),
                "precision_null": _number(scores.other_precision[i]),
                "rule": [subject.tokenizer.decode([t]) for t in rules[i].triggers(6)],
                "promotes": [(subject.tokenizer.decode([t]), round(v, 3)) for t, v in promotes],
                "suppresses": [(subject.tokenizer.decode([t]), round(v, 3)) for t, v in suppresses],
                "deciles": _deciles(subject, activations[i], train, config.seed + latent),
            }
        )
    results = with_interval("features.detection_score", score, low, high)
    results |= with_interval("features.detection_average_precision", precision, *precision_ci) | {
        "features.detection_score_null": null,
        "features.detection_average_precision_null": precision_null,
        "features.detection_base_rate": float(np.nanmean(scores.base_rate)),
        "features.scored": int((~np.isnan(scores.own)).sum()),
        "features.cards": len(cards),
    }
    notes = [
        "Useful: the estimated rise of the next-token loss, in millinats per token, when the latent is taken out "
        "(gradient times activation, on training text).",
        "Detection: AUROC of a readable rule, how often the latent fires at each token and after each token, counted "
        f"on training text and tested on held-out documents; {results['features.scored']} of {len(cards)} latents fire "
        "often enough there. The null gives each latent the rules of the others. AUROC flatters where events are rare: "
        f"average precision is {precision:.2f}, {precision_null:.2f} with the rules of others, and "
        f"{results['features.detection_base_rate']:.4f} by chance.",
        "Promotes and suppresses: the direct effect on the logits, for a stream of unit size.",
    ]
    summary = {"score": score, "score_null": null, "ci_low": low, "ci_high": high}
    summary |= {"precision": precision, "precision_null": precision_null}
    return Outcome(results, {"notes": notes, "detection": summary, "cards": cards})


def _usefulness(subject: Subject, sae, arrays, config: PipelineConfig, progress: Progress) -> np.ndarray:
    """Rise of the loss in millinats per token, averaged over batches of training contexts."""
    stream, tokens = arrays["stream_sample"], arrays["train.tokens"]
    layer = jnp.asarray(config.layer + 1, jnp.int32)
    total = np.zeros(config.d_sae)
    starts = range(0, len(stream) - SAMPLE + 1, SAMPLE)
    for start in starts:
        progress(0.6 * start / len(stream), "removal effects")
        rows = slice(start, start + SAMPLE)
        effect = removal_effects(subject.model, sae, jnp.asarray(stream[rows]), jnp.asarray(tokens[rows]), layer)
        total += np.asarray(effect, np.float64)
    return 1000 * total / len(starts)


def _deciles(subject: Subject, activations: np.ndarray, codes: Codes, seed: int) -> list[dict]:
    return [
        {
            "decile": d.decile,
            "low": d.low,
            "high": d.high,
            "contexts": [
                {
                    "tokens": subject.tokenizer.strings(e.tokens),
                    "activations": e.activations,
                    "focus": e.focus,
                }
                for e in d.examples
            ],
        }
        for d in deciles(activations, codes, per_decile=2, window=WINDOW, seed=seed)
    ]


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
