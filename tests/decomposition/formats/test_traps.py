"""What loaders of dictionaries are known to get wrong, each with a test that a wrong loader fails."""

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from mi_jax.decomposition import formats
from mi_jax.decomposition.activations import JumpReLU
from tests.decomposition.formats import sae_lens_layouts, scope_layouts, trainer_layouts
from tests.decomposition.formats.layouts import LAYOUTS
from tests.decomposition.formats.making import D, F, K, L

X = jnp.asarray(np.random.default_rng(5).normal(1.0, 3.0, (64, D)), jnp.float32)


def test_a_decoder_stored_one_row_per_latent_is_not_transposed(tmp_path):
    """SAELens reads sparsify's W_dec transposed; a square one shows it in no shape."""
    stored = load_file(trainer_layouts.sparsify(tmp_path / "a").path / "sae.safetensors")
    model = formats.load(tmp_path / "a")
    np.testing.assert_array_equal(model.w_dec, stored["W_dec"])
    np.testing.assert_array_equal(model.w_enc, stored["encoder.weight"])
    assert np.abs(model.w_dec - stored["W_dec"].T).max() > 0.1
    early = load_file(trainer_layouts.circuit_tracer_early(tmp_path / "b").path)
    np.testing.assert_array_equal(formats.load(tmp_path / "b", layer=0).w_dec, early["W_dec"].T)


def test_the_last_layer_is_loaded_and_each_skip_is_the_way_it_is_stored(tmp_path):
    """A loop to the largest number leaves the last layer out; a square skip shows its direction in no shape."""
    layers = formats.load(scope_layouts.gemma_scope_2_clt(tmp_path / "a").path)
    assert layers.n_layers == L
    last = load_file(tmp_path / "a" / f"params_layer_{L - 1}.safetensors")
    np.testing.assert_array_equal(layers.w_enc[-1].T, last["w_enc"])
    np.testing.assert_array_equal(layers.w_skip[-1], last["affine_skip_connection"])
    np.testing.assert_array_equal(layers.weights(L - 1, L - 1), last["w_dec"][:, L - 1])
    single = formats.load(scope_layouts.gemma_scope_2(tmp_path / "b").path)
    stored = load_file(tmp_path / "b" / "params.safetensors")
    np.testing.assert_array_equal(single.w_skip, stored["affine_skip_connection"])
    per_layer = formats.load(trainer_layouts.circuit_tracer(tmp_path / "c").path, layer=3)
    np.testing.assert_array_equal(per_layer.w_skip, load_file(tmp_path / "c" / "layer_3.safetensors")["W_skip"].T)
    across = formats.load(trainer_layouts.circuit_tracer_clt(tmp_path / "d").path)
    np.testing.assert_array_equal(across.w_skip[0], load_file(tmp_path / "d" / "W_enc_0.safetensors")["W_skip_0"])


@pytest.mark.parametrize(
    ("format", "case", "centred"),
    [
        ("sae_lens", "standard", True),
        ("sae_lens", "standard, b_dec not subtracted", False),
        ("sae_lens", "transcoder", False),
        ("sae_lens_5", "topk", True),
        ("gemma_scope", "upper-case names", False),
        ("gemma_scope_2", "affine transcoder", False),
        ("llama_scope", "jumprelu", False),
        ("llama_scope_r1", "jumprelu", False),
        ("llamascopium", "jumprelu transcoder", False),
        ("dictionary_learning", "AutoEncoder", True),
        ("dictionary_learning", "AutoEncoderNew", False),
        ("dictionary_learning", "JumpReluAutoEncoder", False),
        ("dictionary_learning", "BatchTopKSAE", True),
        ("sparsify", "topk", True),
        ("sparsify", "topk skip transcoder", False),
        ("openai", "ReLU", True),
        ("circuit_tracer", "relu, early layout", False),
    ],
)
def test_b_dec_is_taken_off_where_the_family_does(format, case, centred, tmp_path):
    made = LAYOUTS[format][case](tmp_path / "a")
    assert formats.load(made.path, **made.options).centred == centred


def test_folding_a_scale_divides_the_thresholds_too(tmp_path):
    scale = np.sqrt(D) / 7.0
    stored = load_file(scope_layouts.llama_scope_r1(tmp_path / "a").path / "sae_weights.safetensors")
    model = formats.load(tmp_path / "a")
    theta = np.exp(stored["log_jumprelu_threshold"])
    np.testing.assert_allclose(model.activation.threshold, theta / scale, rtol=1e-6)
    fired = X * scale @ stored["encoder.weight"].T + stored["encoder.bias"][None] > theta[None]
    np.testing.assert_array_equal(model.encode(X) > 0, fired)
    # Llama Scope's threshold is in units of unscaled activations already
    one = formats.load(scope_layouts.llama_scope(tmp_path / "b").path)
    np.testing.assert_allclose(one.activation.threshold, np.full(F, 0.3), rtol=1e-6)


def test_decoder_norms_are_folded_only_where_ranks_included_them(tmp_path):
    plain = formats.load(sae_lens_layouts.sae_lens_topk(tmp_path / "a").path)
    ranked = formats.load(sae_lens_layouts.sae_lens_topk_by_norm(tmp_path / "b").path)
    stored = load_file(tmp_path / "a" / "sae_weights.safetensors")
    np.testing.assert_array_equal(plain.w_dec, stored["W_dec"])
    np.testing.assert_allclose(jnp.linalg.norm(ranked.w_dec, axis=1), np.ones(F), rtol=1e-6)
    # the same weights, and other latents
    assert ((plain.encode(X) > 0) != (ranked.encode(X) > 0)).any()
    folded = load_file(tmp_path / "b" / "sae_weights.safetensors")
    np.testing.assert_array_equal(stored["W_enc"], folded["W_enc"])


def test_batchtopk_becomes_a_jumprelu_without_an_exact_number_of_codes(tmp_path):
    model = formats.load(trainer_layouts.dictionary_learning_batchtopk(tmp_path / "a").path)
    formats.save(model, tmp_path / "b")
    jumps = formats.load(tmp_path / "b")
    assert isinstance(jumps.activation, JumpReLU)
    np.testing.assert_array_equal(model.encode(X), jumps.encode(X))
    h = (X - model.b_dec[None]) @ model.w_enc.T
    in_training = model.activation.dense(h + model.b_enc[None], model.b_enc, training=True)
    assert (in_training > 0).sum() == K * len(X)
    assert (jumps.encode(X) > 0).sum() != K * len(X)
    # per-token TopK stays what it is, though its file has a threshold as well
    topk = formats.load(trainer_layouts.dictionary_learning_topk(tmp_path / "c").path)
    assert ((topk.encode(X) > 0).sum(1) <= K).all()
    assert topk.k == K


def test_a_norm_that_is_not_in_the_folder_is_asked_for(tmp_path):
    sae_lens_layouts.sae_lens_average_norm(tmp_path / "a")
    (tmp_path / "a" / "activation_scaler.json").unlink()
    with pytest.raises(ValueError, match="scale=√d_in"):
        formats.load(tmp_path / "a")
    np.testing.assert_allclose(
        formats.load(tmp_path / "a", scale=0.4)(X), formats.load(tmp_path / "a", scale=1.0)(X * 0.4) / 0.4, rtol=1e-4
    )
    scope_layouts.llama_scope_r1_scale_given(tmp_path / "b")
    with pytest.raises(ValueError, match=r"dataset_average_activation_norm\.blocks.3.hook_resid_post"):
        formats.load(tmp_path / "b")
