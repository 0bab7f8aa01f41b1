"""Thresholds with a guaranteed rate of false alarms."""

import math

import numpy as np

from mi_jax.core.errors import InputError


def conformal_threshold(benign: np.ndarray, false_alarm_rate: float) -> float:
    """The threshold that a new benign sequence exceeds with probability at most `false_alarm_rate`.

    Split conformal: the `ceil((n + 1)(1 − α))`-th smallest of n scores that nothing was fitted to. Exact when the new
    sequence is exchangeable with these. Scores are per sequence (its maximum), not per token: a rate of 1 % per token
    would raise an alarm in most long sequences.

    Raises:
      InputError: too few scores for that rate (99 for 1 %), a rate outside (0, 1), or scores that are NaN or +∞, above
        which no threshold would ever raise an alarm.
    """
    if not 0 < false_alarm_rate < 1:
        raise InputError(f"false_alarm_rate must be in (0, 1), got {false_alarm_rate}")
    benign = np.asarray(benign, np.float64)
    if unusable := int((np.isnan(benign) | (benign == np.inf)).sum()):
        raise InputError(
            f"{unusable} of {benign.size} benign scores are NaN or infinite; a threshold from them would never alarm. "
            "Find where the activations or the probe stop being finite"
        )
    n = len(benign)
    # the small term keeps 0.99 · 100 from being counted as 99.00000000000001
    rank = math.ceil((n + 1) * (1 - false_alarm_rate) - 1e-9)
    if rank > n:
        needed = math.ceil(1 / false_alarm_rate - 1e-9) - 1
        raise InputError(f"a false-alarm rate of {false_alarm_rate:g} needs {needed} benign sequences, got {n}")
    return float(np.sort(benign)[rank - 1])
