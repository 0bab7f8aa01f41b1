"""Folders and files of every format: what each case is called, and what makes it."""

from collections.abc import Callable
from pathlib import Path

from tests.decomposition.formats import sae_lens_layouts, scope_layouts, trainer_layouts
from tests.decomposition.formats.making import Made

# by format
LAYOUTS: dict[str, dict[str, Callable[[Path], Made]]] = {
    "sae_lens": {
        "standard": sae_lens_layouts.sae_lens_standard,
        "standard, b_dec not subtracted": sae_lens_layouts.sae_lens_uncentred,
        "gated": sae_lens_layouts.sae_lens_gated,
        "jumprelu": sae_lens_layouts.sae_lens_jumprelu,
        "jumprelu, log_threshold": sae_lens_layouts.sae_lens_log_threshold,
        "topk": sae_lens_layouts.sae_lens_topk,
        "topk, ranked by decoder norm": sae_lens_layouts.sae_lens_topk_by_norm,
        "abstopk": sae_lens_layouts.sae_lens_abstopk,
        "batchtopk": sae_lens_layouts.sae_lens_batchtopk,
        "matching_pursuit": sae_lens_layouts.sae_lens_matching_pursuit,
        "transcoder": sae_lens_layouts.sae_lens_transcoder,
        "skip_transcoder": sae_lens_layouts.sae_lens_skip_transcoder,
        "jumprelu_transcoder": sae_lens_layouts.sae_lens_jumprelu_transcoder,
        "jumprelu_skip_transcoder": sae_lens_layouts.sae_lens_jumprelu_skip_transcoder,
        "layer_norm": sae_lens_layouts.sae_lens_layer_norm,
        "constant_norm_rescale": sae_lens_layouts.sae_lens_unit_norm,
        "expected_average_only_in": sae_lens_layouts.sae_lens_average_norm,
        "expected_average_only_in, matching_pursuit": sae_lens_layouts.sae_lens_pursuit_average_norm,
        "covariance_whitening, gated": sae_lens_layouts.sae_lens_whitened,
    },
    "sae_lens_5": {"standard, finetuned": sae_lens_layouts.sae_lens_5, "topk": sae_lens_layouts.sae_lens_5_topk},
    "gemma_scope": {
        "upper-case names": scope_layouts.gemma_scope,
        "lower-case names": scope_layouts.gemma_scope_lower,
        "scaling_factor": scope_layouts.gemma_scope_factor,
        "embedding": scope_layouts.gemma_scope_embedding,
    },
    "gemma_scope_2": {
        "affine transcoder": scope_layouts.gemma_scope_2,
        "cross-layer, affine": scope_layouts.gemma_scope_2_clt,
    },
    "llama_scope": {"jumprelu": scope_layouts.llama_scope},
    "llama_scope_r1": {
        "jumprelu": scope_layouts.llama_scope_r1,
        "jumprelu, scale given": scope_layouts.llama_scope_r1_scale_given,
    },
    "llamascopium": {
        "jumprelu transcoder": scope_layouts.llamascopium,
        "topk, token-wise norm": scope_layouts.llamascopium_topk,
        "relu, torch file": scope_layouts.llamascopium_torch,
        "crosscoder": scope_layouts.llamascopium_crosscoder,
        "cross-layer, jumprelu": scope_layouts.llamascopium_clt,
    },
    "dictionary_learning": {
        "AutoEncoder": trainer_layouts.dictionary_learning_relu,
        "AutoEncoderNew": trainer_layouts.dictionary_learning_new,
        "GatedAutoEncoder": trainer_layouts.dictionary_learning_gated,
        "JumpReluAutoEncoder": trainer_layouts.dictionary_learning_jumprelu,
        "AutoEncoderTopK": trainer_layouts.dictionary_learning_topk,
        "BatchTopKSAE": trainer_layouts.dictionary_learning_batchtopk,
        "MatryoshkaBatchTopKSAE": trainer_layouts.dictionary_learning_matryoshka,
    },
    "sparsify": {
        "topk": trainer_layouts.sparsify,
        "topk skip transcoder": trainer_layouts.sparsify_transcoder,
        "signed topk": trainer_layouts.sparsify_signed,
    },
    "clt_training": {
        "cross-layer": trainer_layouts.clt_training,
        "cross-layer, tied per source": trainer_layouts.clt_training_tied,
    },
    "openai": {"TopK": trainer_layouts.openai, "ReLU": trainer_layouts.openai_relu},
    "circuit_tracer": {
        "jumprelu, skip": trainer_layouts.circuit_tracer,
        "relu, early layout": trainer_layouts.circuit_tracer_early,
    },
    "circuit_tracer_clt": {"cross-layer, jumprelu, skip": trainer_layouts.circuit_tracer_clt},
}
