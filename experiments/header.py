"""The head of a report: what was run, on what, and at what cost."""

import platform
from typing import Any

import jax

from mi_jax.run import Workdir


def report_header(title: str, folder: Workdir, **more: Any) -> dict[str, Any]:
    """The section `run` of a report, of a workdir that has run its stages; `more` adds to it, such as `model`."""
    results = folder.results
    return {
        "title": title,
        "seconds": results["run.seconds"],
        "peak_rss_gb": results["run.peak_rss_gb"],
        "python": platform.python_version(),
        "jax": jax.__version__,
        "device": str(jax.devices()[0].device_kind),
        "config": folder.config,
    } | more
