"""Correction of p-values for the number of tests."""

import numpy as np
from jaxtyping import Float


def holm(p_values: Float[np.ndarray, " test"]) -> Float[np.ndarray, " test"]:
    """Adjusted p-values of Holm's step-down method: rejecting those below α errs at all with probability at most α.

    The i-th smallest becomes `max_{j ≤ i} min(1, (m − j + 1) p_(j))`. Holds under any dependence of the tests.
    """
    order = np.argsort(p_values)
    stepped = np.maximum.accumulate(p_values[order] * np.arange(len(order), 0, -1))
    out = np.empty(len(order))
    out[order] = np.minimum(stepped, 1.0)
    return out
