"""The keys of a config.json, read so that none that matters is passed over.

Every key a family asks for is noted. What is left at the end either has no effect on the function of the model, or is
null, false, zero or empty, or is refused by name.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mi_jax.models.checkpoints.errors import CheckpointError

# what tells how a model was made, is trained, tokenised, generated from, or computed
_WITHOUT_EFFECT = frozenset(
    """
    model_type architectures transformers_version torch_dtype dtype _name_or_path name_or_path _commit_hash auto_map
    use_cache initializer_range initializer_factor gradient_checkpointing chunk_size_feed_forward pretraining_tp
    max_sequence_length n_ctx unsloth_version unsloth_fixed is_llama_config use_bfloat16 torchscript return_dict
    bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id unk_token_id mask_token_id decoder_start_token_id
    tokenizer_class prefix task_specific_params finetuning_task problem_type id2label label2id num_labels
    attn_implementation _attn_implementation _attn_implementation_autoset _attn_implementation_internal
    _experts_implementation_internal cache_implementation keys_to_ignore_at_inference tie_encoder_decoder
    output_attentions output_hidden_states output_router_logits output_scores return_dict_in_generate
    attention_dropout attn_pdrop embd_pdrop resid_pdrop hidden_dropout hidden_dropout_prob classifier_dropout
    attention_probs_dropout_prob summary_activation summary_first_dropout summary_proj_to_labels summary_type
    summary_use_proj router_aux_loss_coef transformers.js_config reorder_and_upcast_attn
    max_length min_length do_sample early_stopping num_beams temperature top_k top_p typical_p repetition_penalty
    length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences
    num_beam_groups diversity_penalty forced_bos_token_id forced_eos_token_id remove_invalid_values suppress_tokens
    begin_suppress_tokens exponential_decay_length_penalty
    output_past predict_special_tokens n_special _num_labels vocab_size_or_config_json_file language name
    model_max_length tokenizer_model_max_length _flash_attn_2_enabled
    """.split()
)
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu_exact",
    "gelu_python": "gelu_exact",
    "gelu_new": "gelu",
    "gelu_fast": "gelu",
    "gelu_accurate": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_python_tanh": "gelu",
    "quick_gelu": "quick_gelu",
}
# as config.json files name them
ACTIVATION_NAMES = {
    "silu": "silu",
    "relu": "relu",
    "gelu_exact": "gelu",
    "gelu": "gelu_pytorch_tanh",
    "quick_gelu": "quick_gelu",
}


class Fields:
    """The keys of one JSON object of a config.json.

    A key may have several names; the first that is there counts. Every method raises CheckpointError for a value of
    the wrong kind.
    """

    def __init__(self, values: Mapping[str, Any], where: str):
        self._values, self.where, self._read = values, where, set[str]()

    def _find(self, names: Sequence[str]) -> tuple[str, Any]:
        """The name that is there and its value; a missing key gives None, as null does."""
        self._read.update(names)
        present = [name for name in names if name in self._values]
        return (present[0], self._values[present[0]]) if present else (names[0], None)

    def __len__(self) -> int:
        return len(self._values)

    def has(self, *names: str) -> bool:
        return any(name in self._values for name in names)

    def integer(self, *names: str, default: int, null: int | None = None) -> int:
        """A whole number, not negative; `null` is its value where the file says null, else that of a missing key."""
        name, value = self._find(names)
        if value is None:
            return default if null is None or not self.has(*names) else null
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
            raise self.wrong(name, value, "a whole number from 0 to 2147483647")
        return value

    def layers(self, *names: str, default: int) -> int:
        """The number of layers, held to what a list with an entry for each of them can bear."""
        value = self.integer(*names, default=default)
        if not 1 <= value <= 10_000:
            raise self.wrong(self._find(names)[0], value, "a number from 1 to 10000")
        return value

    def width(self, name: str, *names: str, heads: Sequence[str], d_model: int, n_heads: int) -> tuple[int, int]:
        """The width of the stream and the number of heads, which share it; `d_model` and `n_heads` if missing."""
        d_model, n_heads = self.integer(name, *names, default=d_model), self.integer(*heads, default=n_heads)
        if n_heads < 1 or d_model % n_heads:
            raise self.wrong(f"{name}, {heads[0]}", (d_model, n_heads), "a number and a divisor of it")
        return d_model, n_heads

    def number(self, *names: str, default: float) -> float:
        name, value = self._find(names)
        if value is None:
            return float(default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.wrong(name, value, "a number")
        return float(value)

    def flag(self, *names: str, default: bool = False) -> bool:
        name, value = self._find(names)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(name, value, "true or false")
        return value

    def text(self, *names: str, default: str) -> str:
        name, value = self._find(names)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.wrong(name, value, "a string")
        return value

    def is_list(self, name: str) -> bool:
        return isinstance(self._values.get(name), list | tuple)

    def several(self, name: str) -> tuple[Any, ...] | None:
        """A list, or None."""
        value = self._find([name])[1]
        if value is not None and not isinstance(value, list | tuple):
            raise self.wrong(name, value, "a list")
        return None if value is None else tuple(value)

    def inner(self, *names: str) -> "Fields":
        """The keys of an object inside; those of an empty one where it is missing."""
        name, value = self._find(names)
        if value is not None and not isinstance(value, Mapping):
            raise self.wrong(name, value, "an object")
        return Fields(value or {}, f"{name} in {self.where}")

    def merged(self, other: "Fields") -> "Fields":
        """These keys, and over them those of the other."""
        return Fields({**self._values, **other._values}, self.where)

    def activation(self, *names: str, default: str) -> Any:
        """The name that `DecoderConfig.activation` has for a Hugging Face activation."""
        value = self.text(*names, default=default)
        if value not in _ACTIVATIONS:
            raise self.refused(self._find(names)[0], value, ", ".join(_ACTIVATIONS))
        return _ACTIVATIONS[value]

    def only(self, name: str, *supported: Any) -> None:
        """Refuses a key whose value is none of those supported; a missing one is."""
        value = self._find([name])[1]
        if name in self._values and not any(value == each and type(value) is type(each) for each in supported):
            raise self.refused(name, value, " or ".join(_json(each) for each in supported))

    def without_effect(self, *names: str) -> None:
        """Keys that change nothing in this family."""
        self._read.update(names)

    def wrong(self, name: str, value: Any, expected: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {name} is {_json(value)}, where {expected} is expected")

    def refused(self, name: str, value: Any, supported: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {name} is {_json(value)}; the decoder supports {supported}")

    def close(self) -> None:
        """Refuses what was never asked for.

        Raises:
          CheckpointError: a key that may change the function of the model and that nothing here knows.
        """
        unknown = {name: value for name, value in self._values.items() if name not in self._read | _WITHOUT_EFFECT}
        if refused := [f"{name} = {_json(value)}" for name, value in unknown.items() if value]:
            raise CheckpointError(
                f"{self.where}: {', '.join(refused[:8])}: unknown here, and could change what the model computes. "
                "If it does not, remove the key from config.json"
            )


def _json(value: Any) -> str:
    """A value as JSON writes it, cut to a line."""
    text = {"None": "null", "True": "true", "False": "false"}.get(repr(value), repr(value))
    return text if len(text) <= 80 else text[:77] + "…"
