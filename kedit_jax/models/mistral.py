"""Mistral: Llama's layout with a sliding window in every layer, or in none (v0.2 and later)."""

from __future__ import annotations

from typing import Any

from kedit_jax.models.config import Biases, ModelConfig
from kedit_jax.models.family import Family
from kedit_jax.models.fields import Fields
from kedit_jax.models.llama import INVERSE_FREQUENCIES, read_gated, weights, write_gated
from kedit_jax.models.windows import read_uniform_window

_WINDOW = 4096  # where a file has no such field; null means none


def read_config(fields: Fields) -> ModelConfig:
    """What this family computes, from the fields of its config.json; what is not implemented is refused."""
    return read_gated(fields, "mistral", Biases(), local=read_uniform_window(fields, absent=_WINDOW))


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The fields of config.json that `read_config` reads this configuration back from."""
    return {**write_gated(config), "sliding_window": None if config.local is None else config.local.window}


MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    prefix="model.",
    read_config=read_config,
    write_config=write_config,
    weights=weights,
    buffers=INVERSE_FREQUENCIES,
)
