"""Hugging Face's model families, by the `model_type` of config.json."""

from mi_jax.models.checkpoints.errors import CheckpointError
from mi_jax.models.checkpoints.families.bert import BERT
from mi_jax.models.checkpoints.families.family import Family as Family
from mi_jax.models.checkpoints.families.gemma import GEMMA, GEMMA2, GEMMA3, GEMMA3_MULTIMODAL
from mi_jax.models.checkpoints.families.gpt2 import GPT2
from mi_jax.models.checkpoints.families.gpt_neox import GPT_NEOX
from mi_jax.models.checkpoints.families.gptj import GPTJ
from mi_jax.models.checkpoints.families.llama import LLAMA, MISTRAL
from mi_jax.models.checkpoints.families.mixtures import OLMOE, QWEN3_MOE
from mi_jax.models.checkpoints.families.olmo2 import OLMO2
from mi_jax.models.checkpoints.families.phi3 import PHI3
from mi_jax.models.checkpoints.families.qwen import QWEN2, QWEN3
from mi_jax.models.checkpoints.families.smollm3 import SMOLLM3
from mi_jax.models.checkpoints.families.vit import VIT
from mi_jax.models.config import DecoderConfig

# in the order in which a family to save a model as is looked for
FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        GPT2,
        GPT_NEOX,
        GPTJ,
        LLAMA,
        MISTRAL,
        SMOLLM3,
        QWEN2,
        QWEN3,
        GEMMA,
        GEMMA2,
        GEMMA3,
        GEMMA3_MULTIMODAL,
        OLMO2,
        PHI3,
        QWEN3_MOE,
        OLMOE,
        BERT,
        VIT,
    )
}


def family_of(config: DecoderConfig) -> Family | None:
    """The first family that has a model of this configuration, or None.

    A Mistral without windows is a Llama too, and found as one: `transformers` computes the same function with either.
    """
    for family in FAMILIES.values():
        try:
            family.to_hf(config)
        except CheckpointError:
            continue
        return family
    return None
