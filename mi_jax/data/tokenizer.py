"""Tokenizers built from a checkpoint's own vocabulary."""

import dataclasses
import functools
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer as _BPE

from mi_jax.core.errors import InputError
from mi_jax.data.gguf_tokenizer import frame, read_tokenizer
from mi_jax.models.checkpoints.errors import CheckpointError
from mi_jax.models.checkpoints.gguf import GGUF, open_gguf
from mi_jax.models.checkpoints.hub import checkpoint_directory


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back."""

    bpe: _BPE
    pad_id: int

    @property
    def before(self) -> tuple[int, ...]:
        """What the model was trained with before a text, such as `<bos>`; empty for many models."""
        return self._around[0]

    @property
    def after(self) -> tuple[int, ...]:
        """What the model was trained with after a text, such as `<eos>`; empty for most models."""
        return self._around[1]

    @functools.cached_property
    def special_ids(self) -> tuple[int, ...]:
        """Tokens that stand for no text, such as `<bos>` and padding: what a dictionary of activations leaves out."""
        special = {i for i, token in self._added.items() if token.special}
        return tuple(sorted(special.union(self.before, self.after)))

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Ids of a text; bytes that the vocabulary lacks are dropped.

        Args:
          special_tokens: with what the model was trained with around a text (`before`, `after`), as its tokenizer files
            say; where the text itself begins or ends with these, they are not added again. False for a piece of a text.

        Raises:
          InputError: no text, but something else.
        """
        if not isinstance(text, str):
            raise InputError(f"a text to encode is a str, got {type(text).__name__}; batch takes a list of texts")
        ids = self.bpe.encode(text, add_special_tokens=False).ids
        return self.framed(ids) if special_tokens else ids

    def framed(self, ids: Sequence[int], *, after: bool = True) -> list[int]:
        """Ids of a text between `before` and `after`, where they do not stand there yet.

        Args:
          after: False for a prompt, which goes on.
        """
        ids, first = list(ids), list(self.before)
        ids = ids if ids[: len(first)] == first else [*first, *ids]
        last = list(self.after) if after else []
        return ids if ids[len(ids) - len(last) :] == last and len(ids) > len(first) else [*ids, *last]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of one row of ids, special tokens included.

        Raises:
          InputError: not one row of ids.
        """
        return self.bpe.decode(_row(ids), skip_special_tokens=False)

    def strings(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """Each token as it stands within a text, with the space that it begins with.

        Bytes that are not whole characters show as the replacement character.
        """
        # decoders take the first token of a text for its beginning, and a space there for no part of the text
        first = self.bpe.encode("a", add_special_tokens=False).ids[-1:]
        start = self.decode(first)

        def string(token: int) -> str:
            if token in self._added and self._added[token].special:
                return self._added[token].content
            text = self.decode([*first, token])
            return text[len(start) :] if start and text.startswith(start) else self.decode([token])

        return [string(i) for i in _row(ids)]

    def single(self, text: str) -> int:
        """The id of a piece of text that is one token.

        Raises:
          InputError: it is several tokens, or none.
        """
        ids = self.encode(text, special_tokens=False)
        if len(ids) != 1:
            raise InputError(f"{text!r} is {len(ids)} tokens ({self.strings(ids)}), not one")
        return ids[0]

    def batch(self, texts: Sequence[str], *, special_tokens: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Right-padded ids and the mask of real tokens, both `[batch pos]`; arguments as in `encode`.

        Raises:
          InputError: one text instead of a list, no text, or a text without any token.
        """
        if isinstance(texts, str):
            raise InputError(f"batch takes a list of texts, got one text: batch([{texts[:30]!r}])")
        rows = [self.encode(text, special_tokens=special_tokens) for text in texts]
        if not rows:
            raise InputError("batch got no texts; give at least one")
        if empty := [i for i, row in enumerate(rows) if not row]:
            raise InputError(f"text {empty[0]} ({texts[empty[0]]!r}) has no tokens; a prompt has at least one")
        n = max(len(row) for row in rows)
        tokens = np.full((len(rows), n), self.pad_id, np.int32)
        mask = np.zeros((len(rows), n), bool)
        for i, row in enumerate(rows):
            tokens[i, : len(row)], mask[i, : len(row)] = row, True
        return tokens, mask

    @functools.cached_property
    def _added(self) -> dict[int, Any]:
        return self.bpe.get_added_tokens_decoder()

    @functools.cached_property
    def _around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return around(self.bpe)


def _row(ids: Sequence[int] | np.ndarray) -> list[int]:
    row = np.asarray(ids)
    if row.ndim != 1 or (row.size and not (np.issubdtype(row.dtype, np.integer) and row.min() >= 0)):
        raise InputError(f"one row of ids becomes text, each 0 or more; got {row.dtype} of shape {row.shape}")
    return row.tolist()


def around(bpe: _BPE) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What a tokenizer's post-processor puts before and after a text."""
    if not bpe.num_special_tokens_to_add(False):
        return (), ()
    # any text will do that has a token
    for text in ("a", "1", ".", *sorted(bpe.get_vocab(with_added_tokens=False))[:100]):
        encoded = bpe.encode(text, add_special_tokens=True)
        of_text = [i for i, special in enumerate(encoded.special_tokens_mask) if not special]
        if of_text:
            return tuple(encoded.ids[: of_text[0]]), tuple(encoded.ids[of_text[-1] + 1 :])
    return (), ()


def load_tokenizer(path_or_hub_id: str | os.PathLike, *, revision: str | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint: of a directory or a hub id with tokenizer.json, or of a .gguf file.

    What stands around a text is what tokenizer.json says (its post-processor), unless `add_bos_token` and
    `add_eos_token` in tokenizer_config.json say otherwise; in a .gguf file see `mi_jax.data.gguf_tokenizer`.

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
    path = os.path.join(os.path.dirname(file), "tokenizer_config.json")
    config = _config(path)
    _follow(bpe, config, path)
    pad = _token(bpe, config, "pad_token")
    # no result depends on it: padding is masked
    return Tokenizer(bpe, 0 if pad is None else pad)


def _config(path: str) -> dict[str, Any]:
    if not os.path.isfile(path):
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
    except ValueError as error:
        raise CheckpointError(f"{path}: not a JSON object ({error})") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: not a JSON object, but a {type(config).__name__}")
    return config


def _token(bpe: _BPE, config: dict[str, Any], name: str) -> int | None:
    """The id of a token that the file names, if the tokenizer has it."""
    token = config.get(name)
    content = token.get("content") if isinstance(token, dict) else token
    return bpe.token_to_id(content) if isinstance(content, str) else None


def _follow(bpe: _BPE, config: dict[str, Any], path: str) -> None:
    """Puts the first and the last token around a text, or takes them away, where the file says so."""
    found = around(bpe)
    before, after = (list(tokens) for tokens in found)
    for name, tokens, place in (("bos", before, 0), ("eos", after, len(after))):
        wanted, token = config.get(f"add_{name}_token"), _token(bpe, config, f"{name}_token")
        if not isinstance(wanted, bool):
            continue
        if not wanted:
            tokens[:] = [one for one in tokens if one != token]
        elif token is None:
            raise CheckpointError(f"{path}: add_{name}_token is true, and {name}_token is no token of the vocabulary")
        elif token not in tokens:
            tokens.insert(place, token)
    if (tuple(before), tuple(after)) != found:
        frame(bpe, before, after)


def tokenizer_from_gguf(file: GGUF) -> Tokenizer:
    """The tokenizer that a GGUF file carries: byte-level BPE or sentencepiece's.

    Raises:
      CheckpointError: the file has another kind of tokenizer.
    """
    return Tokenizer(read_tokenizer(file), int(file.get("tokenizer.ggml.padding_token_id", 0)))
