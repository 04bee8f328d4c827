"""Qwen2 and Qwen2.5: Llama's layout with biases on queries, keys and values."""

from __future__ import annotations

from typing import Any

from kedit_jax.models.config import Biases, LocalAttention, ModelConfig
from kedit_jax.models.family import Family
from kedit_jax.models.fields import Fields
from kedit_jax.models.llama import INVERSE_FREQUENCIES, read_gated, weights, write_gated
from kedit_jax.models.windows import read_windows, write_windows

_WINDOW, _FIRST_WINDOWED = 4096, 28  # where a file does not name them; the same in Qwen3


def read_config(fields: Fields) -> ModelConfig:
    """What this family computes, from the fields of its config.json; what is not implemented is refused."""
    return read_gated(fields, "qwen2", Biases(qkv=True), local=read_qwen_windows(fields))


def read_qwen_windows(fields: Fields) -> LocalAttention | None:
    """Windows in the upper layers, and only where they are switched on: `sliding_window` is set in either case.

    Switched on with `sliding_window` null they are none, as in transformers.
    """
    window = fields.integer_or_none("sliding_window", _WINDOW) if fields.flag("use_sliding_window", False) else None
    if window is None:
        fields.must_be_all("layer_types", "full_attention", why="use_sliding_window is not set, or sliding_window is null")
        return None
    first = fields.integer("max_window_layers", _FIRST_WINDOWED, minimum=0)
    return read_windows(fields, lambda layer: layer >= first, window)


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The fields of config.json that `read_config` reads this configuration back from."""
    return {**write_gated(config), **write_qwen_windows(config)}


def write_qwen_windows(config: ModelConfig) -> dict[str, Any]:
    """The fields that `read_qwen_windows` reads."""
    local = config.local
    first = config.n_layers if local is None else local.layers.index(True)
    return {"use_sliding_window": local is not None, "max_window_layers": first, **write_windows(config)}


QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    prefix="model.",
    read_config=read_config,
    write_config=write_config,
    weights=weights,
    buffers=INVERSE_FREQUENCIES,
)
