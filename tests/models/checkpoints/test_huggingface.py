"""Loading and saving whole checkpoints: round trips, what is refused, and ids of the hub without a network."""

import builtins
import dataclasses
import json
import os
import shutil
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy as library

import mi_jax as mi
from mi_jax.core.errors import InputError
from mi_jax.core.sharding import make_mesh, shard
from mi_jax.models import Decoder, DecoderConfig, logical_axes
from mi_jax.models.checkpoints import native, saving
from mi_jax.models.checkpoints.errors import CheckpointError
from mi_jax.models.checkpoints.families import FAMILIES
from mi_jax.models.checkpoints.hub import FILES
from mi_jax.models.checkpoints.huggingface import load
from mi_jax.models.checkpoints.saving import save
from mi_jax.models.config import PatchConfig, RopeScaling
from tests.models.gguf_files import write_tiny
from tests.models.tiny import CONFIGS, tiny

GOLDEN = Path(__file__).parents[2] / "reference" / "families" / "golden"


def _same(a: Decoder, b: Decoder) -> bool:
    def bits(x):
        return x.dtype, x.shape, np.asarray(x).tobytes()

    return a.config == b.config and jax.tree.all(jax.tree.map(lambda x, y: bits(x) == bits(y), a, b))


def _files(folder) -> dict[str, bytes]:
    return {name: (Path(folder) / name).read_bytes() for name in sorted(os.listdir(folder))}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    save(tiny(), folder)
    return folder


@pytest.fixture
def checkpoint(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def _change(folder: Path, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("name", [*CONFIGS, "bfloat16"])
def test_a_saved_model_is_loaded_bit_for_bit(tmp_path, name):
    model = tiny("llama" if name == "bfloat16" else name)
    if name == "bfloat16":
        model = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model)
    save(model, tmp_path / "model")
    assert _same(load(tmp_path / "model"), model)
    described = json.loads((tmp_path / "model" / "config.json").read_text())
    dtype = "bfloat16" if name == "bfloat16" else "float32"
    assert (described["dtype"], described["torch_dtype"]) == (dtype, dtype)
    assert described["model_type"] == {"llama": "llama", "bfloat16": "llama"}.get(name, "mi_jax")
    assert sorted(os.listdir(tmp_path)) == ["model"]


@pytest.mark.parametrize("name", ["llama", "llama_sharded"])
def test_a_file_of_transformers_is_written_as_it_was(tmp_path, name):
    if not (GOLDEN / name).is_dir():
        pytest.skip("the golden files are not there")
    model = load(GOLDEN / name)
    save(model, tmp_path / "again", max_shard_bytes=5e4 if name == "llama_sharded" else 5e9)
    stored, again = {}, {}
    for folder, into in ((GOLDEN / name, stored), (tmp_path / "again", again)):
        for path in folder.glob("*.safetensors"):
            into |= library.load_file(path)
    assert len(list((tmp_path / "again").glob("*.safetensors"))) == (1 if name == "llama" else 3)
    assert {n: v.tobytes() for n, v in again.items()} == {n: v.tobytes() for n, v in stored.items()}
    before, after = (json.loads((path / "config.json").read_text()) for path in (GOLDEN / name, tmp_path / "again"))
    # what the model is; the rest, such as the ids of special tokens, is of the tokenizer
    assert {key: after[key] for key in ("model_type", "architectures", "hidden_size", "num_hidden_layers")} == {
        key: before[key] for key in ("model_type", "architectures", "hidden_size", "num_hidden_layers")
    }


def test_the_format_is_the_one_that_transformers_asks_for(checkpoint):
    with library.safe_open(checkpoint / "model.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt"}
        assert "model.layers.2.self_attn.q_proj.weight" in file.keys()  # noqa: SIM118
    assert json.loads((checkpoint / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_a_sharded_model_is_saved_as_the_whole_one(saved, tmp_path):
    sharded = shard(tiny(), logical_axes(tiny()), make_mesh(fsdp=2, model=2))
    save(sharded, tmp_path / "model")
    assert _files(tmp_path / "model") == _files(saved)


def test_every_field_of_a_configuration_survives_the_projects_own_form():
    config = DecoderConfig(
        name="odd", n_layers=2, d_model=8, n_heads=2, n_kv_heads=1, d_head=4, d_mlp=6, d_vocab=5, n_ctx=7,
        rope_scaling=RopeScaling("yarn", 4.0, 128, attention_factor=None), rope_layers=(True, False), windows=(0, 3),
        attn_scale=0.25, score_softcap=50.0, rope_theta=5, n_experts=3, n_active_experts=2, norms="sandwich",
    )  # fmt: skip
    image = DecoderConfig(
        n_layers=1, d_model=8, n_heads=2, n_kv_heads=2, d_head=4, d_mlp=6, d_vocab=5, n_ctx=5, causal=False,
        positions="learned", patches=PatchConfig(4, 2), tied=False,
    )  # fmt: skip
    for each in (config, image, *CONFIGS.values()):
        assert native.from_json(json.loads(json.dumps(native.to_json(each)))) == each


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_modle": 3}, "decoder has no field 'd_modle'"),
        ({"n_layers": "3"}, "decoder.n_layers is '3', not of type"),
        ({"n_layers": True}, "decoder.n_layers is True, not of type"),
        ({"norm": "batch"}, "decoder.norm is 'batch', not one of rms, layer, none"),
        ({"windows": 3}, "decoder.windows is 3, not a list"),
        ({"rope_scaling": 3}, "decoder.rope_scaling is 3, not an object"),
        ({"n_kv_heads": 3}, "n_heads=4 is not a multiple of n_kv_heads=3"),
    ],
)
def test_the_projects_own_form_is_checked(change, message):
    values = native.to_json(CONFIGS["attention-only"])
    values["decoder"] |= change
    with pytest.raises(CheckpointError, match=message):
        native.from_json(values)


def test_nothing_is_left_of_a_save_that_fails(tmp_path, monkeypatch):
    write, written = saving.write_json, []

    def fail(path, value):
        written.append(sorted(os.listdir(os.path.dirname(path))))
        raise OSError("no space left on device")

    monkeypatch.setattr(saving, "write_json", fail)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "tokenizer.json").write_text("{}")
    for name in ("new", "old"):
        with pytest.raises(OSError, match="no space left"):
            save(tiny(), tmp_path / name)
    assert written == [["model.safetensors"]] * 2
    assert sorted(os.listdir(tmp_path)) == ["old"]
    assert os.listdir(tmp_path / "old") == ["tokenizer.json"]
    monkeypatch.setattr(saving, "write_json", write)
    save(tiny(), tmp_path / "old")
    assert sorted(os.listdir(tmp_path / "old")) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert _same(load(tmp_path / "old"), tiny())


def test_what_cannot_be_saved_is_refused(checkpoint, tmp_path):
    before = _files(checkpoint)
    with pytest.raises(InputError, match=r"holds a checkpoint already \(config.json\)"):
        save(tiny("gpt2"), checkpoint)
    assert _files(checkpoint) == before
    with pytest.raises(InputError, match=r"config.json is a file; give a directory"):
        save(tiny(), checkpoint / "config.json")
    with pytest.raises(InputError, match="Intervened is not a decoder; save the model itself"):
        save(mi.intervene(tiny(), mi.ablate("mlp_out", layer=0)), tmp_path / "wrong")
    wrong = dataclasses.replace(tiny(), embed=tiny().embed[:5])
    with pytest.raises(InputError, match=r"'embed' has shape \(5, 8\), the model's configuration says \(13, 8\)"):
        save(wrong, tmp_path / "wrong")
    missing = dataclasses.replace(tiny(), final_norm=None)
    with pytest.raises(InputError, match=r"'final_norm.weight' has shape None"):
        save(missing, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not read; these are: .*gpt2.*llama.*mi_jax.*qwen3"),
        ({"model_type": None}, "model_type None is not read"),
        ({"model_type": ["llama"]}, "is not read; these are"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantized \(quantization_config: 'gptq'\)"),
        ({"quantization_config": 4}, "quantization_config: 4"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000; a model of at most"),
        ({"num_hidden_layers": 4}, r"missing tensors 'model\.layers\.3\."),
        ({"num_hidden_layers": 2}, r"no place for tensors 'model\.layers\.2\."),
        ({"hidden_size": 16}, "has shape .*, the configuration says"),
        ({"intermediate_size": 9}, "has shape .*, the configuration says"),
        ({"num_attention_heads": 8}, "has shape .*, the configuration says"),
        ({"vocab_size": 14}, r"has shape \[13, 8\], the configuration says \[14, 8\]"),
        ({"tie_word_embeddings": False}, r"missing tensors 'lm_head\.weight'"),
        ({"dtype": "bfloat16"}, "is float32, the configuration says bfloat16; say dtype="),
        ({"dtype": "int4"}, "dtype is 'int4', which is none of float64, float32, float16, bfloat16"),
        ({"model_type": "gpt2"}, r"config\.json"),
    ],
    ids=str,
)
def test_a_configuration_that_does_not_fit_is_refused(checkpoint, changes, message):
    _change(checkpoint, **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(checkpoint)
    assert str(checkpoint) in str(caught.value)


def test_a_type_that_the_caller_chooses_overrides_what_the_configuration_says(checkpoint):
    _change(checkpoint, dtype="bfloat16", torch_dtype="bfloat16")
    assert _same(load(checkpoint, dtype=jnp.float32), tiny())
    half = load(checkpoint, dtype=jnp.bfloat16)
    assert _same(half, jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny()))


def test_what_is_not_a_checkpoint_is_refused(checkpoint, tmp_path):
    for path, message in [
        (checkpoint / "config.json", "is a file; give the directory with its config.json"),
        (tmp_path / "absent", "no such file or directory, and not an id of the hub"),
        (tmp_path / "absent.gguf", "no such file"),
        ("./model", "no such file or directory, and not an id of the hub"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            load(path)
    with pytest.raises(CheckpointError, match="revision='main' is for ids of the hub"):
        load(checkpoint, revision="main")
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    message = r"pytorch_model\.bin, not safetensors.*architectures\[0\].*safe_serialization=True"
    with pytest.raises(CheckpointError, match=message):
        load(checkpoint)
    (checkpoint / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no such file; a checkpoint directory has a config\.json"):
        load(checkpoint)


def test_weights_that_are_not_finite_are_refused_unless_asked_for(checkpoint):
    path = checkpoint / "model.safetensors"
    tensors = library.load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 2] = np.nan
    library.save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' holds NaN or infinity"):
        load(checkpoint)
    assert jnp.isnan(load(checkpoint, allow_nan=True).blocks.mlp.up[1, 2, 3])


def test_a_gguf_file_is_loaded_by_its_name(tmp_path):
    path = write_tiny(tmp_path / "tiny.gguf")
    assert load(path).embed.dtype == jnp.float32
    assert load(path, dtype=jnp.bfloat16).embed.dtype == jnp.bfloat16
    with pytest.raises(CheckpointError, match="is a file; revision='main' is for ids of the hub"):
        load(path, revision="main")


@pytest.fixture
def hub(checkpoint, tmp_path, monkeypatch) -> Path:
    """The hub's cache with one model in it, and no network."""
    cache, commit = tmp_path / "hub", "0123456789abcdef0123456789abcdef01234567"
    repository = cache / "models--owner--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    checkpoint.rename(repository / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return cache


def test_a_model_in_the_cache_of_the_hub_is_loaded_offline(hub):
    assert _same(load("owner/tiny"), tiny())
    assert _same(load("owner/tiny", revision="main"), tiny())


def test_an_id_that_cannot_be_had_is_named(hub):
    with pytest.raises(CheckpointError, match=r"hub id 'owner/other'.*not in the cache.*HF_HUB_OFFLINE"):
        load("owner/other")
    with pytest.raises(CheckpointError, match=r"hub id 'owner/tiny', revision 'v2'.*not in the cache"):
        load("owner/tiny", revision="v2")
    with pytest.raises(CheckpointError, match="hub id 'owner/a--b'"):
        load("owner/a--b")
    (weights,) = hub.glob("models--owner--tiny/snapshots/*/model.safetensors")
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"hub id 'owner/tiny': the hub has no model.safetensors.*Convert it"):
        load("owner/tiny")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("RepositoryNotFoundError", "the hub knows no such model"),
        ("GatedRepoError", "access must be asked for at https://huggingface.co/owner/tiny, then set HF_TOKEN"),
        ("RevisionNotFoundError", "the model has no such revision"),
        ("HfHubHTTPError", "download failed .HfHubHTTPError"),
    ],
)
def test_every_refusal_of_the_hub_says_what_to_do(monkeypatch, error, message):
    def refuse(*_, **__):
        kind = getattr(huggingface_hub.errors, error)
        raise kind.__new__(kind, "reason")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(CheckpointError, match=f"hub id 'owner/tiny': {message}"):
        load("owner/tiny")


def test_only_the_files_that_are_read_are_downloaded(monkeypatch, saved):
    asked = {}

    def download(name, **options):
        asked.update(name=name, **options)
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert _same(load("tiny-model", revision="abc"), tiny())
    assert asked == {"name": "tiny-model", "revision": "abc", "allow_patterns": list(FILES)}
    unwanted = ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.safetensors", "model.pt", "a.py"]
    wanted = ["config.json", "tokenizer.json", "generation_config.json", "model-00001-of-00002.safetensors"]
    keep = huggingface_hub.utils.filter_repo_objects([*wanted, *unwanted], allow_patterns=list(FILES))
    assert list(keep) == wanted


def test_without_the_library_an_id_says_how_to_install_it(monkeypatch):
    real = builtins.__import__

    def blocked(name, *args, **kwargs):
        if name.split(".")[0] == "huggingface_hub":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", blocked)
    with pytest.raises(CheckpointError, match=r"'?owner/tiny'?: .*pip install 'mi-jax\[hub\]'"):
        load("owner/tiny")


def test_the_families_are_the_known_model_types():
    assert {"gpt2", "llama", "qwen3", "gemma3_text", "olmo2", "phi3", "bert", "vit"} <= set(FAMILIES)
    assert native.MODEL_TYPE not in FAMILIES


@pytest.mark.parametrize("equal", [True, False])
def test_a_tied_unembedding_that_is_stored_has_to_be_the_embedding(tmp_path, equal):
    folder = Path(shutil.copytree(GOLDEN / "smollm2", tmp_path / "model"))
    tensors = library.load_file(folder / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    library.save_file(tensors | {"lm_head.weight": embedding if equal else embedding + 1}, folder / "model.safetensors")
    if equal:
        assert _same(load(folder), load(GOLDEN / "smollm2"))
    else:
        with pytest.raises(CheckpointError, match=r"'lm_head.weight' is 'model.embed_tokens.weight', which it is not"):
            load(folder)
