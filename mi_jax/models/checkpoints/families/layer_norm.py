"""What the families with LayerNorms, plain MLPs and biases share."""

from mi_jax.models.checkpoints.names import Stored

Q, K, V = (f"({head} d_head) d_model -> d_model {head} d_head" for head in ("head", "kv_head", "kv_head"))
OUT = "d_model (head d_head) -> head d_head d_model"
UP, DOWN = "d_mlp d_model -> d_model d_mlp", "d_model d_mlp -> d_mlp d_model"


def norm(path: str, name: str) -> tuple[Stored, ...]:
    """A LayerNorm: weight and bias."""
    return tuple(Stored(f"{path}.{part}", f"{name}.{part}", "d_model -> d_model") for part in ("weight", "bias"))


def linear(path: str, name: str, pattern: str, *, bias: bool = True) -> tuple[Stored, ...]:
    """A linear map stored `[out in]`, and its bias, which has the axes of what comes out."""
    weight = Stored(path, f"{name}.weight", pattern)
    out = pattern[: pattern.index(")") + 1] if pattern.startswith("(") else pattern.split()[0]
    return (weight, Stored(f"{path}_bias", f"{name}.bias", f"{out} -> {out.strip('()')}")) if bias else (weight,)
