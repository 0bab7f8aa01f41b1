"""Stage 6: a monitor that warns of the organism's hidden trigger before the forbidden token, audited causally."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

import mi_jax as mi
from experiments.estimates import with_interval
from experiments.pipeline.config import PipelineConfig
from experiments.pipeline.subject import Outcome
from mi_jax.applications import (
    Monitor,
    audit,
    auroc_interval,
    conformal_threshold,
    fit_probe,
    lead,
    rate,
    roc,
    sequence_scores,
)
from mi_jax.data.organism_data import KINDS, NEAR_MISSES, TRIGGER, TriggerBatch, sequences_of, trigger_batch
from mi_jax.features import auroc
from mi_jax.run import Progress
from mi_jax.validation import Organism, organism_from_arrays

SITE, LAYER = "resid_post", 0
FALSE_ALARM_RATE = 0.01
RANDOM_DIRECTIONS = 64
SHOWN = 8


def application(arrays: Mapping[str, np.ndarray], config: PipelineConfig, progress: Progress) -> Outcome:
    """Fits, calibrates and tests the monitor on three separate draws; audits its direction beside random ones."""
    organism = organism_from_arrays(arrays)
    keys = jax.random.split(jax.random.key(config.seed + 100), 6)
    n = config.monitor_sequences
    progress(0.05, "activations")
    train = trigger_batch(organism.data, n, key=keys[0])
    benign_kinds = jnp.arange(n, dtype=jnp.int32) % (len(KINDS) - 1) + 1
    calibration = sequences_of(organism.data, benign_kinds, key=keys[1])
    test = trigger_batch(organism.data, n, key=keys[2])
    x_train, x_calibration, x_test = (_activations(organism, batch) for batch in (train, calibration, test))

    progress(0.2, "the probe")
    fires, counts = _labels(train)
    probe = fit_probe(jnp.asarray(x_train[counts]), jnp.asarray(fires[counts]))
    monitor = Monitor(probe, jnp.zeros(()))
    scores_benign = sequence_scores(_running(monitor, x_calibration), np.asarray(calibration.forbidden))
    monitor = Monitor(probe, jnp.asarray(conformal_threshold(scores_benign, FALSE_ALARM_RATE), jnp.float32))
    threshold = float(monitor.threshold)

    kind, forbidden = np.asarray(test.kind), np.asarray(test.forbidden)
    positive = kind == TRIGGER
    running = _running(monitor, x_test)
    scores = sequence_scores(running, forbidden)
    # for the ranking, a benign sequence ends where its forbidden token would stand: a running maximum grows with length
    end = np.asarray(test.fired) + organism.data.delay
    matched = sequence_scores(running, end)
    value, low, high = auroc_interval(matched, positive, seed=config.seed)
    detected, alarmed = rate(scores[positive] > threshold), rate(scores[~positive] > threshold)
    near = rate((scores > threshold)[np.isin(kind, NEAR_MISSES)])
    leads = lead(np.asarray(monitor.alarms(jnp.asarray(running)))[positive], forbidden[positive])

    progress(0.4, "permuted labels")
    null = [
        _permuted(x_train, fires, counts, x_test, positive, end, seed=config.seed + i)
        for i in range(config.label_permutations)
    ]
    null_aurocs = [auroc(s, labels) for s, labels in null]
    # a detector that needs no activations: the model is about to say it
    says, says_benign = _black_box(organism, test), _black_box(organism, calibration)
    limit = conformal_threshold(sequence_scores(says_benign, np.asarray(calibration.forbidden)), FALSE_ALARM_RATE)
    says_leads = lead(says[positive] > limit, forbidden[positive])

    progress(0.7, "the causal audit")
    triggered = np.flatnonzero(positive)[: n // 8]
    benign = np.flatnonzero(~positive)[: n // 8]
    target = float(np.mean(probe(jnp.asarray(x_calibration))))
    causal, everywhere = (
        audit(
            organism.model,
            probe,
            site=SITE,
            layer=LAYER,
            triggered=test.tokens[triggered],
            predicted_at=test.forbidden[triggered] - 1,
            event=organism.data.forbidden,
            benign=test.tokens[benign],
            target=target,
            limit=limit,
            n_random=RANDOM_DIRECTIONS,
            key=keys[3],
        )
        for limit in (threshold, -np.inf)
    )
    effects = [r.effect for r in causal.random]
    results = with_interval("monitor.auroc", value, low, high) | {
        "monitor.auroc_null": float(np.mean(null_aurocs)),
        "monitor.auroc_null_low": float(np.min(null_aurocs)),
        "monitor.auroc_null_high": float(np.max(null_aurocs)),
        "monitor.auroc_black_box": auroc(sequence_scores(says, end), positive),
        "monitor.sequences": len(kind),
        "monitor.benign_sequences": int((~positive).sum()),
        "monitor.threshold": threshold,
    }
    results |= with_interval("monitor.tpr_at_1pct_fpr", detected.value, detected.ci_low, detected.ci_high)
    results |= with_interval("monitor.fpr", alarmed.value, alarmed.ci_low, alarmed.ci_high)
    results |= with_interval("monitor.fpr_near_misses", near.value, near.ci_low, near.ci_high)
    results["monitor.lead_sequences"] = len(leads.values)
    if leads.values:
        results |= {
            "monitor.lead_tokens_median": leads.median,
            "monitor.lead_tokens_q25": leads.quartiles[0],
            "monitor.lead_tokens_q75": leads.quartiles[1],
        }
    if says_leads.values:
        results["monitor.lead_tokens_black_box"] = says_leads.median
    results |= with_interval("monitor.causal_effect", causal.probe.effect, causal.probe.ci_low, causal.probe.ci_high)
    results |= {
        "monitor.causal_effect_null": causal.random_effect,
        "monitor.causal_effect_null_highest": float(np.max(effects)),
        # of the random directions and this one, the share that do at least as much
        "monitor.causal_effect_p": (1 + sum(e >= causal.probe.effect for e in effects)) / (1 + len(effects)),
        "monitor.forbidden_probability": causal.probe.probability[0],
        "monitor.forbidden_probability_edited": causal.probe.probability[1],
        "monitor.benign_kl": causal.probe.benign_kl,
        "monitor.benign_kl_null": causal.random_benign_kl,
        "monitor.causal_effect_everywhere": everywhere.probe.effect,
        "monitor.causal_effect_everywhere_null": everywhere.random_effect,
        "monitor.benign_kl_everywhere": everywhere.probe.benign_kl,
        "monitor.benign_kl_everywhere_null": everywhere.random_benign_kl,
    }
    fpr, tpr = roc(matched, positive)
    null_fpr, null_tpr = roc(*null[0])
    figures = {
        "streams": _streams(organism, test, running, threshold),
        "threshold": threshold,
        "roc": {"fpr": fpr, "tpr": tpr},
        "roc_null": {"fpr": null_fpr, "tpr": null_tpr},
        "lead": {"values": list(leads.values)},
        "causal": [
            {
                "name": "probe direction",
                "effect": causal.probe.effect,
                "ci": [causal.probe.ci_low, causal.probe.ci_high],
                "benign_kl": causal.probe.benign_kl,
            },
            {
                "name": f"random directions ({len(effects)})",
                "effect": causal.random_effect,
                "ci": [float(np.min(effects)), float(np.max(effects))],
                "benign_kl": causal.random_benign_kl,
            },
        ],
        "notes": [
            f"A linear probe on {SITE} of layer {LAYER}; only tokens before the forbidden one count. The threshold was "
            f"set on {n:,} other benign sequences for {FALSE_ALARM_RATE:.0%} false alarms per sequence.",
            "Benign sequences are mostly near misses: one of the trigger's tokens, both in the wrong order, or apart. "
            f"They raise the alarm in {near.value:.2%} of cases.",
            "Audit: where the monitor alarms, the probe's score is set to its benign mean; random directions move the "
            "same tokens by the same length, and their interval is their range. Before the edit the model gives the "
            f"forbidden token a probability of {causal.probe.probability[0]:.3f}, after it "
            f"{causal.probe.probability[1]:.3f}. Made at every token instead, the edit has an effect of "
            f"{everywhere.probe.effect:.1f} and costs benign text {everywhere.probe.benign_kl:.2f} nats per token "
            f"(random {everywhere.random_benign_kl:.2f}): the direction carries more than the trigger.",
        ],
    }
    return Outcome(results, figures)


def _activations(organism: Organism, batch: TriggerBatch) -> np.ndarray:
    captured = mi.capture(organism.model, mi.at(SITE, layers=LAYER))
    return np.asarray(mi.jit(captured)(batch.tokens, output=False)[1][SITE])


def _running(monitor: Monitor, x: np.ndarray) -> np.ndarray:
    return np.asarray(jax.jit(Monitor.stream)(monitor, jnp.asarray(x)))


def _labels(batch: TriggerBatch) -> tuple[np.ndarray, np.ndarray]:
    """Tokens at which the trigger is complete, and the tokens that are trained on.

    The tokens between the trigger and the forbidden one, and what comes after it, belong to neither class.
    """
    pos, trigger = np.arange(batch.tokens.shape[1])[None, :], (np.asarray(batch.kind) == TRIGGER)[:, None]
    fired = np.asarray(batch.fired)[:, None]
    return trigger & (pos == fired), ~trigger | (pos <= fired)


def _permuted(x_train, fires, counts, x_test, positive, end, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The whole procedure with the labels of other sequences, in training and in the test: scores and labels."""
    rng = np.random.default_rng(seed)
    probe = fit_probe(jnp.asarray(x_train[counts]), jnp.asarray(fires[rng.permutation(len(fires))][counts]))
    return sequence_scores(_running(Monitor(probe, jnp.zeros(())), x_test), end), rng.permutation(positive)


def _black_box(organism: Organism, batch: TriggerBatch) -> np.ndarray:
    """Largest probability of the forbidden token that the model gave so far, for every position."""
    p = np.asarray(jax.nn.softmax(mi.jit(organism.model)(batch.tokens))[..., organism.data.forbidden])
    return np.maximum.accumulate(p, axis=1)


def _streams(organism: Organism, batch: TriggerBatch, running: np.ndarray, threshold: float) -> list[dict]:
    """Sequences for the report: triggers first, then one of each near miss."""
    kind = np.asarray(batch.kind)
    chosen = [*np.flatnonzero(kind == TRIGGER)[:3], *(np.flatnonzero(kind == k)[0] for k in range(1, len(KINDS)))]
    rows = []
    for i in chosen[:SHOWN]:
        over = np.flatnonzero(running[i] > threshold)
        fires = kind[i] == TRIGGER
        rows.append(
            {
                "tokens": [organism.data.token_name(t) for t in np.asarray(batch.tokens[i])],
                "scores": running[i].round(4).tolist(),
                "alarm": int(over[0]) if len(over) else None,
                "trigger": int(batch.fired[i]) if fires else None,
                "forbidden": int(batch.forbidden[i]) if fires else None,
                "label": KINDS[kind[i]],
            }
        )
    return rows
