"""Tokenizers built from a checkpoint's own vocabulary."""

import dataclasses
import json
import os
from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer as _BPE

from mi_jax.data.gguf_tokenizer import read_tokenizer
from mi_jax.models.checkpoints.errors import CheckpointError
from mi_jax.models.checkpoints.gguf import GGUF, open_gguf
from mi_jax.models.checkpoints.hub import checkpoint_directory


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back."""

    bpe: _BPE
    pad_id: int

    def encode(self, text: str, *, special_tokens: bool = False) -> list[int]:
        """Ids of a text; bytes that the vocabulary lacks are dropped.

        Args:
          special_tokens: add what the model was trained with around a text, such as a first token `<bos>`.
        """
        return self.bpe.encode(text, add_special_tokens=special_tokens).ids

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self.bpe.decode([int(i) for i in ids], skip_special_tokens=False)

    def strings(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """Each token as text; bytes that are not whole characters show as the replacement character."""
        return [self.decode([i]) for i in ids]

    def single(self, text: str) -> int:
        """The id of a text that is one token.

        Raises:
          ValueError: it is several tokens.
        """
        ids = self.encode(text)
        if len(ids) != 1:
            raise ValueError(f"{text!r} is {len(ids)} tokens ({self.strings(ids)}), not one")
        return ids[0]

    def batch(self, texts: Sequence[str], *, special_tokens: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Right-padded ids and the mask of real tokens, both `[batch pos]`; arguments as in `encode`."""
        rows = [self.encode(text, special_tokens=special_tokens) for text in texts]
        n = max(len(row) for row in rows)
        tokens = np.full((len(rows), n), self.pad_id, np.int32)
        mask = np.zeros((len(rows), n), bool)
        for i, row in enumerate(rows):
            tokens[i, : len(row)], mask[i, : len(row)] = row, True
        return tokens, mask


def load_tokenizer(path_or_hub_id: str | os.PathLike, *, revision: str | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint: of a directory or a hub id with tokenizer.json, or of a .gguf file.

    Raises:
      CheckpointError: the checkpoint is missing, has no tokenizer.json, or one that cannot be read.

    Example:
      `tokens, mask = load_tokenizer("HuggingFaceTB/SmolLM2-135M").batch(["The cat", "A longer text"])`
    """
    path = os.fspath(path_or_hub_id)
    if path.endswith(".gguf"):
        return tokenizer_from_gguf(open_gguf(path))
    file = os.path.join(checkpoint_directory(path, revision=revision), "tokenizer.json")
    if not os.path.isfile(file):
        raise CheckpointError(
            f"{file}: no such file; a tokenizer of another form becomes one with transformers: "
            "AutoTokenizer.from_pretrained(…).save_pretrained(…)"
        )
    try:
        bpe = _BPE.from_file(file)
    except Exception as error:  # the library raises bare exceptions for whatever is wrong with the file
        raise CheckpointError(f"{file}: not a tokenizer that can be read ({error})") from error
    # padding and truncation are the batch's business
    bpe.no_padding()
    bpe.no_truncation()
    return Tokenizer(bpe, _pad_id(bpe, os.path.join(os.path.dirname(file), "tokenizer_config.json")))


def _pad_id(bpe: _BPE, path: str) -> int:
    """What pads; 0 where the checkpoint names nothing. No result depends on it: padding is masked."""
    if not os.path.isfile(path):
        return 0
    try:
        with open(path, encoding="utf-8") as file:
            pad = json.load(file).get("pad_token")
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a JSON object ({error})") from error
    content = pad.get("content") if isinstance(pad, dict) else pad
    found = bpe.token_to_id(content) if isinstance(content, str) else None
    return 0 if found is None else found


def tokenizer_from_gguf(file: GGUF) -> Tokenizer:
    """The tokenizer that a GGUF file carries: byte-level BPE or sentencepiece's.

    Raises:
      CheckpointError: the file has another kind of tokenizer.
    """
    return Tokenizer(read_tokenizer(file), int(file.get("tokenizer.ggml.padding_token_id", 0)))
