"""Documents from a file: plain text, JSON lines or Parquet."""

import json
import os
from collections.abc import Iterator
from typing import Any

from mi_jax.core.errors import InputError

_LINES = (".jsonl", ".ndjson")
_TABLES = (".parquet",)


class TextError(InputError):
    """A text that cannot be used; the message names the file and the fault."""


def read_documents(path: str | os.PathLike, *, field: str = "text") -> list[str]:
    """The documents of a file, by its ending.

    `.jsonl` and `.ndjson` have a JSON object or a string a line, `.parquet` a row a document (needs pyarrow). Any other
    file is UTF-8 text: paragraphs between blank lines, joined to about 4,000 characters.

    Args:
      field: which field of an object, or column of a table, is the text.

    Raises:
      TextError: no such file, one without text, not UTF-8, a line or a table without that field, or no pyarrow.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise TextError(f"{path}: no such text file")
    ending = os.path.splitext(path)[1].lower()
    if ending in _TABLES:
        documents = _column(path, field)
    elif ending in _LINES:
        documents = list(_lines(path, _text(path), field))
    else:
        documents = _paragraphs(_text(path))
    if not any(document.strip() for document in documents):
        raise TextError(f"{path}: the text is empty")
    return documents


def _text(path: str) -> str:
    with open(path, "rb") as file:
        data = file.read()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TextError(
            f"{path}: not UTF-8 (byte {data[error.start]:#04x} at offset {error.start}); convert it first"
        ) from None
    # as other systems write: a mark at the start, and lines that end in two characters
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def _paragraphs(text: str) -> list[str]:
    documents = [""]
    for paragraph in text.split("\n\n"):
        if len(documents[-1]) > 4_000:
            documents.append("")
        documents[-1] += paragraph + "\n\n"
    return documents


def _lines(path: str, text: str, field: str) -> Iterator[str]:
    # not splitlines, which also cuts at characters that JSON leaves in a string
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value: Any = json.loads(line)
        except ValueError as error:
            raise TextError(f"{path}: line {number} is not JSON ({error})") from None
        if isinstance(value, dict):
            if field not in value:
                raise TextError(f"{path}: line {number} has no field {field!r}; it has {', '.join(value) or 'none'}")
            value = value[field]
        if not isinstance(value, str):
            raise TextError(f"{path}: line {number} is no text, but {type(value).__name__}")
        yield value


def _column(path: str, field: str) -> list[str]:
    try:
        from pyarrow import ArrowException, parquet  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise TextError(f"{path}: reading Parquet needs pyarrow: pip install 'mi-jax[parquet]'") from None
    try:
        names = parquet.read_schema(path).names
        if field not in names:
            raise TextError(f"{path}: no column {field!r}; there are {', '.join(names)}")
        values = parquet.read_table(path, columns=[field]).column(field).to_pylist()
    except (ArrowException, OSError) as error:
        raise TextError(f"{path}: not a Parquet file that can be read ({error})") from error
    for row, value in enumerate(values):
        if not isinstance(value, str):
            raise TextError(f"{path}: row {row} of column {field!r} is no text, but {type(value).__name__}")
    return values
