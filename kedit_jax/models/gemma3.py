"""Gemma 3, the text model: Gemma 2 with normed heads in place of capped scores, and slower rotation in the global layers."""

from __future__ import annotations

import dataclasses
from typing import Any

from kedit_jax.models.config import ModelConfig, RotaryConfig
from kedit_jax.models.family import Family
from kedit_jax.models.fields import Fields
from kedit_jax.models.gemma2 import read_gemma, weights, write_gemma
from kedit_jax.models.rotary import rope_section, rotary_of, write_rotary
from kedit_jax.models.windows import read_windows

_GLOBAL_THETA, _LOCAL_THETA, _PATTERN = 1_000_000.0, 10_000.0, 6  # where a file does not name them


def read_config(fields: Fields) -> ModelConfig:
    """What this family computes, from the fields of its config.json; what is not implemented is refused."""
    fields.must_be("attn_logit_softcapping", why="transformers does not cap the scores of this family")
    every = fields.integer("sliding_window_pattern", _PATTERN)
    local = read_windows(fields, lambda layer: bool((layer + 1) % every))
    if local is not None:
        local = dataclasses.replace(local, rotary=read_local(fields, fields.integer("head_dim")))
    cap = fields.number_or_none("final_logit_softcapping", None)
    return read_gemma(fields, "gemma3_text", rotary=read_global, qk_norm=True, logit_soft_cap=cap, local=local)


def read_global(fields: Fields, head_dim: int) -> RotaryConfig:
    """transformers 5 has an object for each kind of layer; before it, `rope_scaling` held for the global ones alone."""
    rope = rope_section(fields)
    rope = (rope.section("full_attention") or Fields({}, "rope")) if fields.has("rope_parameters") else rope
    return rotary_of(fields, rope, head_dim, theta=_GLOBAL_THETA, by_layer=True)


def read_local(fields: Fields, head_dim: int) -> RotaryConfig:
    """The rotation of the layers with a window, which has a base of its own."""
    rope = rope_section(fields)
    rope = rope.section("sliding_attention") or Fields({}, "rope")
    return rotary_of(fields, rope, head_dim, theta_field="rope_local_base_freq", theta=_LOCAL_THETA, by_layer=True)


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The fields of config.json that `read_config` reads this configuration back from."""
    local = None if config.local is None else config.local.rotary
    rope = {
        "full_attention": write_rotary(config.rotary),
        "sliding_attention": write_rotary(local or RotaryConfig(dim=config.head_dim, theta=_LOCAL_THETA)),
    }
    return {**write_gemma(config), "rope_parameters": rope}


GEMMA3 = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    prefix="model.",
    read_config=read_config,
    write_config=write_config,
    weights=weights,
)
