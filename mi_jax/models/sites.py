"""The sites of a decoder."""

from mi_jax.core.sites import AttentionRule, Site, SiteTable
from mi_jax.models.config import DecoderConfig

_STREAM = ("layer", "batch", "pos", "d_model")


def site_table(config: DecoderConfig) -> SiteTable:
    """The sites of a decoder of this shape."""
    heads, kv = ("layer", "batch", "pos", "head"), ("layer", "batch", "pos", "kv_head")
    weights = ("layer", "batch", "head", "query", "key")
    post = config.norms == "post"
    axes: dict[str, tuple[str, ...]] = {
        "embed": ("batch", "pos", "d_model"),
        "resid_pre": _STREAM,
        "attn.q_in": (*heads, "d_model"),
        "attn.k_in": (*kv, "d_model"),
        "attn.v_in": (*kv, "d_model"),
        "attn.q": (*heads, "d_head"),
        "attn.k": (*kv, "d_head"),
        "attn.v": (*kv, "d_head"),
        "attn.scores": weights,
        "attn.pattern": weights,
        "attn.z": (*heads, "d_head"),
        "attn.head_out": (*heads, "d_model"),
        "attn_out": _STREAM,
    }
    axes |= {} if config.parallel else {"resid_mid": _STREAM}
    axes |= {"resid_mid_normalized": _STREAM} if post else {}
    axes |= _mlp_axes(config)
    axes |= {"resid_post": _STREAM}
    axes |= {"resid_post_normalized": _STREAM} if post else {}
    axes |= {} if post else {"final_norm": ("batch", "pos", "d_model")}
    axes |= {} if config.head == "none" else {"logits": ("batch", "pos", "d_vocab")}
    sizes = {
        "layer": config.n_layers,
        "head": config.n_heads,
        "kv_head": config.n_kv_heads,
        "d_head": config.d_head,
        "d_model": config.d_model,
        "d_mlp": config.d_mlp,
        "d_vocab": config.d_vocab,
    }
    sizes |= {"expert": config.n_experts} if config.n_experts else {}
    sizes |= {"pos": config.n_ctx} if config.patches is not None else {}
    # the TransformerLens name means the token embedding alone, which other tables are added to here
    alone = config.positions != "learned" and not config.n_token_types and not config.embed_norm
    aliases = (("hook_embed", "embed"),) if alone else ()
    aliases += (("hook_normalized_resid_mid", "resid_mid_normalized"),) if post else ()
    sites = tuple(Site(name, one) for name, one in axes.items())
    return SiteTable(config.name, sites, tuple(sizes.items()), aliases, attention_rule(config))


def _mlp_axes(config: DecoderConfig) -> dict[str, tuple[str, ...]]:
    if not config.d_mlp:
        return {}
    tokens = _STREAM[:3]
    if not config.n_experts:
        return {"mlp.in": _STREAM, "mlp.pre": (*tokens, "d_mlp"), "mlp.post": (*tokens, "d_mlp"), "mlp_out": _STREAM}
    by_expert = (*tokens, "expert")
    return {
        "mlp.in": _STREAM,
        "mlp.router": by_expert,
        "mlp.gates": by_expert,
        "mlp.pre": (*by_expert, "d_mlp"),
        "mlp.post": (*by_expert, "d_mlp"),
        "mlp.expert_out": (*by_expert, "d_model"),
        "mlp_out": _STREAM,
    }


def attention_rule(config: DecoderConfig) -> AttentionRule:
    """How queries and keys make scores, and heads what attention adds: what the equations of the sites depend on."""
    normed = config.norms in ("output", "sandwich")
    return AttentionRule(
        scale=config.attn_scale,
        softcap=config.score_softcap,
        causal=config.causal,
        windows=config.windows,
        written="normed" if normed else "sum + bias" if config.o_bias else "sum",
    )
