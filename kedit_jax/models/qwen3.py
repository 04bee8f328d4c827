"""Qwen3: Llama's layout with a norm on every query and key head."""

from __future__ import annotations

from typing import Any

from kedit_jax.models.config import ModelConfig
from kedit_jax.models.family import Family
from kedit_jax.models.fields import Fields
from kedit_jax.models.llama import attention_biases, read_gated, weights, write_gated
from kedit_jax.models.qwen2 import read_qwen_windows, write_qwen_windows


def read_config(fields: Fields) -> ModelConfig:
    """What this family computes, from the fields of its config.json; what is not implemented is refused."""
    fields.integer("head_dim")  # not hidden_size / heads in this family, so there is nothing to derive it from
    return read_gated(fields, "qwen3", attention_biases(fields), qk_norm=True, local=read_qwen_windows(fields))


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The fields of config.json that `read_config` reads this configuration back from."""
    return {**write_gated(config), "attention_bias": config.biases.qkv, **write_qwen_windows(config)}


QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    prefix="model.",
    read_config=read_config,
    write_config=write_config,
    weights=weights,
)
