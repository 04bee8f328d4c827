"""Sliding windows in a config.json: which layers have one, and how wide it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from kedit_jax.models.config import LocalAttention, ModelConfig
from kedit_jax.models.fields import Fields

LAYER_TYPES: Mapping[str, bool] = MappingProxyType({"full_attention": False, "sliding_attention": True})


def read_windows(fields: Fields, default: Callable[[int], bool], window: int | None = None) -> LocalAttention | None:
    """The layers that `layer_types` marks, or those of the default where it is absent; None where there are none.

    Without a `window`, `sliding_window` must be there.
    """
    layers = [default(layer) for layer in range(fields.layers("num_hidden_layers"))]
    marked = fields.choices("layer_types", LAYER_TYPES, layers)
    if not any(marked):
        return None
    return LocalAttention(fields.integer("sliding_window") if window is None else window, marked)


def read_uniform_window(fields: Fields, *, absent: int | None) -> LocalAttention | None:
    """One window for all layers, or none where `sliding_window` is null; `absent` is the family's default."""
    window = fields.integer_or_none("sliding_window", absent)
    kind = "full_attention" if window is None else "sliding_attention"
    fields.must_be_all("layer_types", kind, why=f"this family attends alike in all layers, and sliding_window is {window}")
    return None if window is None else LocalAttention(window, (True,) * fields.layers("num_hidden_layers"))


def write_windows(config: ModelConfig) -> dict[str, Any]:
    """The fields that `read_windows` reads."""
    local = config.local
    marked = (False,) * config.n_layers if local is None else local.layers
    return {
        "sliding_window": None if local is None else local.window,
        "layer_types": ["sliding_attention" if one else "full_attention" for one in marked],
    }
