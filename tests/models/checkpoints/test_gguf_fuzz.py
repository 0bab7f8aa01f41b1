"""Damaged GGUF files: what is accepted is what the `gguf` library reads, all else is a CheckpointError."""

import resource
import struct

import gguf
import jax
import numpy as np
import pytest
from gguf.quants import dequantize

from mi_jax.models import CheckpointError, DecoderConfig, init_decoder, load_gguf, open_gguf, read_config
from tests.models.checkpoints.gguf_convert import write_decoder
from tests.models.gguf_files import Shape, metadata, tensors, write

_CASES, _SEED = 5000, 20260
_HUGE = (2**31, 2**32 - 1, 2**60, 2**63, 2**64 - 1)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "whole.gguf"
    config = DecoderConfig(
        n_layers=2,
        d_model=4,
        n_heads=2,
        n_kv_heads=1,
        d_head=2,
        d_mlp=6,
        d_vocab=3,
        n_ctx=8,
        norms="sandwich",
        qk_norm="head",
        windows=(4, 4),
    )
    write_decoder(path, init_decoder(config, key=jax.random.key(0)), "gemma3")
    return path.read_bytes()


@pytest.fixture(scope="module")
def content(tmp_path_factory) -> bytes:
    """A small file with every kind of metadata."""
    path = tmp_path_factory.mktemp("gguf") / "whole.gguf"
    shape = Shape(n_layers=1, d_model=4, n_heads=2, n_kv_heads=1, d_mlp=6)
    fields, weights = metadata(shape), tensors(shape)
    fields |= {"general.alignment": 32, "extra.numbers": [1.5, 2.5], "extra.flags": [True, False]}
    fields |= {"tokenizer.ggml.tokens": ["a", "b", "ab"], "tokenizer.ggml.merges": ["a b"]}
    weights["token_embd.weight"] = weights["token_embd.weight"][:3]
    write(path, fields, weights)
    return path.read_bytes()


def _header_size(content: bytes, path) -> int:
    path.write_bytes(content)
    return min(tensor.start for tensor in open_gguf(path).tensors.values())


def _damage(content: bytes, header: int, rng: np.random.Generator) -> bytes:
    """One of the ways in which files go wrong, mostly in the header, where it matters."""
    data = bytearray(content)
    place = int(rng.integers(4, header if rng.random() < 0.9 else len(data)))
    match rng.integers(7):
        case 0:
            data[place] ^= 1 << int(rng.integers(8))
        case 1:
            for _ in range(int(rng.integers(1, 6))):
                data[int(rng.integers(4, header))] = int(rng.integers(256))
        case 2:
            code, size = ("<Q", 8) if rng.random() < 0.5 else ("<I", 4)
            number = int(rng.choice(np.array(_HUGE, np.uint64))) % 2 ** (8 * size)
            data[place : place + size] = struct.pack(code, number)
        case 3:
            del data[place:]
        case 4:
            del data[place : place + int(rng.integers(1, 40))]
        case 5:
            data[place:place] = data[place : place + int(rng.integers(1, 40))]
        case 6:
            other = int(rng.integers(4, header))
            n = int(rng.integers(1, 24))
            data[place : place + n], data[other : other + n] = data[other : other + n], data[place : place + n]
    return bytes(data)


def _library_agrees(path, file) -> None:
    """The independent reader sees the same metadata and tensors."""
    reader = gguf.GGUFReader(path)
    assert [t.name for t in reader.tensors] == file.names()
    for t in reader.tensors:
        assert tuple(int(n) for n in t.shape[::-1]) == file.shape(t.name)
        try:
            values = file.read(t.name)
        except CheckpointError as error:
            assert "which is not read" in str(error)  # noqa: PT017
            continue
        np.testing.assert_array_equal(values, dequantize(t.data, t.tensor_type).reshape(values.shape))
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert fields.keys() == file.fields.keys()
    for name, field in fields.items():
        try:
            expected = field.contents()
        except UnicodeDecodeError:
            with pytest.raises(CheckpointError, match="damaged metadata"):
                file.field(name)
            continue
        np.testing.assert_equal(file.field(name), expected, err_msg=name)


def test_thousands_of_damaged_files_are_read_right_or_refused(content, gemma, tmp_path):
    path = tmp_path / "damaged.gguf"
    files = [(each, _header_size(each, path)) for each in (content, gemma)]
    accepted, described = 0, 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for case in range(_CASES):
        path.write_bytes(_damage(*files[case % 2], np.random.default_rng((_SEED, case))))
        try:
            file = open_gguf(path)
        except CheckpointError:
            continue
        try:
            read_config(file)
            described += 1
        except CheckpointError as error:
            assert "damaged.gguf" in str(error)  # noqa: PT017
        accepted += 1
        if accepted % 5 == 0:  # the library is slow
            _library_agrees(path, file)
    # neither a reader that refuses all nor one that takes all would pass
    assert 0.1 * _CASES < accepted < 0.7 * _CASES
    assert described > 0.05 * _CASES
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 100_000, "kilobytes beyond those at the start"


def test_damaged_files_make_a_whole_model_or_none(content, tmp_path):
    """The rest of the way, to the parameters."""
    path, outcomes = tmp_path / "damaged.gguf", []
    header = _header_size(content, path)
    whole = load_gguf(path)
    for case in range(200):
        path.write_bytes(_damage(content, header, np.random.default_rng((_SEED, 10_000 + case))))
        try:
            model = load_gguf(path)
        except CheckpointError:
            outcomes.append(False)
        else:
            outcomes.append(True)
            assert model.blocks.attn.q.shape == whole.blocks.attn.q.shape
            assert np.isfinite(np.asarray(model.blocks.attn.q)).all()
    assert 5 < sum(outcomes) < 180


def test_any_truncation_is_refused(content, tmp_path):
    path = tmp_path / "cut.gguf"
    path.write_bytes(content)
    end = max(tensor.start + tensor.n_bytes for tensor in open_gguf(path).tensors.values())
    for size in [*range(0, 200), *range(200, end, 37), end - 1]:
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=r"cut.gguf: "):
            open_gguf(path)
    # the writer pads the last tensor to the alignment: cutting only padding loses nothing
    path.write_bytes(content[:end])
    open_gguf(path)
