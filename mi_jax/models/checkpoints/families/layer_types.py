"""Which layers of a family attend to a window: `layer_types` and the older keys that it replaced."""

from collections.abc import Sequence
from typing import Any

from mi_jax.models.checkpoints.families.fields import Fields
from mi_jax.models.config import DecoderConfig

FULL, SLIDING = "full_attention", "sliding_attention"


def read_windows(f: Fields, n_layers: int, window: int, default: Sequence[bool]) -> tuple[int, ...]:
    """`DecoderConfig.windows`.

    Args:
      f: keys of config.json.
      n_layers: of the model.
      window: of the layers that have one; 0 where the file has none.
      default: for every layer whether it has a window, where the file does not say.
    """
    types = f.several("layer_types")
    if types is None:
        types = tuple(SLIDING if sliding else FULL for sliding in default)
    if len(types) != n_layers or any(each not in (FULL, SLIDING) for each in types):
        raise f.wrong("layer_types", list(types), f"{n_layers} times {FULL} or {SLIDING}")
    if SLIDING not in types:
        return ()
    if window < 1:
        raise f.wrong("sliding_window", window or None, f"the window of the layers with {SLIDING}")
    return tuple(window if each == SLIDING else 0 for each in types)


def write_layer_types(config: DecoderConfig) -> dict[str, Any]:
    """The key of the same name."""
    return {"layer_types": [SLIDING if window else FULL for window in config.windows or (0,) * config.n_layers]}


def read_used_window(f: Fields) -> int:
    """The window of families that switch it on by `use_sliding_window`; 0 for none."""
    window = f.integer("sliding_window", default=4096, null=0)
    return window if f.flag("use_sliding_window") else 0


def write_used_window(config: DecoderConfig) -> dict[str, Any]:
    """The keys that `read_used_window` reads."""
    return {"use_sliding_window": bool(config.windows), "sliding_window": max(config.windows, default=0) or None}
