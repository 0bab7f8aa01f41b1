"""Real text, cut into contexts of equal length, with whole documents held out."""

import ast
import dataclasses
import os
import pathlib
import sysconfig
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from mi_jax.core.errors import InputError
from mi_jax.data.tokenizer import Tokenizer


class TextError(InputError):
    """A text that cannot be used; the message names the file and the fault."""


@dataclasses.dataclass(frozen=True)
class Contexts:
    """Tokens `[context pos]`, in training and held out, from different documents."""

    train: Int[np.ndarray, "context pos"]
    held_out: Int[np.ndarray, "held_out_context pos"]


def python_topics() -> list[str]:
    """The documents of `pydoc_data.topics`: English prose about Python, in every Python installation."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def python_docstrings() -> list[str]:
    """The docstrings of the standard library, a document a module: 1.6 million characters of prose and examples."""
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "pydoc_data"}
    documents = []
    for file in sorted(root.rglob("*.py")):
        if left_out.intersection(file.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(file.read_bytes())
        except SyntaxError:  # templates and files for other versions
            continue
        holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = [text for node in ast.walk(tree) if isinstance(node, holders) and (text := ast.get_docstring(node))]
        if found:
            documents.append("\n\n".join(found))
    return documents


def read_documents(path: str | os.PathLike) -> list[str]:
    """A UTF-8 text file as documents: paragraphs between blank lines, joined to about 4,000 characters.

    Raises:
      TextError: no such file, empty, or not UTF-8.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise TextError(f"{path}: no such text file")
    with open(path, "rb") as f:
        data = f.read()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TextError(
            f"{path}: not UTF-8 (byte {data[error.start]:#04x} at offset {error.start}); convert it first"
        ) from None
    if not text.strip():
        raise TextError(f"{path}: the text is empty")
    documents = [""]
    for paragraph in text.split("\n\n"):
        if len(documents[-1]) > 4_000:
            documents.append("")
        documents[-1] += paragraph + "\n\n"
    return documents


def contexts(
    documents: Sequence[str], tokenizer: Tokenizer, *, length: int, held_out_fraction: float, seed: int
) -> Contexts:
    """Tokenises, holds out random whole documents of about that fraction of the tokens, and packs the rest.

    Raises:
      TextError: too little text for one context on either side.
    """
    rows = [tokenizer.encode(document) for document in documents]
    wanted = held_out_fraction * sum(map(len, rows))
    held: list[int] = []
    for i in np.random.default_rng(seed).permutation(len(rows)):
        # a document that would overshoot is skipped, so that a few long ones do not take the training text
        if sum(len(rows[j]) for j in held) + len(rows[i]) <= wanted:
            held.append(int(i))

    def pack(chosen: Sequence[int]) -> np.ndarray:
        flat = np.concatenate([np.zeros(0, np.int32), *(np.asarray(rows[i], np.int32) for i in chosen)])
        return flat[: len(flat) // length * length].reshape(-1, length)

    split = Contexts(pack([i for i in range(len(rows)) if i not in held]), pack(sorted(held)))
    if not len(split.train) or not len(split.held_out):
        raise TextError(
            f"the text has {sum(map(len, rows))} tokens in {len(rows)} documents: too little for contexts of {length} "
            f"with a fraction of {held_out_fraction} held out"
        )
    return split
