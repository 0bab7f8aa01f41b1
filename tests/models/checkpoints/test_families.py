"""Every family: config.json there and back, the table of names against real files, and what is refused."""

import contextlib
import dataclasses
import json
import re
from pathlib import Path

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from safetensors.numpy import load_file

from mi_jax.models.checkpoints.errors import CheckpointError
from mi_jax.models.checkpoints.families import FAMILIES, family_of
from mi_jax.models.checkpoints.names import axis_sizes, ours_to_stored, stored_to_ours
from mi_jax.models.config import DecoderConfig, RopeScaling
from mi_jax.models.parameters import abstract_decoder
from tests.models.tiny import CONFIGS

GOLDEN = Path(__file__).parents[2] / "reference" / "families" / "golden"
NAMES = sorted(folder.name for folder in GOLDEN.iterdir() if (folder / "model.safetensors").exists())


def described(name: str, file: str = "config.json") -> dict:
    return json.loads((GOLDEN / name / file).read_text())


def golden_config(name: str) -> DecoderConfig:
    hf = described(name)
    return FAMILIES[hf["model_type"]].config(hf)


def parameters(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the decoder's parameters by path."""
    leaves = jax.tree_util.tree_leaves_with_path(abstract_decoder(config))
    return {jax.tree_util.keystr(path).removeprefix("."): leaf.shape for path, leaf in leaves}


def test_there_is_a_golden_of_every_family():
    # of the multimodal Gemma 3 only the text half is read, which has its own
    assert {described(name)["model_type"] for name in NAMES} == set(FAMILIES) - {"gemma3"}


@pytest.mark.parametrize("name", NAMES)
def test_config_json_there_and_back(name):
    hf = described(name)
    family, config = FAMILIES[hf["model_type"]], golden_config(name)
    written = json.loads(json.dumps(family.to_hf(config)))
    assert family.config(written) == dataclasses.replace(config, name=family.model_type)
    assert written["model_type"] == hf["model_type"]
    assert written["architectures"] == hf["architectures"]
    # the words of older versions describe the same model
    assert family.config(described(name, "config_legacy.json")) == config
    assert family_of(config) is family


@pytest.mark.parametrize("name", NAMES)
def test_table_has_every_parameter_and_every_tensor(name):
    """Shapes fit on both sides, and what was read puts the file together again bit for bit."""
    hf, stored = described(name), load_file(GOLDEN / name / "model.safetensors")
    family, config = FAMILIES[hf["model_type"]], golden_config(name)
    table, sizes, expected = family.names(config), axis_sizes(config), parameters(config)
    assert family.names(config, stored) == table
    assert sorted(each.path for each in table) == sorted(expected)
    read: dict[str, list] = {}
    for each in table:
        leading = tuple(sizes[axis] for axis in each.counts)
        for _, tensor in each.each(sizes):
            ours = stored_to_ours(stored[tensor], each, sizes)
            assert leading + ours.shape == expected[each.path], each
            read.setdefault(tensor, []).append((each, ours))
    for tensor, parts in read.items():
        np.testing.assert_array_equal(ours_to_stored(parts, sizes), stored[tensor])
    unread = [tensor for tensor in stored if tensor not in read]
    assert all(any(re.fullmatch(each, tensor) for each in family.ignored) for tensor in unread), unread
    assert all("pooler" in tensor for tensor in unread)


def test_what_the_goldens_ask_for():
    """Fields that a family sets or that its older words hide; the goldens' logits depend on each."""
    assert golden_config("gemma2").windows == (4, 0, 4, 0)
    assert golden_config("gemma2").attn_scale == 10**-0.5
    assert golden_config("gemma3").rope_local_theta == 10_000.0
    assert golden_config("gemma3").rope_scaling == RopeScaling("linear", 8.0)
    assert golden_config("smollm3").rope_layers == (True, True, True, False)
    assert golden_config("qwen2_sliding").windows == (0, 4, 4)
    assert golden_config("qwen2").windows == ()
    assert golden_config("gpt_neox").rope_dim == 4
    assert golden_config("llama_yarn").rope_scaling == RopeScaling("yarn", 4.0, 16, beta_fast=1.0, beta_slow=0.25)


# what files on the hub say, as far as it differs from the family's defaults or needs to be understood
HUB = {
    "gpt2": (
        {"n_ctx": 1024, "summary_type": "cls_index", "summary_use_proj": True, "activation_function": "gelu_new",
         "architectures": ["GPT2LMHeadModel"], "task_specific_params": {"text-generation": {"max_length": 50}}},
        {"n_layers": 12, "d_model": 768, "d_mlp": 3072, "activation": "gelu", "tied": True, "d_vocab": 50257},
    ),
    "gptj": (
        {"rotary": True, "rotary_dim": 64, "scale_attn_weights": True, "n_inner": None,
         "tokenizer_class": "GPT2Tokenizer", "gradient_checkpointing": False},
        {"d_head": 256, "rope_dim": 64, "rope_adjacent": True, "shared_norm": True, "unembed_bias": True},
    ),
    "gpt_neox": (
        {"hidden_size": 512, "num_attention_heads": 8, "num_hidden_layers": 6, "intermediate_size": 2048,
         "rotary_emb_base": 10000, "rotary_pct": 0.25, "use_parallel_residual": True, "torch_dtype": "float16"},
        {"d_head": 64, "rope_dim": 16, "activation": "gelu_exact", "norm": "layer", "parallel": True},
    ),
    "llama": (
        {"head_dim": 64, "hidden_size": 2048, "num_key_value_heads": 8, "pretraining_tp": 1, "rope_theta": 500000.0,
         "tie_word_embeddings": True, "max_position_embeddings": 131072,
         "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                          "original_max_position_embeddings": 8192, "rope_type": "llama3"}},
        {"rope_theta": 500000.0, "rope_scaling": RopeScaling("llama3", 32.0, 8192), "tied": True, "norm_eps": 1e-6},
    ),
    "mistral": (
        {"sliding_window": 4096, "rope_theta": 10000.0},
        {"windows": (4096,) * 32, "d_head": 128, "n_kv_heads": 8},
    ),
    "smollm3": (
        {"max_window_layers": 28, "no_rope_layers": [1, 1, 1, 0] * 9, "pretraining_tp": 2, "rope_scaling": None,
         "rope_theta": 5000000.0, "use_sliding_window": False, "sliding_window": None},
        {"rope_theta": 5e6, "rope_layers": (True, True, True, False) * 9, "windows": (), "tied": True},
    ),
    "qwen2": (
        {"max_window_layers": 21, "sliding_window": 32768, "use_sliding_window": False, "use_mrope": False,
         "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
        {"windows": (), "qkv_bias": True, "o_bias": False, "rope_scaling": RopeScaling("yarn", 4.0, 32768)},
    ),
    "qwen3": (
        {"attention_bias": False, "hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 8,
         "rope_scaling": None},
        {"d_head": 128, "qk_norm": "head", "qkv_bias": False},
    ),
    "gemma": (
        {"hidden_act": "gelu", "hidden_activation": None, "head_dim": 256, "num_key_value_heads": 1},
        {"activation": "gelu", "norm_offset": 1.0, "embed_scale": 3072**0.5, "tied": True, "n_kv_heads": 1},
    ),
    "gemma2": (
        {"hidden_act": "gelu_pytorch_tanh", "cache_implementation": "hybrid", "query_pre_attn_scalar": 256,
         "sliding_window_size": 4096, "sliding_window": 4096},
        {"windows": (4096, 0) * 13, "score_softcap": 50.0, "logit_softcap": 30.0, "attn_scale": None},
    ),
    "gemma3_text": (
        {"sliding_window": 512, "sliding_window_pattern": 6, "rope_local_base_freq": 10000, "rope_theta": 1000000,
         "rope_scaling": None, "num_hidden_layers": 8, "attn_logit_softcapping": None, "query_pre_attn_scalar": 168},
        {"windows": (512,) * 5 + (0, 512, 512), "rope_local_theta": 1e4, "rope_theta": 1e6, "attn_scale": 168**-0.5},
    ),
    "gemma3": (
        {"text_config": {"hidden_size": 2560, "model_type": "gemma3_text", "num_hidden_layers": 6,
                         "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024},
         "vision_config": {"model_type": "siglip_vision_model"}, "mm_tokens_per_image": 256, "boi_token_index": 255999},
        {"d_model": 2560, "rope_scaling": RopeScaling("linear", 8.0), "windows": (1024,) * 5 + (0,)},
    ),
    "olmo2": (
        {"rope_theta": 500000, "rms_norm_eps": 1e-6},
        {"norms": "output", "qk_norm": "whole", "rope_theta": 5e5, "norm_eps": 1e-6},
    ),
    "phi3": (
        {"auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "original_max_position_embeddings": 4096,
         "sliding_window": 2047, "rope_scaling": None, "attention_bias": False},
        {"windows": (2047,) * 32, "rope_dim": None, "d_head": 96},
    ),
    "qwen3_moe": (
        {"decoder_sparse_step": 1, "mlp_only_layers": [], "max_window_layers": 48, "moe_intermediate_size": 768,
         "norm_topk_prob": True, "num_experts": 128, "sliding_window": None, "head_dim": 128,
         "router_aux_loss_coef": 0.1},
        {"n_experts": 128, "n_active_experts": 8, "d_mlp": 768, "renormalize_experts": True, "windows": ()},
    ),
    "olmoe": (
        {"clip_qkv": None, "num_experts": 64, "norm_topk_prob": False, "output_router_logits": False},
        {"n_experts": 64, "d_mlp": 2048, "qk_norm": "whole", "renormalize_experts": False},
    ),
    "bert": (
        {"position_embedding_type": "absolute", "hidden_size": 384, "intermediate_size": 1536, "pad_token_id": 0,
         "directionality": "bidi", "pooler_type": "first_token_transform", "architectures": ["BertForMaskedLM"]},
        {"causal": False, "norms": "post", "embed_norm": True, "n_token_types": 2, "head": "none", "norm_eps": 1e-12},
    ),
    "vit": (
        {"image_size": [224, 224], "architectures": ["ViTForImageClassification"], "encoder_stride": 16,
         "id2label": {str(i): f"class {i}" for i in range(10)}},
        {"d_vocab": 10, "n_ctx": 197, "head": "logits", "unembed_bias": True, "causal": False},
    ),
}  # fmt: skip


@pytest.mark.parametrize("model_type", FAMILIES)
def test_files_of_the_hub(model_type):
    """Their words are understood, and what they leave out has the reference's default; and back again."""
    keys, expected = HUB[model_type]
    config = FAMILIES[model_type].config({"model_type": model_type, "transformers_version": "4.44.0", **keys})
    assert {name: getattr(config, name) for name in expected} == expected
    again = FAMILIES[model_type].config(FAMILIES[model_type].to_hf(config))
    assert again == dataclasses.replace(config, name=again.name)


REFUSED = [
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is true; .* supports false"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention is true"),
    ("gpt2", {"activation_function": "tanh"}, "activation_function is 'tanh'; the decoder supports silu"),
    ("gpt2", {"n_head": 5}, "n_embd, n_head is .* a divisor"),
    ("gpt2", {"architectures": ["GPT2ForSequenceClassification"]}, "architectures is 'GPT2ForSequenceClassification'"),
    ("gptj", {"rotary": False}, "rotary is false"),
    ("gptj", {"rotary_dim": None}, "rope_dim"),
    ("gpt_neox", {"rotary_pct": 1.5}, "share of 1"),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'; .*linear, llama3"),
    ("llama", {"rope_scaling": {"rope_type": "linear"}}, "factor is null"),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "long_factor": [1.0]}}, "long_factor"),
    ("llama", {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1]}}, "mrope_section"),
    ("llama", {"rope_interleaved": True}, "rope_interleaved is true"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("llama", {"num_attention_heads": 3}, "hidden_size, num_attention_heads"),
    ("llama", {"some_new_gate": 2}, "some_new_gate = 2: unknown here"),
    ("llama", {"hidden_size": "64"}, "hidden_size is '64', where a whole number"),
    ("llama", {"intermediate_size": 0}, "MLP has 0 components"),
    ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
    ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, where a number"),
    ("llama", {"is_encoder_decoder": True}, "is_encoder_decoder is true"),
    ("mistral", {"sliding_window": -1}, "window"),
    ("smollm3", {"no_rope_layers": [1, 0]}, "36 times 0 or 1"),
    ("smollm3", {"layer_types": ["sliding_attention"] * 36}, "sliding_window is null"),
    ("qwen2", {"layer_types": ["linear_attention"] * 32}, "layer_types is .*32 times full_attention"),
    ("qwen2", {"use_mrope": True}, "use_mrope is true"),
    ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention is true"),
    ("gemma", {"hidden_activation": "relu"}, "hidden_activation is 'relu'"),
    ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
    ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
    ("gemma3_text", {"rope_parameters": {"sliding_attention": {"rope_type": "yarn"}}}, "rope_type is 'yarn'"),
    ("gemma3", {"text_config": {"model_type": "llama"}}, "model_type is 'llama'"),
    ("phi3", {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "rope_type is 'longrope'; .* default"),
    ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers is"),
    ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step is 2; the decoder supports 1"),
    ("qwen3_moe", {"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size"),
    ("olmoe", {"clip_qkv": 8.0}, "clip_qkv is 8.0; the decoder supports null"),
    ("olmoe", {"num_experts": 0}, "num_experts is 0"),
    ("olmoe", {"head_dim": 32}, "head_dim is 32"),
    ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
    ("bert", {"is_decoder": True}, "is_decoder is true"),
    ("bert", {"type_vocab_size": 0}, "type_vocab_size is 0"),
    ("vit", {"image_size": [224, 192]}, "squares"),
    ("vit", {"patch_size": 15}, "not a multiple of patch_size"),
    ("vit", {"architectures": ["ViTForMaskedImageModeling"]}, "architectures"),
]  # fmt: skip


@pytest.mark.parametrize(("model_type", "keys", "message"), REFUSED)
def test_what_the_decoder_lacks_is_refused_by_name(model_type, keys, message):
    family = FAMILIES[model_type]
    family.config({"model_type": model_type})
    with pytest.raises(CheckpointError, match=f"config.json of a {model_type} model.*{message}"):
        family.config({"model_type": model_type, **keys})


def test_keys_without_effect_pass_and_null_counts_as_missing():
    llama = FAMILIES["llama"].config({"model_type": "llama"})
    odd = {"attention_dropout": 0.1, "some_new_gate": None, "other": False, "list": [], "num_key_value_heads": None}
    odd |= {"_name_or_path": "org/odd", "rope_parameters": None, "rope_scaling": {}}
    assert FAMILIES["llama"].config({"model_type": "llama", **odd}) == dataclasses.replace(llama, name="org/odd")
    # null has a meaning of its own where the reference gives it one
    assert FAMILIES["mistral"].config({"sliding_window": None}).windows == ()
    assert FAMILIES["gemma2"].config({"final_logit_softcapping": None}).logit_softcap == 0.0


def test_yarn_with_magnitudes_of_its_own():
    """The quotient of the two, as DeepSeek's files have it: (0.1·0.7·ln 4 + 1) / (0.1·1.4·ln 4 + 1)."""
    scaling = {"type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.4}
    config = FAMILIES["llama"].config({"rope_scaling": scaling, "max_position_embeddings": 128})
    expected = (0.07 * np.log(4) + 1) / (0.14 * np.log(4) + 1)
    assert config.rope_scaling is not None
    assert config.rope_scaling.attention_factor == pytest.approx(expected, rel=1e-12)
    assert dataclasses.replace(config.rope_scaling, attention_factor=None) == RopeScaling("yarn", 4.0, 128)


SPELLINGS = [
    ("gpt2", (r"^transformer\.", "")),
    ("llama", (r"^model\.", "")),
    ("gpt_neox", (r"^embed_out\.", "lm_head.")),
    ("bert", (r"^", "bert.")),
    ("bert", (r"LayerNorm\.weight$", "LayerNorm.gamma")),
    ("vit", (r"encoder\.layer\.", "layers.")),
]


@pytest.mark.parametrize(("name", "spelling"), SPELLINGS)
def test_other_spellings_are_found(name, spelling):
    config, family = golden_config(name), FAMILIES[described(name)["model_type"]]
    sizes = axis_sizes(config)
    there = {tensor for each in family.names(config) for _, tensor in each.each(sizes)}
    other = {re.sub(*spelling, tensor) for tensor in there}
    assert other != there
    found = family.names(config, other)
    assert {tensor for each in found for _, tensor in each.each(sizes)} == other
    assert [each.path for each in found] == [each.path for each in family.names(config)]


def test_newest_names_of_vit():
    config, names = golden_config("vit"), FAMILIES["vit"].names
    newest = {"vit.layers.0.attention.q_proj.weight", "vit.layers.0.attention.o_proj.bias", "vit.layers.0.mlp.fc1.bias"}
    newest |= {"vit.layers.0.mlp.fc2.weight", "vit.layers.0.layernorm_after.weight"}
    assert {each.at((0,)) for each in names(config, newest) if each.counts} >= newest


def test_multimodal_gemma_is_its_text_half():
    family, text = FAMILIES["gemma3"], described("gemma3")
    config = family.config({"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 8}})
    assert config == dataclasses.replace(golden_config("gemma3"), name="gemma3")
    assert family.names(config)[0].name == "language_model.model.embed_tokens.weight"
    newer = family.names(config, {"model.language_model.embed_tokens.weight"})
    assert newer[0].name == "model.language_model.embed_tokens.weight"
    ignored = "vision_tower.vision_model.embeddings.patch_embedding.weight"
    for name in (ignored, "model." + ignored, "multi_modal_projector.mm_soft_emb_norm.weight"):
        assert any(re.fullmatch(each, name) for each in family.ignored)


def test_a_tied_unembedding_that_is_stored_too():
    smollm2, llama, family = golden_config("smollm2"), golden_config("llama"), FAMILIES["llama"]
    present = ["model.embed_tokens.weight", "lm_head.weight"]
    assert family.copies(smollm2, present) == (("lm_head.weight", "model.embed_tokens.weight"),)
    assert family.copies(smollm2, present[:1]) == ()
    assert family.copies(llama, present) == ()


def test_a_model_of_no_family():
    assert family_of(CONFIGS["attention-only"]) is None
    mistral = dataclasses.replace(golden_config("mistral"), windows=())
    assert family_of(mistral) is FAMILIES["llama"]
    with pytest.raises(CheckpointError, match=r"a gptj model cannot have .*rope_theta=5.0"):
        FAMILIES["gptj"].to_hf(dataclasses.replace(golden_config("gptj"), rope_theta=5.0))


VARIED = """
activation norms qk_norm qkv_bias o_bias mlp_bias unembed_bias tied windows rope_scaling rope_dim n_experts
n_active_experts d_mlp head attn_scale gated d_model d_vocab norm_offset parallel rope_layers n_token_types
embed_norm norm patches n_ctx
""".split()
CHANGES = st.lists(st.tuples(st.sampled_from(VARIED), st.sampled_from(["other", None, 0, 2])), max_size=3)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(NAMES), st.sampled_from(NAMES), CHANGES)
def test_a_family_that_is_found_can_store_the_model(name, other, changes):
    """Whatever family claims a configuration has a place for each of its parameters, and reads it again."""
    config = golden_config(name)
    for field, value in changes:
        value = getattr(golden_config(other), field) if value == "other" else value
        with contextlib.suppress(TypeError, ValueError):
            config = dataclasses.replace(config, **{field: value})
    family = family_of(config)
    if family is not None:
        assert dataclasses.replace(family.config(family.to_hf(config)), name=config.name) == config
        assert sorted(each.path for each in family.names(config)) == sorted(parameters(config))


JUNK = st.sampled_from(
    [None, True, False, 0, -1, 1, 7, 10**12, 0.5, -2.0, float("inf"), "", "gelu", [], [1], {}, {"a": 1}]
)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_configs_give_one_error(data):
    hf = described(data.draw(st.sampled_from(NAMES)), data.draw(st.sampled_from(["config.json", "config_legacy.json"])))
    for key in data.draw(st.lists(st.sampled_from(sorted(hf)), min_size=1, max_size=3)):
        inner = hf[key]
        if isinstance(inner, dict) and inner and data.draw(st.booleans()):
            hf[key] = {**inner, data.draw(st.sampled_from(sorted(inner))): data.draw(JUNK)}
        else:
            hf[key] = data.draw(JUNK)
    model_type = hf.pop("model_type")
    family = FAMILIES[model_type] if model_type in list(FAMILIES) else FAMILIES["llama"]
    with contextlib.suppress(CheckpointError):
        assert isinstance(family.config(hf), DecoderConfig)
