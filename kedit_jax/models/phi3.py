"""Phi-3 (and 3.5, and Phi-4's dense models): Llama's layout with fused projections, and LongRoPE's short sequences."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from kedit_jax.models.config import Biases, LongRope, ModelConfig, RotaryConfig
from kedit_jax.models.family import Family, Weight, linear, norm
from kedit_jax.models.fields import Fields
from kedit_jax.models.llama import outside, read_gated, write_gated
from kedit_jax.models.rotary import rope_section, rope_type, rotated_share, write_rotary
from kedit_jax.models.windows import read_uniform_window

_ROPE_TYPES: Mapping[str, str] = MappingProxyType({"default": "default", "longrope": "longrope", "su": "longrope"})
_ORIGINAL_POSITIONS = 4096  # where a file does not name them beside the section: transformers overwrites those in it


def read_config(fields: Fields) -> ModelConfig:
    """What this family computes, from the fields of its config.json; what is not implemented is refused."""
    return read_gated(fields, "phi3", Biases(), rotary=read_rotary, local=read_uniform_window(fields, absent=None))


def read_rotary(fields: Fields, head_dim: int) -> RotaryConfig:
    """Rotation of part of the head (Phi-4-mini) or all of it."""
    rope = rope_section(fields)
    long_rope = rope_type(rope, _ROPE_TYPES) == "longrope"
    theta = rope.number("rope_theta") if rope.has("rope_theta") else fields.number("rope_theta", 10000.0)
    share = (rope if rope.has("partial_rotary_factor") else fields).number("partial_rotary_factor", 1.0, maximum=1.0)
    original = fields.integer("original_max_position_embeddings", _ORIGINAL_POSITIONS, minimum=2)
    return RotaryConfig(int(head_dim * share), theta, scaling=_read_long_rope(fields, rope, original) if long_rope else None)


def _read_long_rope(fields: Fields, rope: Fields, original: int) -> LongRope:
    return LongRope(
        short=rope.numbers("short_factor"),
        long=rope.numbers("long_factor"),
        original_max_positions=original,
        factor=rope.number("factor", fields.integer("max_position_embeddings") / original),
        attention_factor=rope.number_or_none("attention_factor", None),
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The fields of config.json that `read_config` reads this configuration back from."""
    rotary = config.rotary
    written = {**write_gated(config), "sliding_window": None if config.local is None else config.local.window}
    if rotary is None:
        return written
    written["rope_parameters"] = {**write_rotary(rotary), "partial_rotary_factor": rotated_share(rotary, config.head_dim)}
    if isinstance(rotary.scaling, LongRope):
        written["original_max_position_embeddings"] = rotary.scaling.original_max_positions
    return written


def weights(config: ModelConfig) -> list[Weight]:
    """Where each tensor of this family's checkpoints goes."""
    block = "model.layers.{layer}"
    return [
        *outside(config),
        *norm(f"{block}.input_layernorm", "layers.attn_norm", bias=False),
        *fused(f"{block}.self_attn.qkv_proj", "layers.attn.q", "layers.attn.k", "layers.attn.v"),
        *linear(f"{block}.self_attn.o_proj", "layers.attn.o", bias=False),
        *norm(f"{block}.post_attention_layernorm", "layers.mlp_norm", bias=False),
        *fused(f"{block}.mlp.gate_up_proj", "layers.mlp.gate", "layers.mlp.up"),
        *linear(f"{block}.mlp.down_proj", "layers.mlp.down", bias=False),
    ]


def fused(name: str, *paths: str) -> list[Weight]:
    """Several Linear layers without biases, their outputs one after another."""
    return [Weight(f"{name}.weight", tuple(f"{path}.kernel" for path in paths), transpose=True)]


PHI3 = Family(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    prefix="model.",
    read_config=read_config,
    write_config=write_config,
    weights=weights,
)
