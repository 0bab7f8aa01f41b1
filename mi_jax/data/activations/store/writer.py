"""Writing a model's activations to disk, shard by shard; what is finished stays when the program is killed."""

import dataclasses
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from mi_jax.core.errors import InputError
from mi_jax.core.sites import At
from mi_jax.core.transforms import SiteModel
from mi_jax.data.activations.massive import massive_limit
from mi_jax.data.activations.permutation import permute_host
from mi_jax.data.activations.source import ModelSource, has_layer_axis
from mi_jax.data.activations.store import layout
from mi_jax.data.activations.store.layout import Shard, StoreError
from mi_jax.data.activations.usable import token_ids
from mi_jax.run import files

Columns = dict[str, np.ndarray]


def write_activations(
    path: str | os.PathLike,
    model: SiteModel,
    tokens: Int[np.ndarray, "context pos"] | Int[Array, "context pos"],
    sites: str | At | Sequence[str | At],
    *,
    key: PRNGKeyArray,
    documents: Int[np.ndarray, "document_context document_pos"] | None = None,
    mask: Bool[np.ndarray, "context pos"] | None = None,
    special_ids: SupportsIndex | Iterable[SupportsIndex] = (),
    skip_positions: int = 1,
    outlier_ratio: float | None = 10.0,
    dtype: str = "bfloat16",
    contexts_per_chunk: int = 32,
    chunks_per_shard: int = 32,
    mesh: Mesh | None = None,
    progress: Callable[[float], None] | None = None,
) -> None:
    """Writes the activations of every usable token; call it again after a kill, and it goes on.

    A shard that is there and has its checksums is kept, any other is computed anew, so the same call also repairs a
    store that lost some.

    Args:
      path: the store's folder.
      model, tokens, sites, mask, special_ids, skip_positions, contexts_per_chunk, mesh: as for `ActivationStream`.
      key: of the order in which contexts are visited, so that any part of the store is a random sample.
      documents: which document every token comes from; −1 where it is not given.
      outlier_ratio: rows whose norm is over this many times the median norm of the first shard, at any site and layer,
        are not written; their number is.
      dtype: `"float32"`, `"float16"` or `"bfloat16"`.
      chunks_per_shard: forwards per shard; a shard is held in memory once.
      progress: called with the finished fraction after every shard.

    Raises:
      StoreError: the folder holds a store of something else.
      InputError: activations that are not finite, also after rounding to `dtype`, or tokens that cannot be used.
    """
    if dtype not in ("float32", "float16", "bfloat16"):
        raise InputError(f"dtype={dtype!r}; a store holds float32, float16 or bfloat16")
    special_ids = token_ids(special_ids)
    source = ModelSource(
        model,
        tokens,
        sites,
        mask=mask,
        special_ids=special_ids,
        skip_positions=skip_positions,
        outlier_ratio=None,
        contexts_per_chunk=contexts_per_chunk,
        dtype=layout.DTYPES[dtype],
        mesh=mesh,
    )
    if outlier_ratio is not None and outlier_ratio <= 1:
        raise InputError(f"outlier_ratio={outlier_ratio:g} would drop half of all rows; it is over 1, or None for all")
    if not source.counts.any():
        raise InputError(f"{source.what} has no usable activation: every token is padding, special or skipped")
    documents = np.full(source.tokens.shape, -1, np.int32) if documents is None else documents.astype(np.int32)
    if documents.shape != source.tokens.shape:
        raise InputError(f"documents have shape {documents.shape}, the tokens {source.tokens.shape}; one per token")
    if chunks_per_shard < 1:
        raise InputError(f"chunks_per_shard={chunks_per_shard}; a shard has at least one chunk")

    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    order = np.flatnonzero(source.counts)
    order = order[permute_host(np.arange(len(order)), len(order), key=key)]
    description = _description(source, documents, order, special_ids, skip_positions, outlier_ratio, chunks_per_shard)
    _claim(folder, description)

    kinds, shards = layout.columns(description), []
    per_shard = contexts_per_chunk * chunks_per_shard
    for number in range(-(-len(order) // per_shard)):
        name = f"shard-{number:05}"
        shard = layout.read_shard(folder, name)
        if shard is None or layout.fault(folder, shard, kinds, checksums=True):
            rows = _computed(source, documents, order[number * per_shard : (number + 1) * per_shard])
            thresholds = shards[0].thresholds if shards else _thresholds(rows, source, outlier_ratio)
            shard = _write_shard(folder, name, rows, thresholds)
        shards.append(shard)
        if progress is not None:
            progress(min(1.0, (number + 1) * per_shard / len(order)))
    index = description | {
        "n_rows": sum(shard.n_rows for shard in shards),
        "n_outliers": sum(shard.n_outliers for shard in shards),
        "shards": [dataclasses.asdict(shard) for shard in shards],
    }
    files.write_json(epath.Path(folder / layout.INDEX), index)


def _description(
    source: ModelSource,
    documents: np.ndarray,
    order: np.ndarray,
    special_ids: list[int],
    skip_positions: int,
    outlier_ratio: float | None,
    chunks_per_shard: int,
) -> dict[str, Any]:
    """All that the bytes of the store depend on, but for the model's weights."""
    corpus = hashlib.blake2b(digest_size=16)
    for x in (source.tokens, documents, source.usable(order), order):
        corpus.update(np.ascontiguousarray(x).data)
    shapes = {name: (str(x.dtype), x.shape) for name, x in source.shapes().items()}
    shapes[layout.ORIGIN] = ("int32", (len(layout.ORIGIN_NAMES),))
    return {
        "format": layout.FORMAT,
        "model": source.model.site_table.model,
        "sites": layout.describe_sites(source.sites),
        "columns": {name: {"dtype": dtype, "shape": list(shape)} for name, (dtype, shape) in shapes.items()},
        "corpus": corpus.hexdigest(),
        "n_contexts": len(source.tokens),
        "context_length": source.tokens.shape[1],
        "special_ids": special_ids,
        "skip_positions": skip_positions,
        "outlier_ratio": outlier_ratio,
        "contexts_per_chunk": source.units_per_chunk,
        "chunks_per_shard": chunks_per_shard,
    }


def _claim(folder: Path, description: dict[str, Any]) -> None:
    """Marks the folder as that of this store, or checks that it is."""
    if not (folder / layout.DESCRIPTION).exists():
        if any(folder.iterdir()):
            raise StoreError(f"{folder} is not empty and holds no store of activations; give a folder of its own")
        files.write_json(epath.Path(folder / layout.DESCRIPTION), description)
        return
    known = layout.read_record(folder, layout.DESCRIPTION)
    for name, value in description.items():
        if known.get(name) != value:
            raise StoreError(
                f"{folder} holds activations with {name} {known.get(name)}, these have {value}; use another folder, or "
                "delete that one"
            )


def _computed(source: ModelSource, documents: np.ndarray, contexts: np.ndarray) -> Columns:
    """The usable rows of some contexts, with their origin."""
    parts: list[Columns] = []
    for units, chunk in _chunks(source, contexts):
        rows, finite = jax.device_get((chunk.rows, chunk.finite))
        if not finite.all():
            raise InputError(source.failure(int(units[np.argmin(finite)])))
        new = np.arange(len(finite)) < len(units)
        keep = (source.usable(_filled(units, len(finite))) & new[:, None]).reshape(-1)
        context, position = rows.context[keep], rows.position[keep]
        origin = [context, position, source.tokens[context, position], documents[context, position]]
        values = {name: x[keep] for name, x in rows.values.items()}
        parts.append(values | {layout.ORIGIN: np.stack(origin, axis=1)})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _chunks(source: ModelSource, contexts: np.ndarray) -> Iterator[tuple[np.ndarray, Any]]:
    """Contexts and their activations, piece by piece; the next forward is under way while one is used."""
    per_chunk = source.units_per_chunk
    pieces = [contexts[i : i + per_chunk] for i in range(0, len(contexts), per_chunk)]
    promise = source.start(_filled(pieces[0], per_chunk))
    for i, piece in enumerate(pieces):
        following = source.start(_filled(pieces[i + 1], per_chunk)) if i + 1 < len(pieces) else promise
        yield piece, promise()
        promise = following


def _filled(units: np.ndarray, n: int) -> np.ndarray:
    return np.concatenate([units, np.full(n - len(units), units[0])])


def _norms(values: np.ndarray, layered: bool) -> np.ndarray:
    """Of every row and layer, `[row layer]`."""
    flat = values.reshape(len(values), values.shape[1] if layered else 1, -1).astype(np.float32)
    return np.sqrt(np.einsum("rld,rld->rl", flat, flat))


def _thresholds(rows: Columns, source: ModelSource, outlier_ratio: float | None) -> dict[str, list[float]]:
    if outlier_ratio is None:
        return {}
    table = source.model.site_table
    return {
        spec.site: [
            float(massive_limit(jnp.asarray(sizes), outlier_ratio))
            for sizes in _norms(rows[spec.site], has_layer_axis(table, spec)).T
        ]
        for spec in source.sites
    }


def _write_shard(folder: Path, name: str, rows: Columns, thresholds: dict[str, list[float]]) -> Shard:
    keep = np.ones(len(rows[layout.ORIGIN]), bool)
    for site, most in thresholds.items():
        norms = _norms(rows[site], len(most) > 1)
        keep &= (norms <= np.asarray(most, np.float32)[None, :]).all(1)
    unfinished = folder / f".{name}.partial"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    crc32 = {}
    for column, values in rows.items():
        data = np.ascontiguousarray(values[keep]).reshape(-1).view(np.uint8).data
        crc32[column] = zlib.crc32(data)
        _write(unfinished / f"{column}.bin", data)
    shard = Shard(name, int(keep.sum()), int((~keep).sum()), crc32, thresholds)
    record = {key: value for key, value in dataclasses.asdict(shard).items() if key != "name"}
    _write(unfinished / layout.SHARD, memoryview(json.dumps(record, indent=2).encode()))
    shutil.rmtree(folder / name, ignore_errors=True)
    unfinished.rename(folder / name)
    return shard


def _write(path: Path, data: memoryview) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        # without this, some filesystems keep the rename but not the bytes when the machine itself goes down
        os.fsync(file.fileno())
