"""Fits that scikit-learn does; their results become arrays of ours."""

import importlib
import warnings
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, PRNGKeyArray


def fitted(name: str, x: Float[np.ndarray, "n d_model"], *, key: PRNGKeyArray, **options: Any) -> tuple[Any, bool]:
    """An estimator of `sklearn.decomposition`, fitted, and whether it converged within its `max_iter`.

    Raises:
      ImportError: scikit-learn is not installed.
    """
    try:
        decomposition = importlib.import_module("sklearn.decomposition")
        exceptions = importlib.import_module("sklearn.exceptions")
    except ImportError as error:
        raise ImportError(f"{name} is fitted by scikit-learn, which is missing: pip install scikit-learn") from error
    seed = int(jax.random.randint(key, (), 0, np.iinfo(np.int32).max, np.int32))
    estimator = getattr(decomposition, name)(random_state=seed, **options)
    with warnings.catch_warnings():
        # the caller gets the answer as a value
        warnings.simplefilter("ignore", exceptions.ConvergenceWarning)
        estimator.fit(x)
    return estimator, bool(estimator.n_iter_ < options["max_iter"])
