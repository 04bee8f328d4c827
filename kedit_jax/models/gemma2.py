"""Gemma 2: norms before and behind attention and MLP, soft caps, windows in every other layer, scaled embeddings."""

from __future__ import annotations

from typing import Any

from kedit_jax.models.config import ModelConfig
from kedit_jax.models.family import Family, Weight, linear, norm
from kedit_jax.models.fields import Fields
from kedit_jax.models.llama import attention, attention_biases, outside, read_gated, write_gated
from kedit_jax.models.windows import read_windows, write_windows

_ATTENTION_CAP, _LOGIT_CAP = 50.0, 30.0  # where a file has no such field; null means none


def read_config(fields: Fields) -> ModelConfig:
    """What this family computes, from the fields of its config.json; what is not implemented is refused."""
    return read_gemma(
        fields,
        "gemma2",
        attention_soft_cap=fields.number_or_none("attn_logit_softcapping", _ATTENTION_CAP),
        logit_soft_cap=fields.number_or_none("final_logit_softcapping", _LOGIT_CAP),
        local=read_windows(fields, lambda layer: layer % 2 == 0),
    )


def read_gemma(fields: Fields, family: str, **more: Any) -> ModelConfig:
    """What Gemma 2 and 3 have in common beyond Llama."""
    fields.must_be("use_bidirectional_attention", False, why="tokens attend to earlier ones alone")
    fields.integer("head_dim")  # not hidden_size / heads in these families, so there is nothing to derive it from
    return read_gated(
        fields,
        family,
        attention_biases(fields),
        activation="hidden_activation",
        tied=True,
        post_norms=True,
        one_plus_scale=True,
        query_width=fields.number("query_pre_attn_scalar"),
        embedding_scale=fields.integer("hidden_size") ** 0.5,
        **more,
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The fields of config.json that `read_config` reads this configuration back from."""
    return {**write_gemma(config), "attn_logit_softcapping": config.attention_soft_cap}


def write_gemma(config: ModelConfig) -> dict[str, Any]:
    """What Gemma 2 and 3 have in common in their config.json."""
    written = write_gated(config)
    activation = written.pop("hidden_act")
    width = config.head_dim if config.query_width is None else config.query_width
    return {
        **written,
        "hidden_activation": "gelu_pytorch_tanh" if activation == "gelu_new" else activation,  # as published
        "attention_bias": config.biases.qkv,
        "query_pre_attn_scalar": int(width) if width == int(width) else width,  # transformers insists on an integer
        "final_logit_softcapping": config.logit_soft_cap,
        **write_windows(config),
    }


def weights(config: ModelConfig) -> list[Weight]:
    """Where each tensor of this family's checkpoints goes."""
    block = "model.layers.{layer}"
    return [
        *outside(config),
        *attention(config),
        *norm(f"{block}.input_layernorm", "layers.attn_norm", bias=False),
        *norm(f"{block}.post_attention_layernorm", "layers.attn_post_norm", bias=False),
        *norm(f"{block}.pre_feedforward_layernorm", "layers.mlp_norm", bias=False),
        *norm(f"{block}.post_feedforward_layernorm", "layers.mlp_post_norm", bias=False),
        *linear(f"{block}.mlp.gate_proj", "layers.mlp.gate", bias=False),
        *linear(f"{block}.mlp.up_proj", "layers.mlp.up", bias=False),
        *linear(f"{block}.mlp.down_proj", "layers.mlp.down", bias=False),
    ]


GEMMA2 = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    prefix="model.",
    read_config=read_config,
    write_config=write_config,
    weights=weights,
)
